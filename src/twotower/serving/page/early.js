// Part of the page itself, before the first paint. Sets the chosen theme, so that the page does not flash; without a choice, the
// system theme is used. Marks a page whose address has a state: the list that came with it is not the one of the address.
try {
  const chosen = localStorage.getItem("twotower.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // Storage may be blocked; then the system theme is used.
}
if (location.hash.length > 1) document.documentElement.dataset.linked = "yes";
