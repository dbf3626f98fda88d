"use strict";
// The tooltip of a number is the jq expression that reads it from report.json.
for (const each of document.querySelectorAll("[data-key]")) each.title = `report.json: ${each.dataset.key}`;

for (const table of document.querySelectorAll("table[data-sortable]")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => sort(table, heads, column));
  });
}

// The first click sorts numbers in descending and texts in ascending order, the second click reverses the order. Rows
// without a value stay last.
function sort(table, heads, column) {
  const head = heads[column], numeric = head.classList.contains("number"), was = head.getAttribute("aria-sort");
  const first = numeric ? "descending" : "ascending", other = numeric ? "ascending" : "descending";
  const order = was === first ? other : first;
  heads.forEach(each => each.setAttribute("aria-sort", each === head ? order : "none"));
  const value = row => {
    const cell = row.cells[column];
    return numeric ? Number(cell.dataset.value ?? NaN) : cell.textContent.trim();
  };
  const empty = each => numeric ? Number.isNaN(each) : each === "";
  const sign = order === "ascending" ? 1 : -1;
  const rows = [...table.tBodies[0].rows].map(row => [value(row), row]);
  rows.sort(([a], [b]) => empty(a) - empty(b) || (empty(a) ? 0 :
    sign * (numeric ? a - b : a.localeCompare(b, "en", {numeric: true}))));
  table.tBodies[0].append(...rows.map(([, row]) => row));
}

// Opens all <details> for printing.
const folded = [];
addEventListener("beforeprint", () => {
  for (const each of document.querySelectorAll("details:not([open])")) { each.open = true; folded.push(each); }
});
addEventListener("afterprint", () => { for (const each of folded.splice(0)) each.open = false; });

// Copies the text of an element. Where the page may not write to the clipboard, it selects the text.
for (const button of document.querySelectorAll("button[data-copies]")) {
  button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copies);
    try {
      await navigator.clipboard.writeText(source.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(source);
      button.textContent = document.execCommand("copy") ? "Copied" : "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
}

// The search field hides the layers whose rows do not contain its words.
const search = document.getElementById("layer-search"), layerRows = [...document.querySelectorAll("#layers-table tbody tr")];
function filter() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const row of layerRows) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
  const shown = layerRows.filter(row => !row.hidden).length;
  document.getElementById("layer-count").value = words.length ? `${shown} of ${layerRows.length} layers` : "";
}
search.addEventListener("input", filter);

// A click on a bar or on the name of a layer opens its details.
const dialog = document.getElementById("layer-dialog"), articles = [...dialog.querySelectorAll("article")];
let opened = 0;
function open(number) {
  opened = (number + articles.length) % articles.length;
  articles.forEach((article, each) => { article.hidden = each !== opened; });
  const row = document.querySelector(`button.opens[data-layer="${opened}"]`).closest("tr"), list = [];
  document.getElementById("layer-title").textContent = row.cells[0].textContent;
  [...row.cells].slice(1).forEach((cell, n) => {
    const head = row.closest("table").tHead.rows[0].cells[n + 1], value = document.createElement("dd");
    value.append(...[...cell.cloneNode(true).childNodes]);
    value.title = cell.title;
    if (!value.textContent.trim()) return;
    const name = document.createElement("dt");
    name.textContent = head.title ? `${head.textContent}: ${head.title}` : head.textContent;
    list.push(name, value);
  });
  document.getElementById("layer-row").replaceChildren(...list);
  if (!dialog.open) dialog.showModal();
}
for (const each of document.querySelectorAll("button[data-layer], rect[data-layer]")) {
  each.addEventListener("click", () => open(Number(each.dataset.layer)));
}
document.getElementById("layer-before").addEventListener("click", () => open(opened - 1));
document.getElementById("layer-after").addEventListener("click", () => open(opened + 1));
dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
