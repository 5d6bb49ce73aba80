"use strict";
// Everything shown comes from the JSON in the page. What a model says is set as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const texts = new Map(Object.entries(JSON.parse(document.getElementById("texts").textContent)));
const own = data.halting;
const limitName = data.exits.limit;
const at = id => document.getElementById(id);
const COLOURS = ["#3366cc", "#e0612c", "#1a9e77", "#a03ac9", "#c99a00", "#d6336c", "#0a8fb5", "#6b7280"];
const RAMP = [[239, 243, 251], [150, 189, 233], [52, 112, 196], [18, 43, 107]];
const LABELS = { confidence: "confidence q" };
const NAMES = { probability: "probability" };
for (const name of data.values) NAMES[name] = LABELS[name] || name.replaceAll("_", " ");
Object.assign(NAMES, { distance_to_last: "distance to the last", kl_to_last: "KL to the last" });
const CHARTS = [["gate", "gate_mean"], ["step", "step_length"], ["rest", "distance_to_last"]]
  .filter(([id]) => document.getElementById(id));
let trace, rule, left, followed;

// --- The exit rule: compares a number, the same for any knobs, with its limit, in float32 ---

const f32 = Math.fround;
const value = (depth, name) => depth[name] === null ? NaN : f32(depth[name]);
const COMPARISONS = { ">": (a, b) => a > b, ">=": (a, b) => a >= b, "<": (a, b) => a < b };
const holds = COMPARISONS[data.exits.comparison], checked = new Set(data.exits.checked);

function exits(tokens, rule) {
  const limit = f32(rule[limitName]);
  return tokens.map(token => {
    let heldBack = false;
    for (const here of token.depths) {
      const depth = here.depth;
      const satisfied = checked.has(depth) && holds(value(here, "compared"), limit);
      if (satisfied && depth >= rule.min_loops || depth >= rule.max_loops) {
        const why = !satisfied ? "budget" : heldBack ? "min_loops" : rule.strategy;
        return { depth, why };
      }
      heldBack = (heldBack || satisfied) && !(depth >= rule.min_loops && checked.has(depth));
    }
  });
}

// --- Small helpers ---

function element(name, parent, attributes = {}, text) {
  const svg = parent && parent.namespaceURI === "http://www.w3.org/2000/svg";
  const made = svg ? document.createElementNS(parent.namespaceURI, name) : document.createElement(name);
  for (const [key, to] of Object.entries(attributes)) made.setAttribute(key, to);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}
const shown = text => texts.has(text) ? texts.get(text) : text;
const short = (number, digits = 3) => number === null ? "not finite"
  : number !== 0 && Math.abs(number) < 1e-3 ? number.toExponential(1) : String(Number(number.toPrecision(digits)));
const percent = share => share === null ? "?" : share > 0 && share < 0.001 ? "<0.1%" : (100 * share).toFixed(1) + "%";

function shade(share) {
  const scaled = Math.min(1, Math.max(0, share || 0)) * (RAMP.length - 1);
  const low = Math.min(RAMP.length - 2, Math.floor(scaled)), part = scaled - low;
  return RAMP[low].map((from, i) => Math.round(from + part * (RAMP[low + 1][i] - from)));
}

// What colours a cell: the most probable token's probability, or a value at that depth.
function colourOf(depth, name) {
  return name === "probability" ? depth.top[0].probability : depth[name];
}

function colourLimit(name) {
  if (name === "probability" || name === "confidence") return 1;
  const all = trace.tokens.flatMap(token => token.depths.map(depth => depth[name] || 0));
  return Math.max(...all) || 1;
}

// --- The grid ---

function buildGrid() {
  const grid = at("grid");
  grid.replaceChildren();
  const head = element("tr", element("thead", grid));
  element("th", head, {}, "");
  trace.tokens.forEach((token, index) => {
    const cell = element("th", head, { "data-token": index, scope: "col" }, shown(token.text));
    element("small", cell, {}, index);
    cell.addEventListener("click", () => follow(index));
  });
  const body = element("tbody", grid);
  for (let row = 0; row < own.max_loops; row++) {
    const line = element("tr", body);
    element("th", line, { scope: "row" }, row + 1);
    trace.tokens.forEach((token, index) => {
      const best = token.depths[row].top[0];
      const cell = element("td", line, { "data-token": index, "data-depth": row + 1, tabindex: 0 }, shown(best.text));
      element("small", cell);
      cell.addEventListener("mouseenter", () => showTip(cell, token, row));
      cell.addEventListener("focus", () => showTip(cell, token, row));
      cell.addEventListener("mouseleave", hideTip);
      cell.addEventListener("blur", hideTip);
      cell.addEventListener("click", () => follow(index));
    });
  }
  paint();
}

const cells = () => at("grid").querySelectorAll("td");

function paint() {
  const name = at("colour").value, limit = colourLimit(name);
  for (const cell of cells()) {
    const depth = trace.tokens[cell.dataset.token].depths[cell.dataset.depth - 1];
    const number = colourOf(depth, name);
    const [r, g, b] = shade(number / limit);
    cell.style.background = `rgb(${r}, ${g}, ${b})`;
    cell.style.color = 0.3 * r + 0.6 * g + 0.1 * b < 140 ? "#fff" : "";
    cell.querySelector("small").textContent = limit === 1 ? percent(number) : short(number);
  }
  const ramp = at("ramp");
  ramp.replaceChildren();
  element("span", ramp, {}, `${name === "probability" ? "probability of the cell's token" : NAMES[name]}: 0`);
  element("i", ramp).style.background = `linear-gradient(90deg, ${RAMP.map(c => `rgb(${c})`).join(", ")})`;
  element("span", ramp, {}, short(limit));
}

function markExits() {
  left = exits(trace.tokens, rule);
  for (const cell of cells()) {
    const token = trace.tokens[cell.dataset.token], depth = Number(cell.dataset.depth);
    const here = left[cell.dataset.token].depth;
    cell.classList.toggle("exit", depth === here);
    cell.classList.toggle("after", depth > here);
    cell.classList.toggle("differs", depth === here && token.depths[depth - 1].top[0].token_id !== token.token_id);
  }
  const mean = left.reduce((sum, one) => sum + one.depth, 0) / left.length;
  at("mean").textContent = mean.toFixed(2);
  at("saved").textContent = percent(1 - mean / own.max_loops);
  const answer = at("answer");
  answer.replaceChildren();
  trace.tokens.forEach((token, index) => {
    const piece = element("span", answer, { title: `exited at depth ${left[index].depth}` }, token.shown);
    piece.style.background = `rgba(240, 83, 28, ${0.06 + 0.4 * left[index].depth / own.max_loops})`;
  });
  drawCharts();
}

// --- The tooltip ---

function showTip(cell, token, row) {
  const depth = token.depths[row], tip = at("tip"), exit = left[cell.dataset.token];
  tip.replaceChildren();
  element("h3", tip, {}, `token ${cell.dataset.token}, depth ${depth.depth}`);
  for (const guess of depth.top) {
    const line = element("div", tip, { class: "guess" });
    line.classList.toggle("came", guess.token_id === token.token_id);
    element("span", line, {}, shown(guess.text));
    element("i", line).style.width = `${100 * (guess.probability || 0)}%`;
    element("b", line, {}, percent(guess.probability));
  }
  const list = element("dl", tip);
  for (const [name, label] of Object.entries(NAMES)) {
    element("dt", list, {}, name === "probability" ? "of the answer's token" : label);
    element("dd", list, {}, name === "probability" ? percent(depth[name]) : short(depth[name], 4));
  }
  if (exit.depth === depth.depth) {
    element("dt", list, {}, "exits here by");
    element("dd", list, {}, exit.why);
  }
  tip.hidden = false;
  const box = cell.getBoundingClientRect(), size = tip.getBoundingClientRect();
  const x = Math.min(box.right + 10, innerWidth - size.width - 10);
  tip.style.left = `${x < box.right ? Math.max(10, box.left - size.width - 10) : x}px`;
  tip.style.top = `${Math.max(10, Math.min(box.top, innerHeight - size.height - 10))}px`;
}

function hideTip() { at("tip").hidden = true; }

// --- Charts of the tokens followed ---

function follow(index) {
  followed.has(index) ? followed.delete(index) : followed.add(index);
  drawCharts();
}

const colourFor = index => COLOURS[[...followed].indexOf(index) % COLOURS.length];

function frame(svg, xs, ys, integers, zero) {
  svg.replaceChildren();
  const finite = list => list.filter(Number.isFinite);
  const [x, y] = [finite(xs), finite(ys)];
  const box = { x0: 46, x1: 410, y0: 270, y1: 10 };
  const span = list => list.length ? [Math.min(...list), Math.max(...list)] : [0, 1];
  let [left, right] = span(x), [low, high] = span(y);
  if (zero) low = 0;
  const pad = zero ? 0 : 0.06 * (high - low || 1), side = integers ? 0 : 0.06 * (right - left || 1);
  [left, right, low, high] = [left - side, right + side || 1, low - pad, high + (zero ? 0.05 * (high || 1) : pad)];
  const px = v => box.x0 + (v - left) / (right - left || 1) * (box.x1 - box.x0);
  const py = v => box.y0 - (v - low) / (high - low || 1) * (box.y0 - box.y1);
  for (let i = 0; i <= 4; i++) {
    const v = low + i * (high - low) / 4;
    element("line", svg, { class: "axis", x1: box.x0, x2: box.x1, y1: py(v), y2: py(v) });
    element("text", svg, { x: box.x0 - 6, y: py(v) + 4, "text-anchor": "end" }, short(v, 2));
  }
  const every = Math.ceil((right - left) / 12);
  for (let v = Math.ceil(left); integers && v <= right; v += every)
    element("text", svg, { x: px(v), y: 288, "text-anchor": "middle" }, v);
  return [px, py];
}

function star(svg, x, y, colour) {
  const points = Array.from({ length: 10 }, (_, i) => {
    const r = i % 2 ? 3.4 : 8, angle = Math.PI * (i / 5 - 0.5);
    return `${x + r * Math.cos(angle)},${y + r * Math.sin(angle)}`;
  });
  element("polygon", svg, { points: points.join(" "), fill: colour, stroke: "#fff", "stroke-width": 0.8 });
}

function drawPath(svg, points, colour, marked) {
  const finite = points.every(point => point.every(Number.isFinite));
  if (!finite) return;
  element("polyline", svg, { class: "path", points: points.join(" "), stroke: colour });
  points.forEach(([x, y]) => element("circle", svg, { cx: x, cy: y, r: 2.4, fill: colour }));
  if (marked) star(svg, ...marked, colour);
}

function drawCharts() {
  for (const cell of at("grid").querySelectorAll("thead th[data-token]"))
    cell.classList.toggle("followed", followed.has(Number(cell.dataset.token)));
  const indices = [...followed];
  for (const [id, name] of CHARTS) {
    const svg = at(id), tokens = indices.map(index => trace.tokens[index]);
    const [px, py] = frame(svg, trace.tokens[0].depths.map(d => d.depth),
      tokens.flatMap(token => token.depths.map(depth => value(depth, name))), true, true);
    indices.forEach((index, i) => {
      const points = tokens[i].depths.map(depth => [px(depth.depth), py(value(depth, name))]);
      drawPath(svg, points, colourFor(index), points[left[index].depth - 1]);
    });
  }
  const found = trace.trajectories, svg = at("pca");
  const known = found ? indices.filter(index => found.tokens.includes(index)) : [];
  const paths = known.map(index => found.points[found.tokens.indexOf(index)]);
  const [px, py] = frame(svg, paths.flat().map(p => p[0]), paths.flat().map(p => p[1]), false, false);
  known.forEach((index, i) => {
    const points = paths[i].map(([x, y]) => [px(x), py(y)]), colour = colourFor(index);
    drawPath(svg, points, colour, points[left[index].depth]);
    element("circle", svg, { cx: points[0][0], cy: points[0][1], r: 5, fill: "#fff", stroke: colour, "stroke-width": 2 });
  });
  if (found) at("pca-title").textContent =
    `states, two principal components (${found.explained.map(s => `${(100 * (s || 0)).toFixed(0)}%`).join(" and ")} of the variance)`;
  const legend = at("followed");
  legend.replaceChildren();
  for (const index of indices) {
    const item = element("span", legend);
    element("i", item).style.background = colourFor(index);
    const beyond = found && !found.tokens.includes(index) ? " (no states stored)" : "";
    item.append(`${index}: ${shown(trace.tokens[index].text)}${beyond}`);
  }
}

// --- Controls ---

function setLimit(to) {
  rule[limitName] = to;
  at("limit").value = to;
  at("limit-value").value = to;
  markExits();
}

function reset() {
  rule = { ...own };
  at("min-loops").value = rule.min_loops;
  setLimit(rule[limitName]);
}

function open(index) {
  trace = data.traces[index];
  const found = trace.trajectories;
  followed = new Set(found ? found.drawn : [0]);
  at("prompt").textContent = trace.prompt === null ? trace.prompt_token_ids.map(id => `#${id}`).join(" ") : trace.prompt;
  const most = Math.max(own[limitName], ...trace.tokens.flatMap(token => token.depths.map(d => d.compared || 0)));
  at("limit").max = limitName === "exit_threshold" && most <= 1 ? 1 : 1.05 * most;
  buildGrid();
  markExits();
}

data.traces.forEach((one, index) => {
  const label = one.prompt === null ? `#${index}` : one.prompt.slice(0, 80);
  element("option", at("trace"), { value: index }, `${index}: ${label}`);
});
at("limit-name").textContent = limitName;
at("min-loops").max = own.max_loops;
at("trace").addEventListener("change", event => open(Number(event.target.value)));
at("limit").addEventListener("input", event => setLimit(Number(event.target.value)));
at("limit-value").addEventListener("change", event => setLimit(Math.max(0, Number(event.target.value))));
at("min-loops").addEventListener("change", event => {
  const asked = Math.round(Number(event.target.value)) || 1;
  rule.min_loops = Math.min(own.max_loops, Math.max(1, asked));
  event.target.value = rule.min_loops;
  markExits();
});
at("colour").addEventListener("change", paint);
at("reset").addEventListener("click", reset);
rule = { ...own };
open(0);
reset();
