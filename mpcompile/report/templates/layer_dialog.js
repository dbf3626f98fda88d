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
for (const each of document.querySelectorAll("button[data-layer], rect[data-layer], g[data-layer]")) {
  each.addEventListener("click", () => open(Number(each.dataset.layer)));
}
document.getElementById("layer-before").addEventListener("click", () => open(opened - 1));
document.getElementById("layer-after").addEventListener("click", () => open(opened + 1));
dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
