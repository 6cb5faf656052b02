"use strict";
// Charts as SVG, drawn to their place's width: lines, bars and dots, with ticks, a legend and what is under the pointer.
const SVG = "http://www.w3.org/2000/svg";
const COLOURS = 8, DASHES = ["", "7 4", "2 3", "9 3 2 3"];

function draw(tag, attributes, parent, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  parent?.append(node);
  return node;
}

// Round numbers from low to high, about `count` of them.
function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((m) => m * power >= 0.7 * rough) * power;
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

function short(x) {
  if (x === null || x === undefined) return "";
  const size = Math.abs(x);
  if (size >= 1e5 && Number.isInteger(x)) return x.toLocaleString("en");
  const text = size !== 0 && (size < 1e-4 || size >= 1e6) ? x.toExponential(2) : String(Number(x.toPrecision(4)));
  return text.replace("-", "\u2212");
}

function limits(values, withZero) {
  let low = withZero ? 0 : Infinity, high = withZero ? 0 : -Infinity;
  for (const v of values) if (v !== null) { low = Math.min(low, v); high = Math.max(high, v); }
  if (!(low < high)) { const c = Number.isFinite(low) ? low : 0; low = c - (Math.abs(c) || 1) / 2; high = c + (Math.abs(c) || 1) / 2; }
  return [low, high];
}

function legend(series) {
  const list = document.createElement("ul");
  list.className = "key";
  series.forEach((s, i) => {
    const item = document.createElement("li");
    const swatch = draw("svg", { width: 26, height: 10, "aria-hidden": "true" }, item);
    draw("line", { x1: 1, x2: 25, y1: 5, y2: 5, class: "line c" + colour(s, i), "stroke-dasharray": dash(s, i) }, swatch);
    item.append(s.name);
    list.append(item);
  });
  return list;
}

const colour = (s, i) => s.colour ?? i % COLOURS;
const dash = (s, i) => DASHES[(s.dash ?? i) % DASHES.length];

function chart(place, spec, label) {
  const width = Math.max(240, place.clientWidth), height = width < 500 ? 240 : 300;
  const xs = spec.series.flatMap((s) => s.x), ys = spec.series.flatMap((s) => s.y);
  let [x0, x1] = limits(xs, false);
  if (spec.kind === "bars") { const half = (x1 - x0) / Math.max(1, xs.length - 1) / 2; x0 -= half; x1 += half; }
  const [low, high] = limits(ys, spec.kind !== "dots");
  const pad = (high - low) * 0.04, y0 = spec.kind === "bars" ? 0 : low - pad, y1 = high + pad;
  const yTicks = ticks(y0, y1, 5), longest = Math.max(...yTicks.map((t) => short(t).length));
  const left = 14 + 7.5 * longest, right = 12, top = 8, bottom = 40;
  const X = (v) => left + (v - x0) / (x1 - x0) * (width - left - right), Y = (v) => height - bottom - (v - y0) / (y1 - y0) * (height - top - bottom);
  const svg = draw("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  for (const t of yTicks) {
    draw("line", { x1: left, x2: width - right, y1: Y(t), y2: Y(t), class: t === 0 ? "zero" : "grid" }, svg);
    draw("text", { x: left - 6, y: Y(t) + 4, "text-anchor": "end" }, svg, short(t));
  }
  for (const t of ticks(x0, x1, width < 500 ? 4 : 8)) draw("text", { x: X(t), y: height - bottom + 17, "text-anchor": "middle" }, svg, short(t));
  draw("text", { x: (left + width - right) / 2, y: height - 5, "text-anchor": "middle", class: "axis" }, svg, spec.x);
  const marks = [];
  const slot = (width - left - right) / Math.max(1, spec.series[0].x.length);
  spec.series.forEach((s, i) => {
    const mark = draw("g", { class: spec.kind + " c" + colour(s, i) }, svg);
    if (spec.kind === "lines") {
      const path = s.x.map((v, j) => (j ? "L" : "M") + X(v).toFixed(1) + " " + Y(s.y[j]).toFixed(1)).join("");
      draw("path", { d: path, class: "line", "stroke-dasharray": dash(s, i) }, mark);
    }
    s.x.forEach((v, j) => {
      if (spec.kind === "bars") draw("rect", { x: X(v) - slot * 0.45, width: slot * 0.9, y: Y(s.y[j]), height: Y(0) - Y(s.y[j]) }, mark);
      if (spec.kind === "dots") draw("circle", { cx: X(v), cy: Y(s.y[j]), r: 2.5 }, mark);
    });
    marks.push(mark);
  });
  const dot = draw("circle", { r: 4, class: "at", visibility: "hidden" }, svg);
  svg.onpointermove = (event) => {
    const box = svg.getBoundingClientRect(), px = event.clientX - box.left, py = event.clientY - box.top;
    let best = null, distance = Infinity;
    spec.series.forEach((s, i) => s.x.forEach((v, j) => {
      const d = spec.kind === "bars" ? Math.abs(X(v) - px) : Math.hypot(X(v) - px, Y(s.y[j]) - py);
      if (d < distance) { distance = d; best = [s, i, j]; }
    }));
    if (!best) return;
    const [s, i, j] = best;
    marks.forEach((m, k) => m.classList.toggle("dim", k !== i));
    for (const [name, value] of [["cx", X(s.x[j])], ["cy", Y(s.y[j])], ["visibility", "visible"]]) dot.setAttribute(name, value);
    const named = spec.series.length > 1 ? s.name + "\n" : "";
    tip(`${named}${spec.x}: ${short(s.x[j])}\n${spec.kind === "bars" ? s.name : spec.y}: ${short(s.y[j])}`, event);
  };
  svg.onpointerleave = () => { tip(null); dot.setAttribute("visibility", "hidden"); marks.forEach((m) => m.classList.remove("dim")); };
  const axis = document.createElement("p");
  axis.className = "axis";
  axis.textContent = spec.y;
  place.replaceChildren(axis, ...(spec.series.length > 1 ? [legend(spec.series)] : []), svg);
}

function tip(text, event) {
  const node = document.getElementById("tip");
  node.hidden = text === null;
  if (text === null) return;
  node.textContent = text;
  node.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - node.offsetWidth - 8)) + "px";
  node.style.top = Math.max(4, event.clientY - node.offsetHeight - 12) + "px";
}
