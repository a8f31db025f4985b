// Runs before the first paint, so that a chosen theme never flashes the other one. Without a choice the system's holds.
try {
  const chosen = localStorage.getItem("twotower.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // Storage may be forbidden; then the system's theme holds.
}
