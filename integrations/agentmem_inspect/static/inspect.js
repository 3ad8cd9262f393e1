"use strict";
// Keys, heat-maps and questions. Everything else on these pages works by links and forms alone.

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

// The matrices of a memory as heat-maps: a turn of the history, or its difference from another one.
function matrices(section) {
  const { address, steps, fixed } = JSON.parse(section.dataset.matrices);
  const [turn, against, own, what, maps, cell, least, most] =
    ["turn", "against", "own", "what", "maps", "cell", "least", "most"].map((id) => document.getElementById(id));
  const kept = new Map();
  let shown = 0;

  // The numbers of a checkpoint's memory: float32, [layers, heads, rank, rank]. A promise, so that none is fetched twice.
  function numbers(id) {
    if (!kept.has(id)) {
      const fetched = fetch(`${address}&at=${encodeURIComponent(id)}`).then((response) => {
        if (!response.ok) throw new Error(`the memory of ${id} cannot be read`);
        return response.arrayBuffer();
      }).then((buffer) => new Float32Array(buffer));
      fetched.catch(() => kept.delete(id));
      kept.set(id, fetched);
    }
    return kept.get(id);
  }

  function other(at) {
    if (against.value === "before") return at > 0 ? steps[at - 1] : "nothing";
    if (against.value === "fixed") return fixed;
    return against.value === "" ? null : steps[Number(against.value)];
  }

  async function show() {
    const call = ++shown, at = Number(turn.value), step = steps[at], from = other(at);
    const difference = from !== null && from !== "nothing";
    if (difference && String(from.shape) !== String(step.shape)) {
      what.textContent = "These two memories have different shapes, so they have no difference.";
      maps.replaceChildren();
      return;
    }
    try {
      const [now, before] = await Promise.all([numbers(step.id), difference ? numbers(from.id) : null]);
      if (call !== shown) return; // the slider has moved on
      draw(step.shape, before ? now.map((value, index) => value - before[index]) : now);
      const name = from === fixed ? `checkpoint ${fixed && fixed.id}` : `turn ${steps.indexOf(from) + 1}`;
      const said = difference ? `, less ${name}` : from === "nothing" ? ", all of it from this turn" : "";
      what.textContent = `Turn ${at + 1} of ${steps.length}, ${step.when || step.id}: ${step.consumed} messages consumed${said}.`;
      if (at > 0) numbers(steps[at - 1].id).catch(() => {});
    } catch (error) {
      what.textContent = `${error.message}; it may have been pruned.`;
    }
  }

  function draw([layers, heads, rank], values) {
    const size = rank * rank, palette = ["--low", "--zero", "--high"].map(colour);
    if (maps.children.length !== layers * heads) maps.replaceChildren(...frames(layers, heads, rank));
    const largest = values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    least.textContent = own.checked ? "least" : (-largest).toPrecision(3);
    most.textContent = own.checked ? "most" : largest.toPrecision(3);
    [...maps.children].forEach((figure, number) => {
      const part = values.subarray(number * size, (number + 1) * size), canvas = figure.firstChild;
      const norm = Math.hypot(...part);
      const scale = own.checked ? part.reduce((most, value) => Math.max(most, Math.abs(value)), 0) : largest;
      const context = canvas.getContext("2d"), image = context.createImageData(rank, rank);
      part.forEach((value, index) => image.data.set(mixed(palette, scale ? value / scale : 0), index * 4));
      context.putImageData(image, 0, 0);
      canvas.values = part;
      const name = `layer ${Math.floor(number / heads)}${heads > 1 ? `, head ${number % heads}` : ""}`;
      canvas.setAttribute("aria-label", `${name}: norm ${norm.toPrecision(3)}`);
      figure.lastChild.textContent = `${name} · norm ${norm.toPrecision(3)}`;
    });
  }

  function frames(layers, heads, rank) {
    return Array.from({ length: layers * heads }, () => {
      const figure = document.createElement("figure"), canvas = document.createElement("canvas");
      canvas.width = canvas.height = rank;
      canvas.setAttribute("role", "img");
      canvas.addEventListener("pointermove", (event) => {
        const box = canvas.getBoundingClientRect();
        const [row, column] = [(event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width]
          .map((share) => Math.min(rank - 1, Math.max(0, Math.floor(share * rank))));
        cell.textContent = `row ${row}, column ${column}: ${canvas.values[row * rank + column].toPrecision(4)}`;
      });
      figure.append(canvas, document.createElement("figcaption"));
      return figure;
    });
  }

  turn.addEventListener("input", show);
  against.addEventListener("change", show);
  own.addEventListener("change", show);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  show();
}

// A colour of the style sheet, #rrggbb, as three numbers.
function colour(name) {
  const text = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
}

// The colour of a number from -1 to 1, as four bytes.
function mixed([low, zero, high], value) {
  const end = value < 0 ? low : high, share = Math.sqrt(Math.abs(value)); // so that small numbers show
  return [...zero.map((part, at) => Math.round(part + (end[at] - part) * share)), 255];
}

// One question, asked in each way in turn: they share a model.
function asking(form) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = form.querySelector("button"), fields = new URLSearchParams(new FormData(form));
    const replies = [...document.querySelectorAll("[data-arm]")];
    button.disabled = true;
    for (const section of replies) section.lastElementChild.textContent = "waiting";
    for (const section of replies) {
      const place = section.lastElementChild;
      place.textContent = "thinking …";
      fields.set("arm", section.dataset.arm);
      try {
        const response = await fetch(form.action, { method: "POST", body: fields });
        if (!response.ok) throw new Error(`the page answered with ${response.status}; load it anew`);
        place.innerHTML = await response.text(); // of a template, which escaped it
      } catch (error) {
        place.textContent = error.message;
      }
    }
    button.disabled = false;
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && event.target.matches("textarea")) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
}

keys();
const form = document.querySelector("[data-ask]");
if (form) asking(form);
const section = document.querySelector("[data-matrices]");
if (section) matrices(section);
