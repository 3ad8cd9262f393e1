"use strict";
// Every page works by links and forms alone; this adds keys.

function keys() {
  const list = document.querySelector("[data-keys]");
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, select")) return;
    if (event.key === "/") {
      const search = document.querySelector("input[type=search]");
      if (search) { event.preventDefault(); search.focus(); search.select(); }
    } else if (list && (event.key === "j" || event.key === "k")) {
      const links = [...list.querySelectorAll("li > a")];
      const at = links.indexOf(document.activeElement);
      const next = links[event.key === "j" ? at + 1 : Math.max(0, at - 1)];
      if (next) next.focus();
    }
  });
}

keys();
