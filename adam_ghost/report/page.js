// Data reaches the page only as text: textContent, never markup.
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const TITLES = { total: "Sum of scores", standardized: "Standardised" };
const OTHER = data.rank === "total" ? "standardized" : "total";
const ENDS = 10, FOLLOWED = 4, COLOURED = 8, FIRST = 25, MORE = 100;
let target, rows, shown = FIRST, sort;

function make(tag, text, name) {
  const node = document.createElement(tag);
  if (text !== undefined && text !== null) node.textContent = text;
  if (name) node.className = name;
  return node;
}

const present = (x) => x !== null && x !== undefined && x !== "";
const percent = (x) => (100 * x).toFixed(0).replace("-", "\u2212") + "%";
const signed = (x) => (x > 0 ? "+" : "") + short(x);

// A sample's row: its values, and what is known of it.
function rowsOf(part) {
  return part.rows.sample.map((sample, place) => {
    const row = { place, curve: part.curves[place] };
    for (const [name, column] of Object.entries(part.rows)) row[name] = column[place];
    return Object.assign(row, sampleOf(sample));
  });
}

const sampleOf = (i) => Object.fromEntries(Object.entries(data.samples).map(([name, column]) => [name, column[i]]));

function interval(row, value) {
  const low = row[value + "_low"], high = row[value + "_high"];
  return present(low) ? `${short(low)} to ${short(high)}` : row.n === 1 ? "met once" : "";
}

function score(row, value) {
  const node = make("span", null, "score");
  node.append(make("b", signed(row[value]), row[value] < 0 ? "minus" : "plus"), make("small", interval(row, value)));
  return node;
}

function picture(row) {
  const image = make("img");
  image.src = row.image;
  image.alt = "sample " + row.name;
  image.onload = () => image.classList.toggle("tiny", image.naturalWidth < 64);
  return image;
}

function table(columns, rows, sorting) {
  const made = make("table"), head = make("tr"), thead = make("thead"), body = make("tbody");
  for (const c of columns) {
    const cell = make("th", sorting ? null : c.title, c.name);
    cell.scope = "col";
    if (sorting) {
      const button = make("button", c.title + (sorting.key === c.key ? (sorting.down ? " ▼" : " ▲") : ""));
      button.type = "button";
      button.dataset.key = c.key;
      cell.setAttribute("aria-sort", sorting.key !== c.key ? "none" : sorting.down ? "descending" : "ascending");
      button.onclick = () => sorting.by(c.key);
      cell.append(button);
    }
    head.append(cell);
  }
  for (const row of rows) {
    const line = make("tr");
    for (const c of columns) {
      const cell = make("td", null, c.name);
      cell.append(c.show ? c.show(row, line) : c.name?.includes("number") ? short(row[c.key]) : row[c.key] ?? "");
      line.append(cell);
    }
    body.append(line);
  }
  thead.append(head);
  made.append(thead, body);
  return made;
}

// A sample's text, coloured by what each token did; where nobody said what tokens say, a character or a dot for each.
function coloured(row, entry) {
  const node = make("p", null, "text tokens"), most = Math.max(...entry.scores.map(Math.abs)) || 1;
  const letters = [...(row.text ?? "")], count = entry.scores.length;
  const said = row.tokens?.length === count ? row.tokens : letters.length === count ? letters : entry.scores.map(() => "\u00b7");
  entry.scores.forEach((score, i) => {
    const token = make("span", said[i], score < 0 ? "minus" : "plus");
    token.style.setProperty("--much", (80 * Math.abs(score) / most).toFixed(0) + "%");
    token.onpointermove = (event) => tip(`token ${i}: ${signed(score)}`, event);
    node.append(token);
  });
  node.onpointerleave = () => tip(null);
  return node;
}

function byToken() {
  at("by-token").hidden = !target.tokens.length;
  at("coloured").replaceChildren(...target.tokens.slice(0, COLOURED).map((entry) => {
    const row = sampleOf(entry.sample), part = make("div"), name = make("p", null, "name");
    const sum = entry.scores.reduce((a, b) => a + b, 0);
    name.append(make("b", row.name), ...(present(row.group) ? [make("span", row.group, "chip")] : []),
      make("span", ` ${signed(sum)} in ${entry.steps} step${entry.steps > 1 ? "s" : ""}`, sum < 0 ? "minus" : "plus"));
    part.append(name, coloured(row, entry));
    return part;
  }));
}

// What is known of a sample, whole.
function detail(row) {
  const found = make("div", null, "detail"), facts = make("dl");
  const said = [["Sample", row.name], ["Group", row.group], ["Path", row.path], ["Steps it was in", row.n]];
  for (const value of [data.rank, OTHER]) said.push([TITLES[value], `${signed(row[value])}  (${interval(row, value) || "no interval"})`]);
  for (const [name, value] of said) {
    if (!present(value)) continue;
    const entry = make("div");
    entry.append(make("dt", name), make("dd", value));
    facts.append(entry);
  }
  found.append(facts);
  if (row.image) found.append(picture(row));
  const entry = target.tokens.find((t) => t.sample === row.sample);
  if (entry) found.append(coloured(row, entry));
  else if (present(row.text)) {
    found.append(make("p", row.text, "text"));
    if (row.cut) found.append(make("p", "There was no room for the rest, which `adam-ghost show` has.", "note"));
  }
  if (row.curve && row.curve[0].length > 1) {
    const place = make("div", null, "chart");
    found.append(place);
    const series = [{ name: row.name, x: row.curve[0], y: row.curve[1], colour: row.total < 0 ? 5 : 0 }];
    requestAnimationFrame(() => chart(place, { kind: "lines", x: "step", y: "running sum of its scores", series }, `Scores of sample ${row.name} over steps`));
  }
  return found;
}

function opens(row, line, columns) {
  const button = make("button", row.name, "opens");
  button.type = "button";
  button.setAttribute("aria-expanded", "false");
  button.onclick = () => {
    const open = button.getAttribute("aria-expanded") === "false";
    button.setAttribute("aria-expanded", String(open));
    if (!open) return line.nextSibling.remove();
    const more = make("tr"), cell = make("td");
    cell.colSpan = columns;
    more.className = "more";
    cell.append(detail(row));
    more.append(cell);
    line.after(more);
  };
  return button;
}

// One end of the ranking: each sample's value as a bar from zero, its interval as a whisker; both ends to the same scale.
function ends(id, chosen) {
  const value = data.rank;
  const [here, there] = [id, id === "helpful" ? "harmful" : "helpful"].map((end) => limits(chosen[end].flatMap((r) => [r[value], r[value + "_low"] ?? null, r[value + "_high"] ?? null]), true));
  const width = Math.max(here[1] - here[0], there[1] - there[0]), start = id === "helpful" ? here[0] : here[1] - width;
  const X = (v) => 100 * (v - start) / width;
  const list = at(id);
  list.replaceChildren();
  for (const row of chosen[id]) {
    const item = make("li"), what = make("details"), summary = make("summary");
    const name = make("span", null, "name");
    name.append(make("b", row.name), ...(present(row.group) ? [make("span", row.group, "chip")] : []));
    summary.append(...(row.image ? [picture(row)] : []), name, score(row, value));
    const bar = make("span", null, "forest"), body = make("i", null, row[value] < 0 ? "minus" : "plus"), zero = make("u");
    body.style.left = X(Math.min(0, row[value])) + "%";
    body.style.width = X(Math.abs(row[value]) + start) + "%";
    zero.style.left = X(0) + "%";
    bar.append(body, zero);
    if (present(row[value + "_low"])) {
      const whisker = make("s");
      whisker.style.left = X(row[value + "_low"]) + "%";
      whisker.style.width = X(row[value + "_high"] - row[value + "_low"] + start) + "%";
      bar.append(whisker);
    }
    summary.append(bar);
    if (present(row.text)) summary.append(make("span", row.text, "text clamp"));
    what.append(summary);
    what.ontoggle = () => { if (what.open && what.children.length === 1) what.append(detail(row)); };
    item.append(what);
    list.append(item);
  }
}

function explained() {
  const found = target.explained, section = at("explained"), bar = section.querySelector(".bar"), key = section.querySelector(".key");
  bar.hidden = key.hidden = !found;
  if (found) {
    const parts = [["own", "the samples' own steps", 0], ["history", "momentum and weight decay", 1], ["rest", "left over", 7]];
    const whole = parts.reduce((sum, [name]) => sum + Math.abs(found[name]), 0) || 1;
    bar.replaceChildren();
    key.replaceChildren();
    for (const [name, text, colour] of parts) {
      const piece = make("span", null, "c" + colour), item = make("li"), swatch = make("span", null, "swatch c" + colour);
      piece.style.width = 100 * Math.abs(found[name]) / whole + "%";
      bar.append(piece);
      item.append(swatch, `${text}: ${short(found[name])} (${percent(found[name] / found.drop)})`);
      key.append(item);
    }
    bar.setAttribute("aria-label", "Parts of the validation loss's drop of " + short(found.drop));
  }
  at("balance").textContent = target.balance;
  at("gap").textContent = target.gap;
}

function against() {
  const found = target.against, value = TITLES[data.rank].toLowerCase();
  at("against").hidden = !found;
  if (!found) return;
  const agree = present(found.correlation) ? `Their ranks agree to ${found.correlation.toFixed(3)} (Spearman; 1 = the same order, 0 = none).` : "";
  at("agreement").textContent = `${found.both.toLocaleString("en")} samples are in this run and in \u201c${found.folder}\u201d, ${found.only_here.toLocaleString("en")} only here, ${found.only_there.toLocaleString("en")} only there. ${agree}`;
  const number = "number";
  const said = [{ key: "sample", title: "Sample", name: "named" }, { key: "place_a", title: "Place here", name: number }, { key: "place_b", title: "There", name: number },
    { key: "a", title: TITLES[data.rank] + " here", name: "number wide" }, { key: "b", title: "There", name: "number wide" }, { key: "group", title: "Group", name: "named" }, { key: "text", title: "Text", name: "text wide", show: (row) => make("span", row.text, "clamp") }];
  at("movers").replaceChildren(table(said.filter((c) => found.movers.some((r) => present(r[c.key]))), found.movers));
  at("both-groups-part").hidden = !found.groups.length;
  at("both-groups").replaceChildren(table([{ key: "group", title: "Group", name: "named" }, { key: "a", title: value + " here", name: number }, { key: "b", title: "there", name: number }], found.groups));
}

function samples() {
  const known = (key) => rows.some((r) => present(r[key]));
  const word = at("search").value.toLowerCase(), group = at("group").value;
  const found = rows.filter((r) => (group === "" || (r.group ?? "(none)") === group)
    && (word === "" || ["name", "text", "path", "group"].some((k) => String(r[k] ?? "").toLowerCase().includes(word))));
  found.sort((a, b) => {
    const x = a[sort.key], y = b[sort.key];
    const order = typeof x === "number" && typeof y === "number" ? x - y : String(x ?? "").localeCompare(String(y ?? ""), undefined, { numeric: true });
    return sort.down ? -order : order;
  });
  const columns = [
    { key: "name", title: "Sample", name: "named", show: (row, line) => opens(row, line, columns.length) },
    { key: data.rank, title: TITLES[data.rank], name: "number", show: (row) => score(row, data.rank) },
    { key: OTHER, title: TITLES[OTHER], name: "number wide", show: (row) => score(row, OTHER) },
    { key: "n", title: "Steps", name: "number wide" },
    ...(known("group") ? [{ key: "group", title: "Group", name: "named" }] : []),
    ...(known("image") ? [{ key: "image", title: "Image", show: (row) => (row.image ? picture(row) : "") }] : []),
    ...(known("text") ? [{ key: "text", title: "Text", name: "text wide", show: (row) => make("span", row.text, "clamp") }] : []),
    ...(known("path") && !known("text") ? [{ key: "path", title: "Path", name: "text wide" }] : []),
  ];
  const focused = document.activeElement?.dataset?.key;
  at("table").replaceChildren(table(columns, found.slice(0, shown), sort));
  at("count").textContent = `${Math.min(shown, found.length)} shown of ${found.length} that match, of ${rows.length} on this page`;
  at("more").hidden = found.length <= shown;
  if (focused) document.querySelector(`#table button[data-key="${focused}"]`)?.focus();
}

function charts() {
  const top = rows.slice(0, FOLLOWED), bottom = rows.slice(-FOLLOWED).reverse();
  const followed = [...new Set([...top, ...bottom])].filter((r) => r.curve?.[0].length > 1);
  const lines = followed.map((r) => ({ name: r.name, x: r.curve[0], y: r.curve[1], colour: top.includes(r) ? 0 : 5, dash: (top.includes(r) ? top : bottom).indexOf(r) }));
  const made = { ...target.charts, against: target.against?.chart };
  if (lines.length) made.followed = { kind: "lines", x: "step", y: "running sum of scores (validation loss)", series: lines };
  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    const spec = made[figure.dataset.chart];
    figure.hidden = !spec;
    if (spec) chart(figure.querySelector(".chart"), spec, figure.querySelector("figcaption").textContent);
  }
  at("followed").hidden = !lines.length;
}

function show(part) {
  target = part;
  rows = rowsOf(part);
  sort = { key: data.rank, down: true, by: (key) => { sort.down = sort.key === key ? !sort.down : true; sort.key = key; samples(); } };
  at("headline").textContent = part.headline.sentence;
  at("caveat").textContent = part.headline.note;
  explained();
  against();
  byToken();
  const k = Math.min(ENDS, rows.length), by = data.rank === "total" ? "the sum of their scores" : "the mean of their scores, standardised within steps";
  for (const id of ["helpful", "harmful"]) ends(id, { helpful: rows.slice(0, k), harmful: rows.slice(-k).reverse() });
  at("ends-note").textContent = `By ${by}; the line over a bar is the 95% interval over resampled steps. Where it crosses zero the sign is not known. Open a sample for all that is known of it.`;
  at("groups").hidden = !part.groups.length;
  at("group-part").hidden = !part.groups.length;
  at("group-table").replaceChildren(table([
    { key: "group", title: "Group", name: "named" }, { key: "value", title: "Sum of scores", name: "number", show: (g) => score({ ...g, total: g.value, total_low: g.low, total_high: g.high }, "total") },
    { key: "samples", title: "Samples", name: "number" }, { key: "mean", title: "Per sample", name: "number" }], part.groups));
  at("group").replaceChildren(...["", ...part.groups.map((g) => g.group)].map((g) => { const o = make("option", g || "all"); o.value = g; return o; }));
  at("shown").textContent = rows.length < part.books.samples
    ? `The ${rows.length.toLocaleString("en")} samples nearest to either end, of ${part.books.samples.toLocaleString("en")}; the ledger has all of them.` : "All of the run's samples.";
  samples();
  const audits = part.audits.length;
  at("audited").textContent = !audits ? "No step was audited; InRun(..., audit_every=N) does."
    : part.audited + " " + (part.windows ? "Steps of which samples were left out, to train on to their window's end: what that did, against their credit."
      : "Steps whose scores were held against their exact Shapley values. The batch's own drop is what its gradient took off the validation loss, against the step that momentum and weight decay would have taken without it.");
  at("audit-table").hidden = !audits;
  at("audit-table").replaceChildren(table([
    { key: "step", title: "Step", name: "number" }, { key: "r", title: "Pearson R", name: "number" }, { key: "l2", title: "Relative L2", name: "number" },
    { key: "score_sum", title: "Sum of scores", name: "number" }, { key: "loss_drop", title: "Batch's own drop", name: "number" }], part.audits));
  charts();
  for (const button of at("targets").children) button.setAttribute("aria-checked", String(Number(button.dataset.target) === part.target));
}

for (const part of data.targets) {
  const button = make("button", "Validation loss " + part.target);
  button.type = "button";
  button.dataset.target = part.target;
  button.setAttribute("role", "radio");
  button.onclick = () => show(part);
  at("targets").append(button);
}
at("targets").hidden = data.targets.length < 2;
for (const [name, value] of Object.entries(data.facts)) {
  const entry = make("div");
  entry.append(make("dt", name), make("dd", value));
  at("facts").append(entry);
}
at("search").oninput = at("group").onchange = () => { shown = FIRST; samples(); };
at("more").onclick = () => { shown += MORE; samples(); };
show(data.targets[0]);
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; charts(); } });
