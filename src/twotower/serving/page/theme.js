// Sets the chosen theme before the first paint, so that the page does not flash. Without a choice, the system theme is used.
try {
  const chosen = localStorage.getItem("twotower.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // Storage may be blocked; then the system theme is used.
}
