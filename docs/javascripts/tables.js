"use strict";
// Gives large tables a box that filters their rows, and columns that sort. Tables with the same headings share a box.

(() => {
  const LARGE = 15; // rows; a smaller table needs no filter
  const UNITS = { ns: 1e-9, "µs": 1e-6, ms: 1e-3, s: 1, kB: 1e3, MB: 1e6, GB: 1e9 };
  const HEADING = /^H[2-6]$/;
  const article = document.querySelector(".md-content__inner");
  const words = new Intl.Collator("en", { numeric: true, sensitivity: "base" });
  const rowsOf = (tables) => tables.flatMap((table) => [...table.tBodies[0].rows]);

  function element(name, attributes, ...inside) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...inside);
    return made;
  }

  // sorting: by the first number of each cell if all have one, else by their texts; empty cells come last

  function number(text) {
    const found = text.replaceAll(",", "").match(/^[^\w-]*(-?\d+\.?\d*)\s*(\S*)/);
    return found ? Number(found[1]) * (UNITS[found[2]] ?? 1) : NaN;
  }

  function sort(table, column, sign) {
    const cells = rowsOf([table]).map((row) => ({ row, text: row.cells[column].textContent.trim() }));
    const full = cells.filter((cell) => cell.text);
    for (const cell of full) cell.number = number(cell.text);
    const numeric = full.every((cell) => !Number.isNaN(cell.number));
    full.sort((one, other) => sign * (numeric ? one.number - other.number : words.compare(one.text, other.text)));
    table.tBodies[0].append(...[...full, ...cells.filter((cell) => !cell.text)].map((cell) => cell.row));
  }

  function makeSortable(table) {
    const heads = [...table.tHead.rows[0].cells].filter((head) => head.textContent.trim());
    for (const head of heads) {
      const button = element("button", { type: "button", class: "table-sort" }, ...head.childNodes);
      button.addEventListener("click", () => {
        const rises = head.getAttribute("aria-sort") !== "ascending";
        for (const each of heads) each.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", rises ? "ascending" : "descending");
        sort(table, head.cellIndex, rises ? 1 : -1);
      });
      head.append(button);
    }
  }

  // filtering: a row stays if it has all words, in any order; of several tables, one without rows goes with its section

  function sections() {
    const found = [[]];
    for (const child of article.children) {
      if (HEADING.test(child.tagName)) found.push([]);
      if (!child.matches(".table-filter")) found.at(-1).push(child);
    }
    return found;
  }

  function filter(tables, text) {
    const wanted = text.toLowerCase().split(/\s+/);
    for (const row of rowsOf(tables)) {
      const content = row.textContent.toLowerCase();
      row.hidden = !wanted.every((word) => content.includes(word));
    }
    for (const table of tables) table.hidden = rowsOf([table]).every((row) => row.hidden);
    for (const section of tables.length > 1 ? sections() : []) {
      const inside = section.flatMap((each) => [...each.querySelectorAll("table")]);
      if (!inside.some((table) => tables.includes(table))) continue;
      for (const each of section) each.hidden = inside.every((table) => table.hidden);
    }
    return rowsOf(tables).filter((row) => !row.hidden).length;
  }

  function makeFilter(tables) {
    const all = rowsOf(tables).length;
    const input = element("input", { type: "search", placeholder: "Filter rows", "aria-label": "Filter rows" });
    const rows = `${all} ${all === 1 ? "row" : "rows"}`;
    const told = element("output", {}, rows);
    input.addEventListener("input", () => (told.value = `${filter(tables, input.value.trim())} of ${rows}`));
    let place = tables[0];
    while (place.parentElement !== article) place = place.parentElement;
    // in front of the first section, which may be filtered away
    while (tables.length > 1 && place.previousElementSibling && !HEADING.test(place.tagName)) place = place.previousElementSibling;
    place.before(element("div", { class: "table-filter" }, input, told));
  }

  const groups = new Map();
  for (const table of article?.querySelectorAll("table:not([class])") ?? []) {
    if (!table.tHead || !table.tBodies[0] || table.closest(".doc")) continue; // arguments, in docstrings, have an order
    groups.set(table.tHead.textContent, [...(groups.get(table.tHead.textContent) ?? []), table]);
  }
  for (const tables of groups.values()) {
    if (rowsOf(tables).length >= LARGE) makeFilter(tables);
    for (const table of tables) if (rowsOf([table]).length >= LARGE) makeSortable(table);
  }
})();
