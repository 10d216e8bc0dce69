"use strict";
// The page is complete without this script, which only adds what answers to the reader: sliders and filters.
// All text is set as text, never as markup.

for (const element of document.querySelectorAll("[data-needs-script]")) element.hidden = false;

const format = new Intl.NumberFormat("en");
const percent = (part, whole) => (whole ? (100 * part / whole).toFixed(1) + "%" : "–");
const below = (counts) => {  // how many texts are kept at each threshold: those of all higher bins
  const kept = new Array(counts.length).fill(0);
  for (let bin = counts.length - 2; bin >= 0; bin--) kept[bin] = kept[bin + 1] + counts[bin + 1];
  return kept;
};

// Keep rates at any threshold
const keep = document.getElementById("keep");
const sources = JSON.parse(keep.dataset.numbers);
const steps = Number(keep.dataset.steps);
const together = keep.querySelector("#together");
for (const source of Object.values(sources)) {
  source.total = source.texts.reduce((sum, count) => sum + count, 0);
  source.kept = below(source.texts);
  source.keptTrue = source.true && below(source.true);
  source.keptFalse = source.false && below(source.false);
}

function show() {
  const stated = [];
  let pairs = 0, texts = 0;
  for (const [name, source] of Object.entries(sources)) {
    const step = Number(keep.querySelector("#slider-" + name).value);
    const threshold = String(step / steps);
    keep.querySelector("#number-" + name).value = threshold;
    const kept = source.kept[step];
    pairs += kept;
    texts += source.total;
    stated.push([name, threshold]);
    let words = percent(kept, source.total) + " kept · " + format.format(kept) + " of " + format.format(source.total);
    if (source.keptTrue) {
      const right = source.keptTrue[step], wrong = source.keptFalse[step];
      const all = source.true.reduce((sum, count) => sum + count, 0);
      words += " · precision " + percent(right, right + wrong) + ", recall " + percent(right, all);
    }
    keep.querySelector("#kept-" + name).textContent = words;
    for (const mark of document.querySelectorAll(".preview-" + name)) {
      const x = Number(mark.dataset.left) + Number(mark.dataset.width) * step / steps;
      mark.setAttribute("x1", x);
      mark.setAttribute("x2", x);
      mark.removeAttribute("visibility");
    }
  }
  keep.querySelector("#pairs").textContent =
    format.format(pairs) + " pairs of " + format.format(texts) + " texts (" + percent(pairs, texts) + ")";
  const same = stated.every(([, threshold]) => threshold === stated[0][1]);
  const options = same ? [" --threshold " + stated[0][1]] : stated.map(([name, value]) => ` --threshold-${name} ${value}`);
  keep.querySelector("#command").textContent = keep.dataset.command + options.join("");
}

function move(name, step) {
  step = Math.min(steps, Math.max(0, Math.round(step)));
  for (const each of together.checked ? Object.keys(sources) : [name]) {
    keep.querySelector("#slider-" + each).value = step;
  }
  show();
}

for (const name of Object.keys(sources)) {
  keep.querySelector("#slider-" + name).addEventListener("input", (event) => move(name, Number(event.target.value)));
  keep.querySelector("#number-" + name).addEventListener("change", (event) => move(name, Number(event.target.value) * steps));
}
show();

// The gallery
const gallery = document.getElementById("gallery");
const filters = document.getElementById("filters");
const cards = [...gallery.querySelectorAll(".card")].map((element) => ({
  element,
  fate: element.dataset.fate,
  marks: ["all", "borderline", "mistake"].filter((mark) => mark === "all" || mark in element.dataset),
  scores: JSON.parse(element.dataset.scores),
  text: element.textContent.toLowerCase(),
}));

function filter() {
  const chosen = new FormData(filters);
  const wanted = chosen.get("show"), words = chosen.get("words").trim().toLowerCase();
  const low = Number(chosen.get("low") || 0), high = Number(chosen.get("high") || 1);
  const order = chosen.get("order");
  const key = (card) => (order === "low" ? Math.min(...card.scores) : -Math.max(...card.scores));
  const shown = cards.filter((card) =>
    (card.fate === wanted || card.marks.includes(wanted)) &&
    card.text.includes(words) && card.scores.some((score) => low <= score && score <= high));
  for (const card of cards) card.element.hidden = true;
  for (const card of order === "drawn" ? shown : [...shown].sort((one, other) => key(one) - key(other))) {
    card.element.hidden = false;
    gallery.append(card.element);
  }
  document.getElementById("shown").textContent = `${shown.length} of ${cards.length} images`;
}

filters.addEventListener("input", filter);
filters.addEventListener("reset", () => setTimeout(filter));
filters.addEventListener("submit", (event) => event.preventDefault());
filter();
