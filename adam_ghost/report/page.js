"use strict";
// Data reaches the page only as text: textContent, never markup.
const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");

function make(tag, text, name) {
  const node = document.createElement(tag);
  if (text !== undefined && text !== null) node.textContent = text;
  if (name) node.className = name;
  return node;
}

function number(x) {
  return x === null || x === undefined ? "" : Number.isInteger(x) ? String(x) : Number(x).toPrecision(4);
}

function table(columns, rows, caption, sort) {
  const made = make("table");
  made.append(make("caption", caption, "note"));
  const head = make("tr");
  for (const c of columns) {
    const cell = make("th", sort ? null : c.title, c.number ? "number" : "");
    cell.scope = "col";
    if (sort) {
      const button = make("button", c.title + (sort.key === c.key ? (sort.down ? " ▼" : " ▲") : ""));
      button.type = "button";
      button.dataset.key = c.key;
      cell.setAttribute("aria-sort", sort.key !== c.key ? "none" : sort.down ? "descending" : "ascending");
      button.onclick = () => sort.by(c.key);
      cell.append(button);
    }
    head.append(cell);
  }
  const thead = make("thead"), body = make("tbody");
  thead.append(head);
  for (const row of rows) {
    const line = make("tr");
    for (const c of columns) {
      const value = row[c.key];
      const cell = make("td", c.image ? null : c.number ? number(value) : value, c.number ? "number" : c.key === "text" ? "text" : "");
      if (c.signed && value) cell.classList.add(value < 0 ? "minus" : "plus");
      if (c.image && value) {
        const image = make("img");
        image.src = value;
        image.alt = "sample " + row.sample;
        cell.append(image);
      }
      line.append(cell);
    }
    body.append(line);
  }
  made.append(thead, body);
  return made;
}

const values = [{ key: "value", title: "Sum of scores", number: true, signed: true }, { key: "standardized", title: "Standardised", number: true, signed: true }];
const all = [
  { key: "sample", title: "Sample" }, ...(data.rank === "value" ? values : values.reverse()), { key: "n", title: "Steps", number: true },
  { key: "group", title: "Group" }, { key: "image", title: "Image", image: true }, { key: "text", title: "Text" }, { key: "path", title: "Path" },
];
const columns = all.filter((c) => data.samples.some((r) => r[c.key] !== null && r[c.key] !== undefined));

for (const [id, key] of [["helpful", "helpful"], ["harmful", "harmful"]]) {
  const rows = data[key].map((i) => data.samples[i]);
  document.getElementById(id).append(table(columns, rows, rows.length + " most " + key + " samples, by " + (data.rank === "value" ? "the sum of their scores" : "the mean of their scores standardised within steps")));
}
document.getElementById("group-table").append(table([
  { key: "group", title: "Group" }, { key: "value", title: "Sum of scores", number: true, signed: true },
  { key: "low", title: "95% from", number: true }, { key: "high", title: "to", number: true },
  { key: "samples", title: "Samples", number: true }, { key: "mean", title: "Mean per sample", number: true, signed: true }],
data.groups, "Sum of scores by group, with the middle 95% over resamplings of the steps"));
if (data.audits.length) {
  document.getElementById("audit-table").append(table([
    { key: "step", title: "Step", number: true }, { key: "r", title: "Pearson R", number: true }, { key: "l2", title: "Relative L2 error", number: true },
    { key: "score_sum", title: "Sum of scores", number: true }, { key: "loss_drop", title: "The batch's own drop", number: true }],
  data.audits, data.windows ? "Audited steps against leaving samples out and training on" : "Audited steps against their exact Shapley values"));
}

const state = { key: data.rank, down: true };
const search = document.getElementById("search"), group = document.getElementById("group");
for (const g of data.groups) { const o = make("option", g.group); o.value = g.group; group.append(o); }

function draw() {
  const word = search.value.toLowerCase();
  const rows = data.samples.filter((r) => (group.value === "" || (r.group ?? "(none)") === group.value)
    && (word === "" || ["sample", "text", "path", "group"].some((k) => String(r[k] ?? "").toLowerCase().includes(word))));
  rows.sort((a, b) => {
    const x = a[state.key], y = b[state.key];
    const order = typeof x === "number" && typeof y === "number" ? x - y : String(x ?? "").localeCompare(String(y ?? ""), undefined, { numeric: true });
    return state.down ? -order : order;
  });
  const shown = rows.slice(0, 200);
  const focused = document.activeElement?.dataset?.key;
  state.by = (key) => { state.down = state.key === key ? !state.down : true; state.key = key; draw(); };
  document.getElementById("table").replaceChildren(table(columns, shown, "Samples", state));
  document.getElementById("count").textContent = `${shown.length} shown of ${rows.length} that match, of ${data.samples.length} on this page`;
  if (focused) document.querySelector(`#table button[data-key="${focused}"]`)?.focus();
}
search.oninput = draw;
group.onchange = draw;
draw();

function charts() {
  const style = getComputedStyle(document.documentElement);
  const fg = style.getPropertyValue("--fg"), line = style.getPropertyValue("--line"), bg = style.getPropertyValue("--bg");
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true };
  for (const [id, chart] of Object.entries(data.charts)) {
    const layout = { ...chart.layout, paper_bgcolor: bg, plot_bgcolor: bg, font: { color: fg, family: "system-ui, sans-serif" }, margin: { t: 20, r: 10, l: 60, b: 50 },
      xaxis: { ...axis, ...chart.layout.xaxis }, yaxis: { ...axis, ...chart.layout.yaxis }, legend: { orientation: "h", y: 1.12 } };
    Plotly.react(id, chart.data, layout, { responsive: true, displayModeBar: false });
  }
}
charts();
dark.addEventListener("change", charts);
