"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const COLUMNS = ["shard", "key", "source", "index", "stratum", "share", "label"];
const stored = "openblip-labels-" + data.run;
const answers = new Map();
let current = 0;

function find(id) { return document.getElementById(id); }

// A browser may refuse storage for files; then answers last as long as the page is open.
function save() {
  try { localStorage.setItem(stored, JSON.stringify([...answers])); } catch (error) { /* see above */ }
}

function restore() {
  try {
    for (const [number, answer] of JSON.parse(localStorage.getItem(stored) || "[]")) answers.set(number, answer);
  } catch (error) { /* see above */ }
}

function show() {
  const item = data.items[current];
  find("image").src = data.images[item.image];
  find("caption").textContent = item.caption;
  find("caption").scrollTop = 0;
  find("place").textContent = `Text ${current + 1} of ${data.items.length}, ${answers.size} answered`;
  find("progress").value = answers.size;
  for (const answer of ["yes", "no", "unsure"]) {
    find(answer).setAttribute("aria-pressed", String(answers.get(current) === answer));
  }
}

function move(step) {
  current = Math.min(Math.max(current + step, 0), data.items.length - 1);
  show();
}

function nextOpen() {
  for (let step = 1; step <= data.items.length; step++) {
    const number = (current + step) % data.items.length;
    if (!answers.has(number)) { current = number; break; }
  }
  show();
}

function answer(value) {
  answers.set(current, value);
  save();
  nextOpen();
}

function labels() {
  return data.items.map((item, number) => {
    const row = { ...item, label: answers.get(number) || "" };
    return Object.fromEntries(COLUMNS.map((name) => [name, row[name]]));
  });
}

function download(name, type, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function downloadJson() {
  const content = { ...data.facts, labels: labels() };
  download("labels.json", "application/json", JSON.stringify(content, null, 1) + "\n");
}

function downloadCsv() {
  const cell = (value) => `"${String(value).replaceAll('"', '""')}"`;
  const lines = [COLUMNS, ...labels().map(Object.values)].map((row) => row.map(cell).join(","));
  download("labels.csv", "text/csv", lines.join("\r\n") + "\r\n");
}

function clear() {
  if (confirm("Delete all answers on this page?")) { answers.clear(); save(); current = 0; show(); }
}

const actions = {
  yes: () => answer("yes"), no: () => answer("no"), unsure: () => answer("unsure"),
  back: () => move(-1), forward: () => move(1), next: nextOpen,
  json: downloadJson, csv: downloadCsv, clear: clear,
};
for (const [id, action] of Object.entries(actions)) find(id).addEventListener("click", action);
const keys = { y: "yes", n: "no", u: "unsure", arrowleft: "back", arrowright: "forward", " ": "next", d: "json" };
document.addEventListener("keydown", (event) => {
  const id = keys[event.key.toLowerCase()];
  if (!id || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === " " && event.target instanceof HTMLButtonElement) return; // presses that button
  event.preventDefault();
  actions[id]();
});
restore();
if (answers.has(0)) nextOpen(); else show();
