
"use strict";
{{look.js}}
const ROW = 58, MARGIN = 8, KEPT = 60;  // pixels of a row; rows drawn beyond the edges; unpacked pieces in memory
const head = JSON.parse($("head").textContent);
const RIGHT = 0;  // the kind that is no mistake
const [QUESTION, ANSWERS, GIVEN, IS_RIGHT, BEFORE, WAS_RIGHT, KIND, RANK] = [0, 1, 2, 3, 4, 5, 6, 7];
const state = {file: 0, questions: [], words: [], shown: [], rows: new Map(), selected: -1, filter: null, asked: 0};

// Packed values: pieces of base64, each a compressed list. Those in the second file are loaded when they are needed.
const texts = new Map(), unpacked = new Map();
let second = null;

function packed(key, name, text) {  // the second file calls this
  if (key === head.key) texts.set(name, text.trim().split(" "));
}
window.packed = packed;

function loadSecond() {
  second ??= new Promise((resolve, reject) => {
    const script = element("script");
    script.src = head.second;
    script.onload = resolve;
    script.onerror = () => reject(new Error(`${head.second} is not beside this file: it has what did not fit in here`));
    document.head.append(script);
  });
  return second;
}

async function pieces(name) {
  if (!texts.has(name) && $(name)) {
    texts.set(name, $(name).textContent.trim().split(" "));
    $(name).remove();
  }
  if (!texts.has(name)) await loadSecond();
  if (!texts.has(name)) throw new Error(`${head.second} is of another report: run python -m atlas.report again`);
  return texts.get(name);
}

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

async function all(name) {
  if (!head.starts[name].length) return [];
  return (await Promise.all((await pieces(name)).map(unpack))).flat();
}

async function valueAt(name, index) {
  const starts = head.starts[name];
  let low = 0, high = starts.length - 1;  // the last piece that starts at the index or before
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (starts[middle] <= index) low = middle; else high = middle - 1;
  }
  const key = name + " " + low;
  if (!unpacked.has(key)) unpacked.set(key, unpack((await pieces(name))[low]));
  else unpacked.set(key, ((piece) => { unpacked.delete(key); return piece; })(unpacked.get(key)));  // used last
  if (unpacked.size > KEPT) unpacked.delete(unpacked.keys().next().value);
  return (await unpacked.get(key))[index - starts[low]];
}

// Which questions to show. Each filter: its name, and whether a question belongs to it.
function filters() {
  const {read, before} = head.files[state.file], [right, wrong] = read ? ["right", "wrong"] : ["found", "not found"];
  const both = (was, is) => (q) => q[WAS_RIGHT] === was && q[IS_RIGHT] === is;
  const made = [["all", () => true], [right, (q) => q[IS_RIGHT] === true], [wrong, (q) => q[IS_RIGHT] === false]];
  if (head.beside) {
    made.push([`won: ${head.name} alone`, both(false, true)], [`lost: ${head.beside} alone`, both(true, false)]);
    made.push([`both ${right}`, both(true, true)], [`both ${wrong}`, both(false, false)]);
  } else if (before) {
    made.push([`${right} since ${before}`, both(false, true)], [`no longer ${right}`, both(true, false)]);
  }
  head.kinds.forEach((name, kind) => { if (kind !== RIGHT) made.push([name, (q) => q[KIND] === kind, kind]); });
  const counted = made.map(([name, belongs, kind]) => ({name, belongs, kind, n: state.questions.filter(belongs).length}));
  // A kind that has the same questions as `wrong` says nothing new.
  return counted.filter(({n, name, kind}) => name === "all" || (n && !(kind !== undefined && name === wrong)));
}

function makeFilters() {
  const made = filters();
  $("filters").replaceChildren($("filters").firstElementChild, ...made.map((filter, i) => {
    const label = element("label"), radio = element("input");
    Object.assign(radio, {type: "radio", name: "filter", checked: i === 0});
    if (filter.kind !== undefined) radio.dataset.kind = filter.kind;
    radio.addEventListener("change", () => { state.filter = filter; show(); });
    label.append(radio, element("span", `${filter.name} (${filter.n.toLocaleString("en")})`));
    return label;
  }));
  $("filters").hidden = made.length < 2;
  state.filter = made[0];
}

async function openFile(number) {
  const file = head.files[number];
  state.questions = await all("listed-" + number);
  state.file = number;
  state.words = state.questions.map((q) => [q[QUESTION], q[ANSWERS], q[GIVEN]].join("\n").toLowerCase());
  $("file").value = number;
  $("of-step").textContent = (head.files.length > 1 ? file.file + ", " : "") + "step " + file.step;
  makeFilters();
  show();
}

function show() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter((word) => word), {belongs} = state.filter;
  state.shown = [];
  state.questions.forEach((question, i) => {
    if (belongs(question) && words.every((word) => state.words[i].includes(word))) state.shown.push(i);
  });
  $("found").textContent = `${state.shown.length.toLocaleString("en")} of ${state.questions.length.toLocaleString("en")} questions`;
  $("rows").style.height = state.shown.length * ROW + "px";
  $("list").scrollTop = 0;
  $("list").removeAttribute("aria-activedescendant");
  $("rows").replaceChildren();
  state.rows.clear();
  state.selected = -1;
  draw();
}

function signOf(question) {
  if (question[IS_RIGHT] === null) return ["·", ""];
  return question[IS_RIGHT] ? ["✓", "right"] : ["✗", "wrong"];
}

function row(place) {
  const question = state.questions[state.shown[place]], [sign, style] = signOf(question);
  const made = element("div", undefined, "row " + style);
  const answer = question[ANSWERS] || "(no expected answer)";
  const given = question[GIVEN] === null ? "" : question[GIVEN] || "(empty)";
  made.append(element("div", question[QUESTION]));
  made.append(element("div", !given || question[IS_RIGHT] ? given || answer : `${given} → ${answer}`));
  made.dataset.sign = sign;
  made.dataset.place = place;
  made.id = "row-" + place;
  made.style.top = place * ROW + "px";
  made.setAttribute("role", "option");
  made.setAttribute("aria-setsize", state.shown.length);
  made.setAttribute("aria-posinset", place + 1);
  made.setAttribute("aria-selected", place === state.selected);
  return made;
}

// Only the rows that are seen are there; those that stay seen stay there.
function draw() {
  const list = $("list"), first = Math.max(0, Math.floor(list.scrollTop / ROW) - MARGIN);
  const end = Math.min(state.shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + MARGIN);
  for (const [place, made] of state.rows) {
    if (place < first || place >= end) { made.remove(); state.rows.delete(place); }
  }
  for (let place = first; place < end; place++) {
    if (!state.rows.has(place)) state.rows.set(place, $("rows").appendChild(row(place)));
  }
}

function mark(place, chosen) {
  if (state.rows.has(place)) state.rows.get(place).setAttribute("aria-selected", chosen);
}

function select(place, goes) {
  if (!state.shown.length) return;
  mark(state.selected, false);
  state.selected = Math.max(0, Math.min(place, state.shown.length - 1));
  const list = $("list"), top = state.selected * ROW;
  if (top < list.scrollTop) list.scrollTop = top;
  if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
  draw();
  mark(state.selected, true);
  list.setAttribute("aria-activedescendant", "row-" + state.selected);
  detail(state.shown[state.selected]).then((drawn) => {
    if (drawn && goes && matchMedia("(max-width: 860px)").matches) $("detail").scrollIntoView({block: "start"});
  }).catch(complain);
}

// Where an answer is in a text, or else its words: `marks` of asking/answers.py, where accents may stand apart.
function places(text, answer) {
  const words = answer.match(/[\p{L}\p{N}\p{M}_]+/gu) || [];
  const escaped = (word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  const found = (pattern) => {
    const whole = new RegExp(`(?<![\\p{L}\\p{N}\\p{M}_])(?:${pattern})(?![\\p{L}\\p{N}\\p{M}_])`, "giu");
    return [...text.matchAll(whole)].map((match) => [match.index, match.index + match[0].length]);
  };
  if (!words.length) return [];
  const whole = found(words.map(escaped).join("[^\\p{L}\\p{N}\\p{M}_]+"));
  const long = words.filter((word) => word.length >= 3 || /^\d+$/.test(word)).map(escaped);
  return whole.length || !long.length ? whole : found(long.join("|"));
}

// The places of the expected answers, and apart from them those of another answer that was given.
function marksOf(text, answers, given) {
  const expected = answers.flatMap((answer) => places(text, answer));
  const wrong = places(text, given || "").map((place) => [...place, "given"]);
  const apart = [];
  for (const mark of [...expected, ...wrong]) {
    if (!apart.some(([start, end]) => mark[0] < end && start < mark[1])) apart.push(mark);
  }
  apart.sort((a, b) => a[0] - b[0]);
  // `marked` counts characters, and JavaScript's texts have two units for some.
  const count = (unit) => Array.from(text.slice(0, unit)).length;
  return apart.map(([start, end, kind]) => [count(start), count(end), kind]);
}

async function cards(found, leftOut, title, answers, given) {
  const made = element("ol", undefined, "passages");
  const passages = await Promise.all(found.map(async ([index, score, judgement]) => {
    const [id, title, section, text] = await valueAt("passages", index);
    return {id, title, section, text, score, judgement, marks: marksOf(text, answers, given)};
  }));
  const scores = passages.map((passage) => passage.score);
  made.append(...passages.map((passage) => card(passage, Math.min(...scores), Math.max(...scores))));
  const heading = element("h4", title + " "), kinds = passages.flatMap((passage) => passage.marks.map((mark) => mark[2]));
  if (kinds.includes(undefined)) heading.append(element("mark", "expected"), " ");
  if (kinds.includes("given")) heading.append(element("mark", "given", "given"));
  const parts = [heading, made];
  if (leftOut) parts.push(element("p", `${leftOut} more passages are left out here; the result file has them.`, "quiet"));
  return parts;
}

function verdict(text, right) {
  return element("b", text || "(empty)", right === null ? "" : right ? "right" : "wrong");
}

async function detail(number) {
  const asked = ++state.asked, file = head.files[state.file], question = state.questions[number];
  const found = await valueAt("details-" + state.file, number);
  const facts = element("dl", undefined, "facts");
  const fact = (name, ...values) => { const dd = element("dd"); dd.append(...values); facts.append(element("dt", name), dd); };
  const given = found.generation ?? question[GIVEN];
  if (given !== null) fact(head.beside ? head.name : "answer", verdict(given, question[IS_RIGHT]));
  const before = found.before;
  if (before !== undefined && (head.beside || before !== given)) fact(head.beside || "at " + file.before, verdict(before, question[WAS_RIGHT]));
  if (found.answers.length) fact("expected", found.answers.join(" / "));
  if (question[KIND] !== null && question[KIND] !== RIGHT) fact("mistake", head.kinds[question[KIND]]);
  if (question[RANK] !== null) fact("found", question[RANK] ? `the answer is in passage ${question[RANK]}` : "in no passage");
  if (found.choices) fact("options", Object.entries(found.choices).map(([letter, p]) => `${letter} ${Math.round(100 * p)} %`).join(" · "));
  const back = element("button", "Back to the list", "back");
  back.type = "button";
  back.addEventListener("click", () => { $("list").scrollIntoView({block: "center"}); $("list").focus({preventScroll: true}); });
  const parts = [back, element("h3", found.query ?? question[QUESTION]), facts];
  const named = (name) => head.beside ? `Passages of ${name}` : "Passages";
  const wrong = (text, right) => right ? null : text;
  for (const [when, name, text] of [["", head.name, wrong(given, question[IS_RIGHT])], [" before", head.beside, wrong(before, question[WAS_RIGHT])]]) {
    const passages = found["passages" + when];
    if (passages) parts.push(...await cards(passages, found["left out" + when], named(name), found.answers, text));
  }
  if (asked !== state.asked) return false;  // another question was chosen meanwhile
  $("detail").replaceChildren(...parts);
  return true;
}

function complain(error) {
  $("error").textContent = error.message;
  $("error").hidden = false;
}

async function start() {
  if (!head.files.length) return;
  if (typeof DecompressionStream === "undefined") {
    throw new Error("This browser cannot unpack the questions (it has no DecompressionStream): use one of 2023 or later.");
  }
  $("tools").hidden = false;
  head.files.forEach((file, i) => { const made = element("option", `${file.file} (${file.n.toLocaleString("en")})`); made.value = i; $("file").append(made); });
  $("file").hidden = head.files.length < 2;
  await openFile(0);
  let waits = false;
  const soon = () => { if (!waits) { waits = true; requestAnimationFrame(() => { waits = false; draw(); }); } };
  $("list").addEventListener("scroll", soon, {passive: true});
  $("list").addEventListener("click", (event) => {
    const chosen = event.target.closest(".row");
    if (chosen) select(Number(chosen.dataset.place), true);
  });
  window.addEventListener("resize", soon);
  $("file").addEventListener("change", () => openFile(Number($("file").value)).catch(complain));
  $("search").addEventListener("input", show);
  $("search").addEventListener("keydown", (event) => { if (event.key === "ArrowDown") { event.preventDefault(); $("list").focus(); select(0); } });
  $("list").addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor($("list").clientHeight / ROW) - 1), at = state.selected;
    const to = {ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + page, PageUp: at - page, Home: 0, End: state.shown.length}[event.key];
    if (to !== undefined) { event.preventDefault(); select(to); }
    if (event.key === "Enter" && at >= 0) { $("detail").focus(); $("detail").scrollIntoView({block: "nearest"}); }
  });
  for (const button of document.querySelectorAll(".kinds button")) {
    button.addEventListener("click", async () => {
      await openFile(head.files.findIndex(({file}) => file === button.dataset.file));
      const radio = document.querySelector(`#filters input[data-kind="${button.dataset.kind}"]`) || document.querySelectorAll("#filters input")[1];
      radio.click();
      $("questions").scrollIntoView();
    });
  }
}

start().catch(complain);
