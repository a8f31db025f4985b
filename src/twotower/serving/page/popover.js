// A panel that a button opens. Esc closes it and returns the focus; a click or focus elsewhere closes it too.

/** `first()` returns the element that gets the focus when the panel opens. */
export function popover(button, panel, first) {
  const set = (open) => {
    panel.hidden = !open;
    button.setAttribute("aria-expanded", String(open));
    if (open) first()?.focus();
  };
  button.addEventListener("click", () => set(panel.hidden));
  panel.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.defaultPrevented) return;
    event.preventDefault(); // a sheet around the panel stays open
    set(false);
    button.focus();
  });
  for (const name of ["pointerdown", "focusin"])
    document.addEventListener(name, (event) => {
      if (!panel.hidden && event.target.isConnected && !panel.contains(event.target) && !button.contains(event.target)) set(false);
    });
}
