// Theme and language before anything is painted: remembered choices first, then what the browser prefers.
(() => {
  const remembered = (key) => { try { return localStorage.getItem(key); } catch { return null; } };
  const root = document.documentElement;
  const theme = remembered("engram-theme");
  if (theme === "light" || theme === "dark") root.dataset.theme = theme;
  const wanted = remembered("engram-language") || navigator.language || "en";
  root.lang = wanted.toLowerCase().startsWith("zh") ? "zh-Hans" : "en";
})();
