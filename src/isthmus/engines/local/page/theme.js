// Light or dark, if the reader chose one. A classic script in the head, so that the first picture already has it.
try {
  const theme = localStorage.getItem("isthmus.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Without storage the page follows the system.
}
