const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

// Texts of models and corpora are only ever set as text: nothing of them is taken for HTML.
function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

// The text with `marks` in it: [[start, end, class or nothing], ...], in characters, in order.
function marked(text, marks) {
  const points = Array.from(text), made = element("p", undefined, text.length > 900 ? "text long" : "text");
  if (text.length > 900) made.tabIndex = 0;  // so that the keyboard can scroll it
  let at = 0;
  for (const [start, end, kind] of marks) {
    made.append(points.slice(at, start).join(""), element("mark", points.slice(start, end).join(""), kind));
    at = end;
  }
  made.append(points.slice(at).join(""));
  return made;
}

function bar(name, share, value) {
  const made = element("div", undefined, "bar"), pair = element("div"), svg = document.createElementNS(SVG, "svg");
  const filled = document.createElementNS(SVG, "rect");
  pair.append(element("dt", name), element("dd", value));
  svg.setAttribute("viewBox", "0 0 100 7");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  filled.setAttribute("width", Math.max(0, Math.min(1, share)) * 100);
  filled.setAttribute("height", 7);
  filled.classList.add(name);
  svg.append(filled);
  made.append(pair, svg);
  return made;
}

// A passage with `title`, `section`, `id`, `text`, `marks`, `score` and `judgement`; the scores are between these two.
function card(passage, lowest, highest) {
  const item = element("li"), source = element("p", "", "source"), bars = element("dl", undefined, "bars");
  const section = passage.section, ending = section ? ": " + section : "";
  const titled = ending && passage.title.endsWith(ending) ? passage.title.slice(0, -ending.length) : passage.title;
  source.append(titled || "(no title)", element("span", [section, passage.id].filter((part) => part).join(" · ")));
  if (typeof passage.score === "number") {
    // Scores have no fixed range: the best passage has the longest bar.
    const share = lowest > 0 ? passage.score / highest : (passage.score - lowest) / (highest - lowest || 1);
    bars.append(bar("score", share, passage.score.toFixed(2)));
  }
  if (typeof passage.judgement === "number") {
    bars.append(bar("judgement", passage.judgement, Math.round(100 * passage.judgement) + " %"));
  }
  item.append(source, marked(passage.text || "", passage.marks), bars);
  if (typeof passage.attention === "number") bars.title = "attention " + Math.round(100 * passage.attention) + " %";
  return item;
}
