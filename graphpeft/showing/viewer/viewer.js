"use strict";
// Draws the picture in #picture. Everything is built when it is opened, so that large models open at once.

const picture = JSON.parse(document.getElementById("picture").textContent);
const graphviz = Viz.instance();
const COLOURS = 8;
const FEWEST_EQUAL = 3;
const MOST_OPEN_NODES = 80;
const SMALLEST_SCALE = 0.6; // of a graph that is wider than its place
const SHORT = 500; // pixels

const colour = (place) => `--own: var(--a${place % COLOURS})`;
const number = (value) => value.toLocaleString("en");
const numberOf = (count, noun) => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;
const rounded = (value) => Number(Number(value).toPrecision(3)).toString(); // NaN and Infinity come as text
const inUnits = (value, units, step) => {
  let place = 0;
  for (; value >= step && place < units.length - 1; place++) value /= step;
  return `${rounded(value)} ${units[place]}`;
};
const bytes = (value) => inUnits(value, ["B", "kB", "MB", "GB"], 1000);
const duration = (seconds) => inUnits(seconds * 1e6, ["µs", "ms", "s"], 1000);

function element(name, attributes = {}, ...inside) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(key, value);
    else if (value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...inside.filter((part) => part !== undefined && part !== null));
  return made;
}

// modules

const modules = new Map(); // by path
const above = new Map(); // the path of the module around each
(function remember(module, around) {
  module.path ??= "";
  module.name ??= "";
  for (const list of ["inside", "sites", "trained"]) module[list] ??= [];
  module.slots ??= {};
  module.kept_by ??= {};
  module.shapes ??= {};
  modules.set(module.path, module);
  above.set(module.path, around);
  for (const part of module.inside) remember(part, module.path);
})(picture.model, null);

function adaptersIn(module) {
  module.adapters ??= new Set([...[...module.sites, ...module.trained].map((each) => each.adapter ?? 0), ...module.inside.flatMap((part) => [...adaptersIn(part)])]);
  return module.adapters;
}

// a <details> that is filled when it is first opened
function opening(attributes, summary, fill) {
  const inside = element("div", { class: "inside" });
  const made = element("details", attributes, summary, inside);
  made.fill = () => {
    made.fill = () => made.filled;
    made.filled = Promise.resolve(fill(inside));
    return made.filled;
  };
  made.addEventListener("toggle", () => made.open && made.fill());
  return made;
}

function moduleElement(module) {
  const dots = [...adaptersIn(module)].map((place) => element("span", { class: "dot", style: colour(place), title: picture.adapters[place].name }));
  const sites = module.adapted ? `, ${number(module.adapted)} adapted` : "";
  const costs = module.kept === undefined ? "" : ` · keeps ${bytes(module.kept)}, ${duration(module.seconds ?? 0)}`;
  const summary = element(
    "summary", {},
    element("b", {}, module.name || picture.title),
    element("span", { class: "cls" }, `${module.cls} · ${numberOf(module.parameters ?? 0, "parameter")}${sites}${costs}`),
    ...dots,
  );
  const attributes = { class: module.adapted ? "module" : "module untouched", "data-path": module.path };
  return opening(attributes, summary, (inside) => {
    const drawn = module.graphs === undefined ? null : drawGraphs(module, inside);
    for (const each of module.trained) {
      const adapter = element("b", { class: "trained", style: colour(each.adapter ?? 0) }, picture.adapters[each.adapter ?? 0].name);
      inside.append(element("p", {}, adapter, ` trains ${each.tensors}`));
    }
    inside.append(...insideElements(module));
    return drawn;
  });
}

function insideElements(module) {
  const made = [];
  for (let first = 0, end; first < module.inside.length; first = end) {
    for (end = first + 1; end < module.inside.length && module.inside[end].kind === module.inside[first].kind; end++);
    const equal = module.inside.slice(first, end);
    made.push(...(equal.length < FEWEST_EQUAL ? equal.map(moduleElement) : [foldElement(equal)]));
  }
  return made;
}

function foldElement(equal) {
  const [first, last] = [equal[0], equal[equal.length - 1]];
  const summary = element(
    "summary", {},
    element("b", {}, `${first.name} … ${last.name}`),
    element("span", { class: "cls" }, `${equal.length} equal ${first.cls}, ${number(first.adapted ?? 0)} adapted in each`),
    ...[...adaptersIn(first)].map((place) => element("span", { class: "dot", style: colour(place) })),
  );
  const fold = opening({ class: "fold" }, summary, (inside) => {
    const place = element("div");
    const choice = element("select", { "aria-label": "Which of them" }, ...equal.map((module) => element("option", { value: module.path }, module.name)));
    fold.show = (path) => {
      choice.value = path;
      place.replaceChildren(moduleElement(modules.get(path)));
      return place.firstChild;
    };
    choice.addEventListener("change", () => (fold.show(choice.value).open = true));
    inside.append(choice, place);
    fold.show(first.path);
  });
  fold.holds = (path) => equal.some((module) => module.path === path);
  return fold;
}

// opens all that is around a module and the module itself, and returns its element
async function reach(path) {
  const way = [];
  for (let at = path; at !== null; at = above.get(at)) way.unshift(at);
  let place = document.getElementById("model");
  let found;
  for (const at of way) {
    const fold = [...place.children].find((child) => child.holds?.(at));
    if (fold) {
      fold.open = true;
      await fold.fill();
      found = fold.querySelector(`details[data-path="${CSS.escape(at)}"]`) ?? fold.show(at);
    } else {
      found = [...place.children].find((child) => child.dataset?.path === at);
    }
    found.open = true;
    await found.fill();
    place = found.querySelector(":scope > .inside");
  }
  return found;
}

// graphs

// a forward that differs in training has a graph for each mode, of which one is shown
function drawGraphs(module, inside) {
  const graphs = picture.graphs[module.graphs];
  const modes = graphs.map((graph) => element("option", { value: graph.mode ?? "" }, graph.mode ?? ""));
  const choice = element("select", { class: "mode", "aria-label": "Mode" }, ...modes);
  const place = element("div", { class: "graphs" });
  const draw = () => drawGraph(module, graphs[choice.selectedIndex], place);
  choice.addEventListener("change", draw);
  place.showMode = (index) => {
    if (choice.selectedIndex === index) return undefined;
    choice.selectedIndex = index;
    return draw();
  };
  inside.append(...(graphs.length > 1 ? [choice] : []), place);
  return draw();
}

function drawGraph(module, graph, place) {
  const calls = new Set(graph.after.flatMap((node) => node.calls ?? []));
  const open = new Set(graph.after.length <= MOST_OPEN_NODES ? calls : []);
  place.openAll = () => {
    calls.forEach((call) => open.add(call));
    return drawPair(module, graph, place, open);
  };
  return drawPair(module, graph, place, open);
}

async function drawPair(module, graph, place, open) {
  const changed = graph.after.some((node) => node.slot !== undefined || node.rewrite);
  const sides = changed ? [["before", graph.before], ["after", graph.after]] : [["after", graph.after]];
  const engine = await graphviz;
  const figures = sides.map(([side, nodes]) => {
    const svg = engine.renderSVGElement(laidOut(module, nodes, open), { yInvert: false });
    const figure = element("figure", { class: changed ? side : "" }, element("figcaption", {}, changed ? side : "the graph"), svg);
    const width = svg.width.baseVal.value;
    svg.style.minWidth = `${width * SMALLEST_SCALE}px`;
    // short graphs that don't fit side by side go below each other; tall ones would be too far apart
    const least = svg.height.baseVal.value < SHORT ? width * SMALLEST_SCALE + 14 : 0;
    figure.style.flex = `${Math.round(width) + 20} 1 ${Math.round(least)}px`;
    const named = new Map(nodes.map((node) => [node.name, node]));
    for (const drawn of svg.querySelectorAll("g.node, g.cluster")) {
      const title = drawn.querySelector("title");
      const name = drawn.id;
      title?.remove(); // browsers show it as a tooltip
      drawn.dataset.name = name;
      drawn.removeAttribute("id"); // a node is drawn on both sides, and an id may stand once
      drawn.setAttribute("tabindex", "0");
      const act = () => {
        if (named.has(name)) return choose(module, named.get(name), place);
        const call = name.replace(/^(call|cluster):/, "");
        if (!open.delete(call)) open.add(call);
        return drawPair(module, graph, place, open);
      };
      drawn.act = act;
      drawn.addEventListener("click", act);
      drawn.addEventListener("keydown", (event) => event.key === "Enter" && act());
      for (const [type, on] of [["mouseenter", true], ["mouseleave", false]]) {
        drawn.addEventListener(type, () => place.querySelectorAll(`[data-name="${CSS.escape(name)}"]`).forEach((twin) => twin.classList.toggle("twin", on)));
      }
    }
    return figure;
  });
  place.replaceChildren(...figures);
}

// the graph for Graphviz: a closed call is one node, an open one a cluster
function laidOut(module, nodes, open) {
  const root = { clusters: new Map(), nodes: new Map() };
  const shownAs = new Map();
  const owner = new Map(); // the place of the adapter of each shown name
  for (const node of nodes) {
    const calls = node.calls ?? [];
    let group = root;
    let name = node.name;
    for (const call of calls) {
      if (!open.has(call)) {
        name = `call:${call}`;
        const closed = group.nodes.get(name) ?? { call, nodes: 0, adapted: new Set(), kept: 0 };
        closed.nodes++;
        closed.kept += module.kept_by[node.name] ?? 0;
        if (node.slot !== undefined) closed.adapted.add(module.slots[node.slot]);
        group.nodes.set(name, closed);
        break;
      }
      if (!group.clusters.has(call)) group.clusters.set(call, { clusters: new Map(), nodes: new Map() });
      group = group.clusters.get(call);
    }
    shownAs.set(node.name, name);
    if (name === node.name) {
      group.nodes.set(name, node);
      if (node.slot !== undefined) owner.set(name, module.slots[node.slot]);
    }
  }
  const edges = new Map();
  for (const node of nodes) {
    for (const source of node.inputs ?? []) {
      const [tail, head] = [shownAs.get(source), shownAs.get(node.name)];
      if (tail === undefined || tail === head) continue;
      const own = owner.get(head) ?? owner.get(tail);
      edges.set(`${tail} ${head}`, { tail, head, attributes: own === undefined ? {} : { class: `of-adapter a${own}` } });
    }
  }
  const sites = new Map(module.sites.flatMap((site) => (site.tensors ?? []).map((tensor) => [tensor.path, tensor])));
  return {
    directed: true,
    // without these limits Graphviz takes ten times as long for a thousand nodes
    graphAttributes: { nslimit: 1, nslimit1: 1, bgcolor: "transparent", ranksep: 0.3, nodesep: 0.25, fontname: "Helvetica", fontsize: 10 },
    nodeAttributes: { shape: "box", style: "rounded,filled", fontname: "Helvetica", fontsize: 11, height: 0.3, margin: "0.12,0.05" },
    edgeAttributes: { arrowsize: 0.6 },
    ...groupForGraphviz(module, root, sites),
    edges: [...edges.values()],
  };
}

function groupForGraphviz(module, group, tensors) {
  return {
    nodes: [...group.nodes].map(([name, node]) => ({ name, attributes: node.call ? callAttributes(name, node) : nodeAttributes(module, node, tensors) })),
    subgraphs: [...group.clusters].map(([call, inner]) => ({
      name: `cluster:${call}`,
      graphAttributes: { id: `cluster:${call}`, label: call.slice(1, -1), style: "rounded", cluster: true },
      ...groupForGraphviz(module, inner, tensors),
    })),
  };
}

// operations are round boxes, what they read are small square ones, and where the graph begins and ends are ellipses
const SHAPES = {
  get_attr: { style: "filled", fontsize: 9, height: 0.2, margin: "0.12,0.03" },
  placeholder: { shape: "ellipse", style: "filled", height: 0.2, margin: "0.04,0.01" },
  output: { shape: "ellipse", style: "filled", height: 0.2, margin: "0.04,0.01" },
};

function callAttributes(name, closed) {
  const own = [...closed.adapted][0];
  const colours = own === undefined ? "call" : `call adapter a${own}`;
  const kept = closed.kept ? `\nkeeps ${bytes(closed.kept)}` : "";
  return { id: name, class: colours, label: `${closed.call.slice(1, -1)}\n${numberOf(closed.nodes, "node")}${kept}` };
}

function nodeAttributes(module, node, tensors) {
  const lines = [node.label];
  if (node.op === "get_attr" && node.value) lines.push(node.value.split(",")[0]);
  const tensor = tensors.get(node.module);
  if (tensor?.gradient !== undefined) lines.push(`∇ ${rounded(tensor.gradient)}`);
  const site = siteOf(module, node);
  if (node.over && site?.change !== undefined) lines.push(`ΔW/W ${rounded(100 * site.change)} %`);
  const kept = module.kept_by[node.name];
  if (kept) lines.push(`keeps ${bytes(kept)}`);
  const own = node.slot === undefined ? undefined : module.slots[node.slot];
  const classes = [node.op, ...(own === undefined ? [] : ["adapter", `a${own}`]), ...(node.rewrite ? ["rewritten"] : [])];
  return { id: node.name, class: classes.join(" "), label: lines.join("\n"), ...SHAPES[node.op] };
}

// details

function siteOf(module, node) {
  if (node.slot === undefined) return undefined;
  const here = module.sites.filter((site) => (site.adapter ?? 0) === module.slots[node.slot]);
  return here.find((site) => (site.nodes ?? []).includes(node.site)) ?? here[0];
}

function choose(module, node, place) {
  document.querySelectorAll(".chosen").forEach((chosen) => chosen.classList.remove("chosen"));
  place.querySelectorAll(`[data-name="${CSS.escape(node.name)}"]`).forEach((drawn) => drawn.classList.add("chosen"));
  const told = [];
  const tell = (name, ...values) => told.push(element("dt", {}, name), element("dd", {}, ...values));
  const code = (text) => element("code", {}, text);
  tell("op", code(node.op));
  tell("in the graph of", module.path || picture.title);
  if (node.arguments) tell("arguments", code(node.arguments));
  if (node.module) tell("path", code(node.module));
  const value = node.value || module.shapes[node.name];
  if (value) tell("value", value);
  if (node.line) tell("line", code(node.line));
  if (node.calls) tell("inside of the calls", node.calls.join(" "));
  const kept = module.kept_by[node.name];
  if (kept) tell("kept for the backward", bytes(kept));
  const called = node.op === "call_module" && modules.get(module.path ? `${module.path}.${node.module}` : node.module);
  if (called && called.seconds !== undefined) tell("the call", `takes ${duration(called.seconds)}, keeps ${bytes(called.kept ?? 0)}`);
  if (node.over) tell("in the place of", code(node.over));
  if (node.rewrite) tell("rewrite", code(node.rewrite));
  for (const check of node.checks ?? []) tell("checked in each run", check);
  const site = siteOf(module, node);
  if (site) {
    const adapter = picture.adapters[site.adapter ?? 0];
    tell("adapter", `${adapter.name}: ${adapter.method}`, adapter.options ? ` (${adapter.options})` : "");
    tell("site", `${site.label}, ${site.op}, ${site.size}`);
    tell("rule", code(site.rule));
    if (site.change !== undefined) tell("‖ΔW‖ / ‖W‖", `${rounded(100 * site.change)} %`);
    tell("merges", site.merges ? `no: ${site.merges}` : "yes");
    const rows = (site.tensors ?? []).map((tensor) => element("tr", {},
      element("td", {}, tensor.name), element("td", {}, tensor.shape),
      element("td", {}, tensor.gradient !== undefined ? `∇ ${rounded(tensor.gradient)}` : tensor.trained ? "trained" : "frozen")));
    if (rows.length) tell("parameters", element("table", {}, ...rows));
  }
  document.getElementById("details").replaceChildren(element("h2", {}, node.label), element("dl", {}, ...told));
}

// search

const MOST_FOUND = 60;

// the nodes of a module's graphs, each at the first mode that has it
function nodesByName(module) {
  const found = new Map();
  (module.graphs === undefined ? [] : picture.graphs[module.graphs]).forEach((graph, mode) => {
    for (const node of graph.after) if (!found.has(node.name)) found.set(node.name, { node, mode });
  });
  return found.values();
}

function search(text) {
  const wanted = text.trim().toLowerCase();
  const place = document.getElementById("found");
  place.replaceChildren();
  place.hidden = !wanted;
  if (!wanted) return;
  const fits = (...parts) => parts.some((part) => part && part.toLowerCase().includes(wanted));
  const found = [];
  for (const module of modules.values()) {
    if (fits(module.path, module.cls)) found.push([`${module.path || picture.title}: ${module.cls}`, () => showModule(module)]);
    for (const { node, mode } of nodesByName(module)) {
      if (fits(node.name, node.label, node.line)) found.push([`${module.path || picture.title} › ${node.name}`, () => showNode(module, node, mode)]);
    }
  }
  const shown = found.slice(0, MOST_FOUND).map(([label, act]) => element("li", {}, element("button", { type: "button", click: act }, label)));
  if (found.length > MOST_FOUND) shown.push(element("li", { class: "quiet" }, `and ${found.length - MOST_FOUND} more`));
  if (!found.length) shown.push(element("li", { class: "quiet" }, "nothing"));
  place.append(...shown);
}

async function showModule(module) {
  const shown = await reach(module.path);
  shown.scrollIntoView({ block: "start" });
  return shown;
}

async function showNode(module, node, mode) {
  const shown = await showModule(module);
  const place = shown.querySelector(".graphs");
  await place.showMode(mode);
  for (const call of node.calls ?? []) await place.querySelector(`[data-name="${CSS.escape(`call:${call}`)}"]`)?.act();
  choose(module, node, place);
  place.querySelector(`.after [data-name="${CSS.escape(node.name)}"]`)?.scrollIntoView({ block: "center", inline: "center" });
}

// the page

async function setAll(open) {
  const place = document.getElementById("model");
  let closed;
  if (!open) return place.querySelectorAll("details").forEach((each) => (each.open = false));
  while ((closed = [...place.querySelectorAll("details")].filter((each) => !each.open && !each.matches(".untouched"))).length) {
    for (const each of closed) each.open = true;
    await Promise.all(closed.map((each) => each.fill?.())); // a list of names is whole from the start
  }
  await Promise.all([...place.querySelectorAll(".graphs:has(.node.call)")].map((each) => each.openAll()));
  document.body.dataset.opened = "all";
}

function start() {
  document.querySelector("h1").textContent = picture.title;
  picture.adapters ??= [];
  document.getElementById("adapters").append(...picture.adapters.map((adapter, place) => element(
    "li", { style: colour(place) },
    element("b", {}, adapter.name), ` ${adapter.method}${adapter.options ? ` (${adapter.options})` : ""} `,
    element("small", {}, `${adapter.state}; ${numberOf(adapter.sites ?? 0, "site")}, ${numberOf(adapter.parameters ?? 0, "parameter")}`),
  )));
  const style = element("style", {}, picture.adapters.map((_, place) => `svg .a${place} { ${colour(place)}; }`).join("\n"));
  document.head.append(style);
  const place = document.getElementById("model");
  const refused = picture.refused ?? [];
  if (refused.length) {
    place.append(element("details", { class: "refusals", open: true },
      element("summary", {}, `${refused.length} refused`),
      element("ul", {}, ...refused.map((each) => element("li", {}, element("b", {}, each.name), `: ${each.reason}; ${each.way_out}`)))));
  }
  if (picture.skipped?.length) {
    place.append(element("details", { class: "refusals" },
      element("summary", {}, `${picture.skipped.length} left out by the config`), element("p", {}, picture.skipped.join(", "))));
  }
  if (picture.remark) place.append(element("p", { class: "remark" }, picture.remark));
  place.append(moduleElement(picture.model));
  document.getElementById("search").addEventListener("input", (event) => search(event.target.value));
  document.getElementById("sides").addEventListener("change", (event) => (document.body.className = { both: "", before: "only-before", after: "only-after" }[event.target.value]));
  document.getElementById("unfold").addEventListener("click", () => setAll(true));
  document.getElementById("fold").addEventListener("click", () => setAll(false));
  const first = [...modules.values()].find((module) => module.sites.length) ?? [...modules.values()].find((module) => module.graphs !== undefined);
  return reach(first?.path ?? "").then(() => (document.body.dataset.ready = "yes"));
}

start();
