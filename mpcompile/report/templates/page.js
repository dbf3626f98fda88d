"use strict";
// The tooltip of a number is the jq expression that reads it from the JSON that the page was made of.
for (const each of document.querySelectorAll("[data-key]")) each.title = `${document.body.dataset.json}: ${each.dataset.key}`;

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
