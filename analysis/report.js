"use strict";
(async () => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const $ = (id) => document.getElementById(id);
  const data = read("data");
  const shown = data.policies.map(() => true);
  const state = { setting: 0, metric: "tpot", capacity: "" };

  // ---- words -----------------------------------------------------------------------------------

  const figures = (value) => Number(value.toPrecision(4)).toString();
  const ms = (ns) => (ns === null ? "-" : `${figures(ns / 1e6)} ms`);
  const percent = (share) => (share === null ? "-" : `${(100 * share).toFixed(2)} %`);
  const bytes = (n) => {
    for (const [unit, scale] of [["GB", 1e9], ["MB", 1e6], ["KB", 1e3]]) {
      if (n >= scale) return `${figures(n / scale)} ${unit}`;
    }
    return `${n} bytes`;
  };
  const METRICS = {
    tpot: ["time per token, mean", "ms", 1e-6, ms],
    tpot99: ["time per token, P99", "ms", 1e-6, ms],
    ttft: ["time to first token, mean", "ms", 1e-6, ms],
    ttft99: ["time to first token, P99", "ms", 1e-6, ms],
    time: ["time of the whole run", "ms", 1e-6, ms],
    stall: ["stall, share of the time", "%", 100, percent],
    moved: ["bytes over the link", "GB", 1e-9, bytes],
  };
  const PART = {
    initial: ["filling the memory at the start", "#b39ddb"], dense: ["attention, norms, router", "#8d99ae"],
    experts: ["experts", "#2a9d8f"], sync: ["routing to the host", "#c2a878"],
    plan: ["the policy's own", "#e9c46a"], stall: ["stall", "#e07a6b"],
    cpu_wait: ["waiting for host experts", "#b56576"], idle: ["idle", "#6d7685"],
    exchange: ["between devices", "#4878d0"],
  };
  const FATE = {
    demand: ["on demand", "#e76f51"], used: ["prefetched and used", "#2a9d8f"],
    late: ["used, but late", "#e9b44c"], wasted: ["wasted", "#9d4e63"],
    cancelled: ["cancelled", "#8d99ae"], unused_at_end: ["unused at the end", "#b39ddb"],
  };
  const SPAN = {
    dense: ["attention, norms, router", "#8d99ae"], expert: ["expert", "#2a9d8f"],
    stall: ["stall", "#efb1a8"], demand: ["demand load", "#e76f51"], prefetch: ["prefetch", "#4878d0"],
    cpu: ["expert on the host", "#e9b44c"], job: ["the policy's work", "#b39ddb"],
  };
  const LANE = {
    dense: "compute", expert: "compute", stall: "compute", demand: "link: demand",
    prefetch: "link: prefetch", cpu: "host", job: "host",
  };

  // ---- what is shown ---------------------------------------------------------------------------

  const here = () => data.runs.filter((r) => r.setting === state.setting && shown[r.policy]);
  const kind = (policy) => (policy.bound ? " (bound)" : policy.lossy ? " (lossy)" : "");
  const named = (run) => data.policies[run.policy].name + kind(data.policies[run.policy]);
  const rank = (run) => (data.policies[run.policy].bound ? 2 : data.policies[run.policy].lossy ? 1 : 0);
  // What could be used comes first; bounds stand apart, below.
  const at = (capacity, by) => here().filter((r) => r.capacity === capacity && !r.roof)
    .sort((a, b) => rank(a) - rank(b) || by(a) - by(b));

  const element = (tag, text, parent, className) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    if (parent) parent.append(made);
    return made;
  };
  const option = (select, value, text) => { element("option", text, select).value = value; };
  const legend = (id, words) => {
    const place = $(id);
    for (const [text, colour] of Object.values(words)) {
      const item = element("span", undefined, place);
      element("i", undefined, item).style.background = colour;
      item.append(text);
    }
  };

  // ---- figures ---------------------------------------------------------------------------------

  let doc, views;
  const source = (name) => doc.get_model_by_name(name);
  const plot = (name) => doc.get_model_by_name(name);

  const span = (range, low, high) => range.setv({
    start: low, end: high, reset_start: low, reset_end: high,
  });

  function pareto() {
    const [words, unit, scale, spell] = METRICS[state.metric];
    const runs = here().filter((r) => r[state.metric] !== null);
    const most = Math.max(...runs.filter((r) => !r.roof).map((r) => r.bytes), 1);
    const [x_unit, x_scale] = most >= 1e9 ? ["GB", 1e-9] : ["MB", 1e-6];
    const memories = runs.filter((r) => !r.roof).map((r) => r.bytes * x_scale);
    const left = Math.min(...memories, most * x_scale), right = most * x_scale;
    const room = (right - left || right) * 0.08;
    const lines = { xs: [], ys: [], colour: [], dash: [] };
    const points = {};
    for (const key of Object.keys(source("pareto-points").data)) points[key] = [];
    data.policies.forEach((policy, index) => {
      const mine = runs.filter((r) => r.policy === index).sort((a, b) => a.bytes - b.bytes);
      if (!mine.length) return;
      const roof = mine[0].roof;
      lines.xs.push(roof ? [left - room, right + room] : mine.map((r) => r.bytes * x_scale));
      lines.ys.push(roof ? [mine[0][state.metric] * scale, mine[0][state.metric] * scale]
        : mine.map((r) => r[state.metric] * scale));
      lines.colour.push(policy.colour);
      lines.dash.push(policy.bound ? [5, 4] : policy.lossy ? [1, 4] : []);
      for (const run of mine) {
        points.x.push(roof ? right + room * 0.5 : run.bytes * x_scale);
        points.y.push(run[state.metric] * scale);
        points.colour.push(policy.colour);
        points.fill.push(policy.bound || policy.lossy ? 0 : 0.85);
        points.marker.push(policy.lossy ? "diamond" : policy.marker);
        points.policy.push(policy.name);
        points.kind.push(policy.bound ? "bound: not ranked" : policy.lossy ? "lossy" : "");
        points.capacity.push(`${run.capacity}, ${bytes(run.bytes)}`);
        points.value.push(`${words}: ${spell(run[state.metric])}`);
        points.stall.push(percent(run.stall));
        points.hit.push(percent(run.hit));
        points.run.push(run.run);
      }
    });
    source("pareto-lines").data = lines;
    source("pareto-points").data = points;
    source("pareto-front").data = front(runs, x_scale, scale, right + room);
    const high = Math.max(...points.y, 1e-9), low = Math.min(...points.y, high);
    const margin = (high - low || high) * 0.1;
    span(plot("pareto").x_range, left - room, right + room);
    span(plot("pareto").y_range, Math.max(0, low - margin), high + margin);
    plot("pareto").below[0].axis_label = `memory for experts, ${x_unit}`;
    plot("pareto").left[0].axis_label = `${words}, ${unit}`;
  }

  // Of the policies that could be used: nothing here is as small and quicker.
  function front(runs, x_scale, scale, right) {
    const usable = runs.filter((r) => !data.policies[r.policy].bound && !data.policies[r.policy].lossy);
    usable.sort((a, b) => a.bytes - b.bytes || a[state.metric] - b[state.metric]);
    const made = { x: [], y: [] };
    let best = Infinity;
    for (const run of usable) {
      if (run[state.metric] < best) {
        best = run[state.metric];
        made.x.push(run.bytes * x_scale);
        made.y.push(best * scale);
      }
    }
    if (made.x.length) { made.x.push(right); made.y.push(made.y[made.y.length - 1]); }
    return made;
  }

  const tall = (name, rows, each, more) => plot(name).setv({ height: Math.max(2, rows) * each + more });

  function bars(name, columns, words, scale, spell) {
    const runs = at(state.capacity, (run) => sum(run[columns]));
    const made = {};
    for (const key of Object.keys(source(`${name}-bars`).data)) made[key] = [];
    let most = 0;
    for (const run of runs) {
      const total = sum(run[columns]);
      let left = 0;
      run[columns].forEach((value, index) => {
        const [what, colour] = words[index];
        if (value > 0) {
          made.y.push(named(run));
          made.left.push(left * scale);
          made.right.push((left + value) * scale);
          made.colour.push(colour);
          made.policy.push(named(run));
          made.what.push(what);
          made.value.push(spell(value));
          made.share.push(percent(value / total));
          made.run.push(run.run);
        }
        left += value;
      });
      most = Math.max(most, left * scale);
    }
    plot(name).y_range.factors = runs.map(named).reverse();
    source(`${name}-bars`).data = made;
    span(plot(name).x_range, 0, most * 1.02 || 1);
    tall(name, runs.length, 26, 70);
  }

  const sum = (values) => values.reduce((total, value) => total + value, 0);

  // ---- heat maps -------------------------------------------------------------------------------

  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const parse = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  function shade(share) {
    if (share === null) return style("--empty");
    const low = parse(style("--cell-low")), high = parse(style("--cell-high"));
    const mixed = low.map((v, i) => Math.round(v + (high[i] - v) * Math.min(1, Math.max(0, share))));
    return `rgb(${mixed.join(",")})`;
  }

  // rows: [name, values], null where there are none; colours run from low to high.
  function heat(name, rows, [low, high], each, column, spell) {
    const made = { x: [], y: [], width: [], colour: [], row: [], column: [], value: [] };
    let width = 1;
    for (const [row, values] of rows) {
      values.forEach((value, index) => {
        made.x.push(each === 1 ? index : (index + 0.5) * each);
        made.y.push(row);
        made.width.push(each * (values.length > 60 ? 1 : 0.94));
        made.colour.push(shade(value === null ? null : (value - low) / (high - low || 1)));
        made.row.push(row);
        made.column.push(column(index));
        made.value.push(value === null ? "nothing" : spell(value));
      });
      width = Math.max(width, values.length);
    }
    plot(name).y_range.factors = rows.map(([row]) => row).reverse();
    source(`${name}-cells`).data = made;
    const edge = each === 1 ? 0.5 : 0;
    span(plot(name).x_range, -edge, width * each - edge);
    tall(name, rows.length, Math.max(12, Math.min(26, 400 / rows.length)), 64);
  }

  const scale = (id, low, high) => {
    const place = $(id);
    place.replaceChildren();
    element("span", low, place);
    element("i", undefined, place);
    element("span", high, place);
  };

  function stalls() {
    const runs = at(state.capacity, (run) => sum(run.layers));
    const shares = runs.map((r) => r.layers.map((ns) => (r.time ? ns / r.time : 0)));
    const most = Math.max(...shares.flat(), 0);
    const rows = runs.map((r, i) => [named(r), shares[i]]);
    heat("stalls", rows, [0, most], 1, (layer) => `layer ${layer}`, percent);
    scale("stalls-scale", "0", percent(most));
  }

  function entropy() {
    const found = data.entropy;
    if (!found) return;
    const known = found.bits.flat().filter((v) => v !== null);
    const low = Math.min(...known), high = Math.max(...known);
    const rows = found.bits.map((values, layer) => [`layer ${layer}`, values]);
    const spell = (bits) => `${bits.toFixed(2)} bits; an even choice has ${found.most.toFixed(2)}`;
    heat("entropy", rows, [low, high], 1, (i) => (i ? `iteration ${i}` : "the prompt"), spell);
    scale("entropy-scale", `${low.toFixed(2)} bits`, `${high.toFixed(2)} bits`);
    $("entropy-lead").textContent =
      `Mean entropy of the gate over ${found.of}, first ${found.requests} requests of trace `
      + `${found.digest}. An even choice has ${found.most.toFixed(2)} bits; fewer are easier to foresee.`;
  }

  // ---- the clock -------------------------------------------------------------------------------

  const clock = () => data.clocks[Number($("clock-run").value)];

  // The quickest that could be used, at the capacity that is shown.
  function first() {
    const ranked = data.clocks.map((one, index) => [data.runs[one.run], index])
      .filter(([run]) => run.capacity === state.capacity && run.setting === state.setting
        && !data.policies[run.policy].bound && !data.policies[run.policy].lossy && run.tpot !== null);
    ranked.sort(([a], [b]) => a.tpot - b.tpot);
    return ranked.length ? ranked[0][1] : 0;
  }

  function passes() {
    const select = $("clock-pass");
    select.replaceChildren();
    clock().passes.forEach((one, i) => option(select, i, `${one.step} of ${clock().steps}`));
    select.value = clock().chosen;
    pass();
    hits();
  }

  function pass() {
    const one = clock().passes[Number($("clock-pass").value)];
    const made = {};
    for (const key of Object.keys(source("clock-spans").data)) made[key] = [];
    const time = (ns) => (ns === null ? "not in this run" : `${(ns / 1e6).toFixed(4)} ms`);
    for (const [lane, start, end, layer, expert, need] of one.spans) {
      const load = lane === "demand" || lane === "prefetch";
      made.y.push(LANE[lane]);
      made.left.push(Math.max(start, 0) / 1e6);
      made.right.push(Math.min(end, one.end) / 1e6);
      made.colour.push(SPAN[lane][1]);
      made.what.push(SPAN[lane][0] + (layer < 0 ? "" : `: layer ${layer}, expert ${expert}`));
      made.bytes.push(load ? bytes(one.bytes[layer]) : "-");
      made.issued.push(time(start));
      made.end.push(time(end));
      made.need.push(load ? time(need) : "-");
      made.margin.push(!load ? `${time(end - start)} long` : need === null ? "never used again"
        : end <= need ? `${time(need - end)} early` : `${time(end - need)} late`);
    }
    source("clock-spans").data = made;
    span(plot("clock").x_range, 0, one.end / 1e6);
  }

  function hits() {
    const found = clock();
    const rows = found.hits.map((values, layer) => [`layer ${layer}`, values]);
    const steps = (i) => (found.each === 1 ? `pass ${i}`
      : `passes ${i * found.each} to ${Math.min((i + 1) * found.each, found.steps) - 1}`);
    heat("hits", rows, [0, 1], found.each, steps, percent);
    scale("hits-scale", "0 %", "100 % hits");
  }

  // ---- the page's own controls -----------------------------------------------------------------

  function rows() {
    for (const row of document.querySelectorAll("#runs tbody tr")) {
      row.hidden = Number(row.dataset.setting) !== state.setting || !shown[Number(row.dataset.policy)];
    }
  }

  function chips() {
    const present = new Set(data.runs.filter((r) => r.setting === state.setting).map((r) => r.policy));
    document.querySelectorAll(".chip").forEach((chip, index) => {
      chip.hidden = !present.has(index);
      chip.setAttribute("aria-pressed", shown[index]);
    });
  }

  function draw() {
    chips();
    rows();
    pareto();
    bars("parts", "parts", data.parts.map((p) => PART[p]), 1e-6, ms);
    const biggest = Math.max(...here().map((r) => r.moved), 1);
    const [unit, by] = biggest >= 1e9 ? ["GB", 1e-9] : ["MB", 1e-6];
    bars("transfers", "fates", data.fates.map((f) => FATE[f]), by, bytes);
    plot("transfers").below[0].axis_label = unit;
    stalls();
  }

  function setting() {
    for (const part of document.querySelectorAll(".answer")) {
      part.hidden = Number(part.dataset.setting) !== state.setting;
    }
    const capacities = data.settings[state.setting].capacities;
    if (!capacities.includes(state.capacity)) {
      state.capacity = capacities[Math.floor((capacities.length - 1) / 2)];
    }
    for (const select of document.querySelectorAll("select.capacity")) {
      select.replaceChildren();
      for (const capacity of capacities) option(select, capacity, capacity);
      select.value = state.capacity;
    }
    draw();
  }

  function sort(heading, index) {
    const up = heading.getAttribute("aria-sort") !== "ascending";
    for (const other of document.querySelectorAll("#runs th")) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const body = document.querySelector("#runs tbody");
    const value = (row) => row.cells[index].dataset.value;
    const text = heading.classList.contains("text");
    const order = (a, b) => {
      // What is not known comes last, whichever way.
      if (value(a) === "" || value(b) === "") return (value(a) === "") - (value(b) === "");
      const by = text ? value(a).localeCompare(value(b), "en") : Number(value(a)) - Number(value(b));
      return up ? by : -by;
    };
    body.append(...[...body.rows].sort(order));
  }

  // ---- light and dark --------------------------------------------------------------------------

  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  function theme(printing) {
    const name = printing ? "light" : chosen || (dark.matches ? "dark" : "light");
    document.documentElement.dataset.theme = name;
    if (!doc) return;
    stalls();
    if (data.clocks.length) hits();
    entropy();
    for (const view of views) view.request_repaint();
  }
  $("theme").addEventListener("click", () => {
    chosen = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    theme(false);
  });
  dark.addEventListener("change", () => theme(false));
  window.addEventListener("beforeprint", () => theme(true));
  window.addEventListener("afterprint", () => theme(false));
  theme(false);

  // ---- begin -----------------------------------------------------------------------------------

  if (!data.clocks.length) $("clock-section").remove();
  if (!data.entropy) $("entropy-section").remove();
  data.policies.forEach((policy, index) => {
    const chip = element("button", undefined, $("chips"), "chip");
    chip.type = "button";
    const swatch = element("span", undefined, chip, "swatch");
    swatch.style.borderColor = policy.colour;
    if (!policy.bound && !policy.lossy) swatch.style.background = policy.colour;
    chip.append(policy.name + kind(policy));
    chip.addEventListener("click", () => { shown[index] = !shown[index]; draw(); });
  });
  const every = (wanted) => { shown.forEach((_, i) => { shown[i] = wanted(i); }); draw(); };
  $("all").addEventListener("click", () => every(() => true));
  $("none").addEventListener("click", () => every(() => false));
  $("bounds").addEventListener("click", () => every((i) => !data.policies[i].bound));
  for (const [key, [words]] of Object.entries(METRICS)) option($("metric"), key, words);
  $("metric").addEventListener("change", (e) => { state.metric = e.target.value; pareto(); });
  $("setting").addEventListener("change", (e) => {
    state.setting = Number(e.target.value);
    setting();
    if (data.clocks.length) { $("clock-run").value = first(); passes(); }
  });
  for (const select of document.querySelectorAll("select.capacity")) {
    select.addEventListener("change", () => { state.capacity = select.value; setting(); });
  }
  document.querySelectorAll("#runs th").forEach((heading, index) => {
    heading.querySelector("button").addEventListener("click", () => sort(heading, index));
  });
  legend("parts-legend", PART);
  legend("transfers-legend", FATE);
  data.clocks.forEach((one, index) => {
    const run = data.runs[one.run], where = data.settings[run.setting].name;
    const told = `${named(run)} at ${run.capacity}`;
    option($("clock-run"), index, where ? `${told} (${where})` : told);
  });

  const figures_json = read("figures");
  const wanted = Object.fromEntries(figures_json.roots
    .map((root) => [root.id, root.attributes.name])
    .filter(([, name]) => $(name)));
  views = await Bokeh.embed.embed_items({ page: figures_json }, [
    { docid: "page", roots: wanted, root_ids: Object.keys(wanted) },
  ]).then((managers) => managers.flatMap((manager) => [...manager]));
  views = views.filter((view) => view.model.type === "Figure");
  doc = views[0].model.document;
  if (data.clocks.length) {
    legend("clock-legend", SPAN);
    $("clock-run").addEventListener("change", passes);
    $("clock-pass").addEventListener("change", pass);
  }
  setting();
  if (data.clocks.length) {
    $("clock-run").value = first();
    passes();
  }
  entropy();
  window.report = { doc, state, data, views };
  document.documentElement.dataset.ready = "yes";
})();
