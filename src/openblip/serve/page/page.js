"use strict";
// The page of `openblip serve`. All text is set as text, never as markup; all addresses are relative to the page.
// An image is sent as the file that the user gave: the server remembers what it encoded by content, so that asking about
// an image again costs little.

const find = (id) => document.getElementById(id);
const MOST_IMAGES = 100;
const MOST_SHARDS = 1000;  // that a run's list names
const TRIES = 4;  // of a call that the server is too busy for
const RAMP = [[30, 40, 130], [20, 150, 190], [90, 200, 90], [250, 210, 50], [225, 40, 30]];  // from cold to hot
const OPACITY = 0.75;  // of the hottest patch

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// Calls

class CallError extends Error {}

function alertUser(message) {
  find("alert").textContent = message;
  find("alert").hidden = !message;
}

const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, 1000 * seconds));

async function call(path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem("openblip-key");
  if (key) headers.Authorization = "Bearer " + key;
  if (body) headers["Content-Type"] = "application/json";
  for (let attempt = 1; ; attempt++) {
    let reply;
    try {
      reply = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new CallError("The server does not answer. Is it still running?");
    }
    if (reply.ok) return reply.json();
    if ((reply.status === 429 || reply.status === 503) && attempt < TRIES) {
      await pause(Math.min(Number(reply.headers.get("Retry-After")) || 1, 10));
      continue;
    }
    if (reply.status === 401) find("key-form").hidden = false;
    let message = `The server answered ${reply.status}.`;
    try { message = (await reply.json()).error.message || message; } catch { /* no body of ours */ }
    const error = new CallError(message);
    error.status = reply.status;
    throw error;
  }
}

// Does what a person asked for, and shows why it cannot be done.
async function attempt(work) {
  alertUser("");
  try {
    await work();
  } catch (error) {
    if (error.name === "AbortError") return;
    alertUser(error.message);
    if (!(error instanceof CallError)) throw error;
  }
}

// The same for work of which only the latest counts: what was begun before under this name, an element's, is broken off.
const underWay = new Map();

async function during(name, work) {
  underWay.get(name)?.abort();
  const own = new AbortController();
  underWay.set(name, own);
  find(name).setAttribute("aria-busy", "true");
  await attempt(() => work(own.signal));
  if (underWay.get(name) === own) find(name).removeAttribute("aria-busy");
}

function onSubmit(form, work) {
  find(form).addEventListener("submit", (event) => {
    event.preventDefault();
    during(form, work);
  });
}

// Models: for each kind of call the served models that can do it, the most specialised first.

let models = [];
let served = null;  // the promise of what is served
const NEEDED = { caption: ["caption"], match: ["match", "similarity"], answer: ["answer"], chat: ["chat"] };

// An image may be given before the server has said what it serves: whoever needs to know waits for this.
function knowModels() {
  served ??= call("models").then((reply) => {
    models = reply.models;
    showModels();
    find("tab-search").hidden = !reply.index;
  }).catch((error) => { served = null; throw error; });
  return served;
}

function modelsFor(kind) {
  const able = models.filter((model) => NEEDED[kind].some((task) => model.tasks.includes(task)));
  return able.sort((one, other) => one.tasks.length - other.tasks.length);
}

const modelOf = (kind) => find(kind + "-model").value;

function showModels() {
  const missing = [];
  const names = { caption: "writes captions", match: "compares texts with images", answer: "answers questions" };
  for (const kind of Object.keys(NEEDED)) {
    const able = modelsFor(kind), select = find(kind + "-model");
    select.replaceChildren(...able.map((model) => make("option", { value: model.name, textContent: model.name })));
    select.parentElement.hidden = able.length < 2;
    find(kind + "-panel").hidden = !able.length;
    if (!able.length && names[kind]) missing.push(names[kind]);
  }
  find("models").textContent = models.map((model) => model.name).join(", ");
  find("cannot").textContent = missing.length ? `No model that is served here ${missing.join(", or ")}.` : "";
}

// Images

const images = [];
let current = null;

// A signal of work on an image, which also ends when the image is removed.
const onImage = (image, signal) => AbortSignal.any([image.removal.signal, signal]);

function addImages(files) {
  const added = [];
  for (const file of files) {
    if (images.length >= MOST_IMAGES) { alertUser(`This page holds ${MOST_IMAGES} images; remove some first.`); break; }
    const image = { name: file.name || "pasted image", file, url: URL.createObjectURL(file), state: "new", captions: [],
                    problem: "", matches: [], answers: [], turns: [], heat: new Map(), removal: new AbortController() };
    const preview = make("img", { src: image.url, alt: image.name });
    preview.addEventListener("error", () => preview.replaceWith(image.name));  // HEIC, TIFF: only the server reads them
    image.button = make("button", { type: "button", title: image.name }, preview);
    image.button.setAttribute("aria-pressed", "false");
    image.button.addEventListener("click", () => choose(image));
    find("strip").append(image.button);
    images.push(image);
    added.push(image);
  }
  if (!added.length) return;
  find("examples").hidden = true;
  choose(added[0]);
  captionRest();
}

function dataUri(image) {
  image.uri ??= new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.replace(/^data:(?!image\/)[^;,]*/, "data:application/octet-stream"));
    reader.onerror = () => reject(new CallError(`${image.name} cannot be read.`));
    reader.readAsDataURL(image.file);
  });
  return image.uri;
}

function choose(image) {
  current = image;
  find("workbench").hidden = !image;
  for (const each of images) each.button.setAttribute("aria-pressed", String(each === image));
  clearHeat();
  if (!image) { find("examples").hidden = !find("example-strip").childElementCount; return; }
  find("image").src = image.url;
  find("image-name").textContent = image.name;
  showCaptions();
  showMatches();
  showAnswers();
  showTurns();
}

function removeCurrent() {
  const position = images.indexOf(current);
  current.removal.abort();
  URL.revokeObjectURL(current.url);
  current.button.remove();
  images.splice(position, 1);
  const next = images[Math.min(position, images.length - 1)] || null;
  choose(next);
  (next ? next.button : find("pick")).focus();
}

// Captions

function percent(share) {
  if (share > 0 && share < 0.0001) return "< 0.01 %";
  return (share >= 0.1 ? (100 * share).toFixed(0) : (100 * share).toPrecision(2)) + " %";
}

let isCaptioning = false;

// One after the other; the one that is looked at comes first.
async function captionRest() {
  if (isCaptioning) return;
  isCaptioning = true;
  try {
    for (let image; (image = [current, ...images].find((each) => each?.state === "new"));) await writeCaptions(image);
  } catch (error) {
    alertUser(error.message);
    if (!(error instanceof CallError)) throw error;
  } finally {
    isCaptioning = false;
  }
}

async function writeCaptions(image) {
  image.writing?.abort();
  image.writing = new AbortController();
  const signal = onImage(image, image.writing.signal);
  Object.assign(image, { state: "busy", captions: [], problem: "" });
  const show = () => { if (image === current) showCaptions(); };
  show();
  try {
    await knowModels();
    const model = modelOf("caption");
    if (!model) return;
    const count = Math.min(Math.max(find("num-captions").valueAsNumber || 1, 1), 5);
    const decoding = find("decoding").value === "beam"
      ? { kind: "beam", num_beams: Math.max(3, count) } : { kind: "nucleus", top_p: 0.9 };
    const request = { images: [await dataUri(image)], model, num_captions: count, decoding };
    if (find("prompt").value.trim()) request.prompt = find("prompt").value;
    const reply = await call("caption", request, signal);
    const texts = new Map(reply.captions[0].map((each) => [each.text, { ...each, model }]));  // one may come twice
    image.captions = [...texts.values()].sort((one, other) => other.logprob - one.logprob);
    image.button.title = `${image.captions[0].text} (${image.name})`;
    image.state = "done";
    show();
    await scoreCaptions(image, signal);
  } catch (error) {
    if (error.name === "AbortError") return;  // the image was removed, or is captioned anew
    const needsKey = error.status === 401;  // with one it is tried once more
    image.state = needsKey ? "new" : "done";
    if (needsKey || !(error instanceof CallError)) throw error;
    image.problem = error.message;
  } finally {
    if (!signal.aborted) {
      if (image.state === "busy") image.state = "done";
      show();
    }
  }
}

// What CapFilt does: the filter says whether a caption matches.
async function scoreCaptions(image, signal) {
  const matcher = models.find((model) => model.name === modelOf("match") && model.tasks.includes("match"));
  if (!matcher) return;
  const captions = image.captions;
  const request = { images: [await dataUri(image)], texts: captions.map((each) => each.text), model: matcher.name };
  const reply = await call("match", request, signal);
  captions.forEach((each, i) => { each.match = reply.match[0][i]; });
}

function meter(name, share) {
  const bar = make("meter", { min: 0, max: 1, value: share });
  bar.setAttribute("aria-label", name);
  return make("span", {}, name + " ", bar, " " + percent(share));
}

function showCaptions() {
  const { state, captions, problem } = current;
  const lines = captions.map((each) => {
    const facts = make("div", { className: "facts" }, meter("probability", Math.exp(each.logprob)));
    if (each.match !== undefined) facts.append(meter("match", each.match));
    return make("li", {}, wordLine(each.text, each.model), facts);
  });
  if (state !== "done") lines.push(make("li", { className: "quiet", textContent: "writing …" }));
  if (problem) lines.push(make("li", { className: "alert", textContent: problem }));
  find("captions").replaceChildren(...lines);
  find("caption-hint").hidden = !captions.length;
  find("image").alt = captions[0]?.text || current.name;
}

// Words, and where the model looks

function wordLine(text, model) {
  const line = make("div", { className: "line", role: "toolbar" });
  line.setAttribute("aria-label", `Words of: ${text}`);
  line.dir = "auto";
  const image = current;
  text.split(/(\s+)/).filter(Boolean).forEach((part) => {
    if (/^\s+$/.test(part)) { line.append(part); return; }
    const number = line.childElementCount;
    const word = make("button", { type: "button", className: "word", textContent: part, tabIndex: number ? -1 : 0 });
    const begin = () => lookAt(image, text, model, number, word);
    for (const event of ["pointerenter", "focus", "click"]) word.addEventListener(event, begin);
    word.addEventListener("pointerleave", () => { if (document.activeElement !== word) clearHeat(); });
    word.addEventListener("blur", clearHeat);
    line.append(word);
  });
  line.addEventListener("keydown", (event) => {
    const words = [...line.children], place = words.indexOf(document.activeElement);
    const step = getComputedStyle(line).direction === "rtl" ? -1 : 1;
    const next = { ArrowRight: place + step, ArrowLeft: place - step, Home: 0, End: words.length - 1 }[event.key];
    if (place < 0 || next === undefined) return;
    event.preventDefault();
    const chosen = words[Math.min(Math.max(next, 0), words.length - 1)];
    for (const word of words) word.tabIndex = word === chosen ? 0 : -1;
    chosen.focus();
  });
  return line;
}

let looking = null;  // the word that is pointed at

async function lookAt(image, text, model, number, word) {
  if (looking?.word === word) return;
  clearHeat();
  looking = { word };
  word.classList.add("current");
  const name = model + "\n" + text;
  if (!image.heat.has(name)) {
    find("looking").textContent = "…";
    image.heat.set(name, dataUri(image).then((uri) => call("explain", { image: uri, text, model }, image.removal.signal)));
  }
  let reply;
  try {
    reply = await image.heat.get(name);
  } catch (error) {
    image.heat.delete(name);
    if (looking?.word === word && error.name !== "AbortError") find("looking").textContent = error.message;
    return;
  }
  if (looking?.word !== word || image !== current) return;
  const heat = heatOfWord(text, number, reply.words);
  if (!heat) { find("looking").textContent = ""; return; }
  drawHeat(heat);
  find("looking").textContent = `“${word.textContent}”: the model looks ${placeOf(heat)}`;
}

// The model's words are pieces of those that are shown: lower case, with punctuation apart. They are found in their order.
function heatOfWord(text, number, words) {
  const lower = text.toLowerCase();
  const spans = [...lower.matchAll(/\S+/g)].map((match) => [match.index, match.index + match[0].length]);
  let from = 0;
  const maps = [];
  for (const { word, heat } of words) {
    const at = lower.indexOf(word.toLowerCase(), from);
    if (at < 0) continue;
    from = at + word.length;
    if (at >= spans[number][0] && at < spans[number][1]) maps.push(heat);
  }
  if (!maps.length) return words.length === spans.length ? words[number].heat : null;
  return maps[0].map((row, y) => row.map((_, x) => Math.max(...maps.map((heat) => heat[y][x]))));
}

function placeOf(heat) {
  let sum = 0, down = 0, right = 0;
  heat.forEach((row, y) => row.forEach((value, x) => {
    const weight = value ** 3;  // what is hot decides
    sum += weight; down += weight * (y + 0.5) / heat.length; right += weight * (x + 0.5) / row.length;
  }));
  if (!sum) return "nowhere in particular";
  const vertical = down / sum < 0.4 ? "upper" : down / sum > 0.6 ? "lower" : "";
  const horizontal = right / sum < 0.4 ? "left" : right / sum > 0.6 ? "right" : "";
  if (!vertical && !horizontal) return "at the middle";
  return `at the ${[vertical, horizontal].filter(Boolean).join(" ")}${horizontal ? "" : " part"}`;
}

function drawHeat(heat) {
  const small = make("canvas", { width: heat[0].length, height: heat.length });
  const pixels = new ImageData(small.width, small.height);
  heat.flat().forEach((value, i) => {
    const at = Math.min(Math.max(value, 0), 1) * (RAMP.length - 1), step = Math.min(Math.floor(at), RAMP.length - 2);
    for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = RAMP[step][c] + (at - step) * (RAMP[step + 1][c] - RAMP[step][c]);
    pixels.data[4 * i + 3] = 255 * OPACITY * Math.min(Math.max(value, 0), 1);
  });
  small.getContext("2d").putImageData(pixels, 0, 0);
  const canvas = find("heat"), image = find("image");
  const shape = (image.naturalHeight || 1) / (image.naturalWidth || 1);  // both lie in the same box, contained
  canvas.width = 640;
  canvas.height = Math.min(Math.max(Math.round(640 * shape), 1), 6400);
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
}

function clearHeat() {
  looking?.word.classList.remove("current");
  looking = null;
  const canvas = find("heat");
  canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
  find("looking").textContent = "";
}

// Matching

async function compare(signal) {
  const image = current, model = modelOf("match");
  const texts = [...new Set(find("match-texts").value.split("\n").map((text) => text.trim()).filter(Boolean))];
  if (!texts.length) { find("match-texts").focus(); return; }
  const reply = await call("match", { images: [await dataUri(image)], texts, model }, onImage(image, signal));
  image.matches = texts.map((text, i) => ({ text, model, match: reply.match?.[0][i], similarity: reply.similarity?.[0][i] }));
  image.matches.sort((one, other) => (other.match ?? other.similarity) - (one.match ?? one.similarity));
  if (image === current) showMatches();
}

function showMatches() {
  find("matches").replaceChildren(...current.matches.map((each) => {
    const facts = make("div", { className: "facts" });
    if (each.match !== undefined) facts.append(meter("match", each.match));
    if (each.similarity !== undefined) facts.append(make("span", { textContent: `similarity ${each.similarity.toFixed(3)}` }));
    return make("li", {}, wordLine(each.text, each.model), facts);
  }));
}

// Questions, and conversations

const clearIfStill = (field, text) => { if (find(field).value.trim() === text) find(field).value = ""; };

async function ask(signal) {
  const image = current, question = find("question").value.trim();
  if (!question) return;
  const request = { images: [await dataUri(image)], questions: [question], model: modelOf("answer") };
  const reply = await call("answer", request, onImage(image, signal));
  image.answers.push({ question, ...reply.answers[0] });
  clearIfStill("question", question);
  if (image === current) showAnswers();
}

function showAnswers() {
  find("answers").replaceChildren(...current.answers.flatMap((each) => [
    make("li", { className: "asked", textContent: each.question, dir: "auto" }),
    make("li", { className: "said", dir: "auto" }, each.text || "(nothing)",
         make("div", { className: "facts" }, meter("probability", Math.exp(each.logprob)))),
  ]));
}

async function send(signal) {
  const image = current, message = find("message").value.trim();
  if (!message) return;
  const request = { images: [await dataUri(image)], turns: [...image.turns, message], model: modelOf("chat") };
  const reply = await call("chat", request, onImage(image, signal));
  image.turns.push([message, reply.answer.text]);
  clearIfStill("message", message);
  if (image === current) showTurns();
}

function showTurns() {
  find("turns").replaceChildren(...current.turns.flatMap(([said, answer]) => [
    make("li", { className: "asked", textContent: said, dir: "auto" }),
    make("li", { className: "said", textContent: answer || "(nothing)", dir: "auto" }),
  ]));
}

// Search

let likeness = null;  // the data URI of an image that is searched for

function searchLike(uri) {
  likeness = uri;
  find("search-image").hidden = !uri;
  find("search-thumbnail").src = uri || "data:,";
  if (uri) { find("search-text").value = ""; find("search-form").requestSubmit(); find("search-text").focus(); }
}

async function searchIndex(signal) {
  const text = find("search-text").value.trim(), top = find("top").valueAsNumber || 24;
  if (!text && !likeness) { find("search-text").focus(); return; }
  const request = { top };
  if (text) request.text = text;
  if (likeness) request.image = likeness;
  if (text && find("rerank").checked) request.rerank = Math.max(top, 32);
  if (find("where").value.trim()) request.where = find("where").value;
  const { results } = await call("search", request, signal);
  find("search-status").textContent = results.length === 1 ? "1 image" : `${results.length} images`;
  find("results").replaceChildren(...results.map((each) => {
    const facts = [`similarity ${each.similarity.toFixed(3)}`];
    if (each.match !== null) facts.unshift(`match ${percent(each.match)}`);
    const name = make("div", { textContent: each.caption || each.key, dir: "auto" });
    return make("li", {}, shownImage(each.thumbnail, each.caption || each.key),
      make("div", { className: "body" }, name, make("div", { className: "facts", textContent: facts.join(" · ") }),
        make("small", { className: "origin", textContent: `${each.shard} / ${each.key}` }), imageActions(each.thumbnail, each.key)));
  }));
}

function shownImage(uri, alt) {
  if (!uri) return make("div", { className: "missing", textContent: "The image is no longer at its source." });
  return make("img", { src: uri, alt, loading: "lazy" });
}

function fileOf(uri, name) {
  const bytes = Uint8Array.from(atob(uri.slice(uri.indexOf(",") + 1)), (char) => char.charCodeAt(0));
  return new File([bytes], name, { type: "image/jpeg" });
}

function imageActions(uri, name) {
  const row = make("div", { className: "row" });
  if (!uri) return row;
  const look = make("button", { type: "button", className: "plain", textContent: "Look at it" });
  look.addEventListener("click", () => { openTab("look"); addImages([fileOf(uri, name)]); find("pick").focus(); });
  row.append(look);
  if (!find("tab-search").hidden) {
    const like = make("button", { type: "button", className: "plain", textContent: "Find similar" });
    like.addEventListener("click", () => { openTab("search"); searchLike(uri); });
    row.append(like);
  }
  return row;
}

// CapFilt: browsing

const THOUSANDS = new Intl.NumberFormat("en");
let run = null, nextStart = null;

function showRun() {
  const tiles = make("dl", { className: "tiles" });
  const add = (name, value) => tiles.append(make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value })));
  add("Images", THOUSANDS.format(run.num_images));
  for (const [name, { texts, kept }] of Object.entries(run.texts)) {
    add(`${name === "web" ? "Web" : "Synthetic"} texts kept`, texts ? `${THOUSANDS.format(kept)} of ${THOUSANDS.format(texts)} (${percent(kept / texts)})` : "none");
  }
  const counted = run.num_counted < run.num_shards ? ` · counted in ${run.num_counted} of ${run.num_shards} shards` : "";
  find("run").replaceChildren(tiles, make("p", { className: "quiet", textContent: `${run.source} · ${run.decision}${counted}` }));
  const shards = run.shards.slice(0, MOST_SHARDS).map((name) => make("option", { value: name, textContent: name }));
  const rest = run.shards.length - shards.length;
  if (rest) shards.push(make("option", { disabled: true, textContent: `and ${THOUSANDS.format(rest)} more` }));
  find("shard").replaceChildren(make("option", { value: "", textContent: "all" }), ...shards);
  find("label-mode").hidden = !run.can_label;
}

function imagesAddress(values) {
  return "capfilt/images?" + new URLSearchParams(Object.entries(values).filter(([, value]) => value !== "" && value !== null));
}

async function browse(signal, isMore = false) {
  const wanted = { show: find("show").value, shard: find("shard").value, text: find("browse-text").value,
                   low: find("low").value, high: find("high").value, start: isMore ? nextStart : null };
  const reply = await call(imagesAddress(wanted), null, signal);
  const cards = reply.images.map(capfiltCard);
  if (isMore) find("cards").append(...cards); else find("cards").replaceChildren(...cards);
  nextStart = reply.next;
  find("more").hidden = !nextStart;
  const count = find("cards").childElementCount;
  find("browse-status").textContent = `${count} image${count === 1 ? "" : "s"}${nextStart ? ", and there may be more" : ""}`;
  if (isMore && cards.length) cards[0].querySelector("button")?.focus();
}

function capfiltCard(image) {
  const texts = image.texts.map((text) => {
    const truth = text.is_true === null ? "" : text.is_true ? ", true" : ", not true";
    return make("div", { className: "verdict " + (text.kept ? "kept" : "dropped") },
      make("b", { textContent: `${text.source === "web" ? "Web" : "Synthetic"} text ${text.kept ? "✓ kept" : "✗ rejected"}${truth}` }),
      make("span", { textContent: text.caption || "(empty)", dir: "auto" }),
      make("small", { textContent: `itm ${text.itm.toFixed(3)} · itc ${text.itc.toFixed(2)}` }));
  });
  return make("li", {}, shownImage(image.thumbnail, image.texts[0]?.caption || image.key),
    make("div", { className: "body" }, ...texts, make("small", { className: "origin", textContent: `${image.shard} / ${image.key}` }),
      imageActions(image.thumbnail, image.key)));
}

// CapFilt: labels

const PART = 20;  // texts that are asked for together
let sample = null;

async function drawSample(signal) {
  const drawn = { num_texts: find("num-texts").valueAsNumber || 200, by: find("by").value, seed: find("seed").valueAsNumber || 0 };
  drawn.texts = new Map();
  const { first_open: open } = await fetchTexts(drawn, 0, signal);
  if (!drawn.count) throw new CallError("This run has no texts yet.");
  const number = open ?? drawn.count - 1;  // go on where it was left
  await asked(drawn, number, signal);
  sample = drawn;
  find("asking").hidden = false;
  find("calibrate").textContent = `${run.calibrate} ${sample.file}`;
  await showAsked(number);
  find("yes").focus();
}

async function fetchTexts(of, start, signal) {
  const { num_texts, by, seed } = of;
  const reply = await call("capfilt/labels?" + new URLSearchParams({ num_texts, by, seed, start, limit: PART }), null, signal);
  for (const text of reply.texts) of.texts.set(text.number, text);
  Object.assign(of, { count: reply.num_texts, answered: reply.num_answered, file: reply.file });
  return reply;
}

async function asked(of, number, signal) {
  if (!of.texts.has(number)) await fetchTexts(of, number - number % PART, signal);
  return of.texts.get(number);
}

async function showAsked(number) {
  if (number < 0 || number >= sample.count) return;
  const shown = sample;
  shown.wanted = number;
  const text = await asked(shown, number);
  if (sample !== shown || shown.wanted !== number) return;  // another one was asked for meanwhile
  shown.number = number;
  find("asked-image").hidden = !text.thumbnail;
  find("no-image").hidden = Boolean(text.thumbnail);
  find("asked-image").src = text.thumbnail || "data:,";
  find("asked-text").textContent = text.caption;
  for (const answer of ["yes", "no", "unsure"]) find(answer).setAttribute("aria-pressed", String(text.label === answer));
  find("place").textContent = `Text ${number + 1} of ${shown.count}, ${shown.answered} answered`;
  find("answered").max = shown.count;
  find("answered").value = shown.answered;
  if (number + 1 < shown.count) asked(shown, number + 1).catch(() => {});  // is there when it is wanted
}

let storing = Promise.resolve();  // answers arrive in the order in which they were given

async function giveLabel(label) {
  const labelled = sample, { number, num_texts, by, seed } = labelled;
  const text = labelled.texts.get(number), before = text.label;
  const given = before === label ? "" : label;  // the same once more takes it back
  const change = (answer) => {
    labelled.answered += Boolean(answer) - Boolean(text.label);
    text.label = answer;
  };
  change(given);
  const sent = storing.then(() => call("capfilt/labels", { num_texts, by, seed, labels: [{ number, label: given }] }));
  storing = sent.catch(() => {});
  await showAsked(given ? Math.min(number + 1, labelled.count - 1) : number);
  try {
    await sent;
  } catch (error) {
    change(before);
    if (sample === labelled) await showAsked(number);
    throw error;
  }
}

function setMode(isLabel) {
  find("browse").hidden = isLabel;
  find("label").hidden = !isLabel;
  find("browse-mode").setAttribute("aria-pressed", String(!isLabel));
  find("label-mode").setAttribute("aria-pressed", String(isLabel));
  if (isLabel && !sample) during("sample-form", drawSample);
}

// Tabs

const tabs = [...document.querySelectorAll("[role=tab]")];

function openTab(name) {
  for (const tab of tabs) {
    const isOpen = tab.id === "tab-" + name;
    tab.setAttribute("aria-selected", String(isOpen));
    tab.tabIndex = isOpen ? 0 : -1;
    find(tab.getAttribute("aria-controls")).hidden = !isOpen;
  }
  if (name === "capfilt" && !find("cards").childElementCount) during("browse-form", browse);
  history.replaceState(null, "", name === "look" ? location.pathname + location.search : "#" + name);
}

function connect() {
  for (const tab of tabs) tab.addEventListener("click", () => openTab(tab.getAttribute("aria-controls")));
  find("tabs").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const shown = tabs.filter((tab) => !tab.hidden);
    const next = shown[(shown.indexOf(document.activeElement) + step + shown.length) % shown.length];
    openTab(next.getAttribute("aria-controls"));
    next.focus();
  });
  find("pick").addEventListener("click", () => find("files").click());
  find("files").addEventListener("change", (event) => { addImages(event.target.files); event.target.value = ""; });
  find("remove").addEventListener("click", removeCurrent);
  const filesOf = (transfer) => [...(transfer?.files || [])];
  document.addEventListener("dragover", (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;  // text is dropped where the browser drops it
    event.preventDefault();
    document.body.classList.add("dragging");
  });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dragging"); });
  document.addEventListener("drop", (event) => {
    document.body.classList.remove("dragging");
    const files = filesOf(event.dataTransfer);
    if (files.length) { event.preventDefault(); openTab("look"); addImages(files); }
  });
  document.addEventListener("paste", (event) => {
    const files = filesOf(event.clipboardData);
    const isText = event.target.matches?.("input, textarea") && event.clipboardData.types.includes("text/plain");
    if (files.length && !isText) { event.preventDefault(); openTab("look"); addImages(files); }
  });
  onSubmit("caption-form", () => writeCaptions(current));
  onSubmit("match-form", compare);
  onSubmit("answer-form", ask);
  onSubmit("chat-form", send);
  find("restart").addEventListener("click", () => { current.turns = []; showTurns(); find("message").focus(); });
  onSubmit("search-form", searchIndex);
  find("clear-image").addEventListener("click", () => { searchLike(null); find("search-text").focus(); });
  onSubmit("browse-form", browse);
  find("more").addEventListener("click", () => during("browse-form", (signal) => browse(signal, true)));
  find("browse-mode").addEventListener("click", () => setMode(false));
  find("label-mode").addEventListener("click", () => setMode(true));
  onSubmit("sample-form", drawSample);
  const keys = { y: "yes", n: "no", u: "unsure", arrowleft: "back", arrowright: "forward" };
  for (const answer of ["yes", "no", "unsure"]) find(answer).addEventListener("click", () => attempt(() => giveLabel(answer)));
  find("back").addEventListener("click", () => attempt(() => showAsked(sample.number - 1)));
  find("forward").addEventListener("click", () => attempt(() => showAsked(sample.number + 1)));
  document.addEventListener("keydown", (event) => {
    const id = keys[event.key?.toLowerCase()];
    if (!id || find("asking").offsetParent === null || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.repeat && !["back", "forward"].includes(id)) return;  // a key that is held down is one answer
    if (event.target.matches("input, select, textarea, [role=tab]")) return;
    event.preventDefault();
    find(id).click();
  });
  find("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem("openblip-key", find("key").value);
    find("key-form").hidden = true;
    during("main", begin);
  });
}

async function begin() {
  await knowModels();
  captionRest();
  try {
    run = await call("capfilt");
    find("tab-capfilt").hidden = false;
    showRun();
    await showExamples();
  } catch (error) {
    if (error.status !== 404) throw error;  // the server was started without a run
  }
  const name = location.hash.slice(1);
  if (tabs.some((tab) => tab.id === "tab-" + name && !tab.hidden)) openTab(name);
}

async function showExamples() {
  const reply = await call(imagesAddress({ show: "kept", limit: 8 }));
  const examples = reply.images.filter((image) => image.thumbnail).map((image) => {
    const preview = make("img", { src: image.thumbnail, alt: image.texts[0]?.caption || image.key });
    const button = make("button", { type: "button", title: image.key }, preview);
    button.addEventListener("click", () => addImages([fileOf(image.thumbnail, image.key)]));
    return button;
  });
  find("example-strip").replaceChildren(...examples);
  find("examples").hidden = !examples.length || images.length > 0;
}

connect();
during("main", begin);
