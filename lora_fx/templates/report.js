"use strict";
// The page is whole without this. It adds arrow keys and a line of text to grids, and sorting and a filter to tables.
for (const table of document.querySelectorAll("table.grid")) {
  const rows = [...table.querySelectorAll("tbody tr.cells")].map((row) => [...row.querySelectorAll("td")]);
  const said = table.closest("figure").querySelector(".said");
  table.setAttribute("role", "grid");
  const cells = rows.flat();
  for (const cell of cells) {
    cell.setAttribute("role", "gridcell");
    cell.tabIndex = -1;
  }
  if (cells.length) cells[0].tabIndex = 0;
  const show = (cell) => { said.textContent = cell.title || " "; };
  table.addEventListener("mouseover", (event) => {
    const cell = event.target.closest("td");
    if (cell) show(cell);
  });
  table.addEventListener("focusin", (event) => {
    const cell = event.target.closest("td");
    if (!cell) return;
    for (const other of cells) other.tabIndex = -1;
    cell.tabIndex = 0;
    show(cell);
  });
  table.addEventListener("keydown", (event) => {
    const y = rows.findIndex((row) => row.includes(event.target));
    if (y < 0) return;
    const x = rows[y].indexOf(event.target);
    const last = rows[y].length - 1;
    const to = {
      ArrowLeft: [y, x - 1], ArrowRight: [y, x + 1], ArrowUp: [y - 1, x], ArrowDown: [y + 1, x],
      Home: [y, 0], End: [y, last],
    }[event.key];
    const next = to && rows[to[0]] && rows[to[0]][to[1]];
    if (!to) return;
    event.preventDefault();
    if (next) next.focus();
  });
}
const bySorting = new Intl.Collator("en", { numeric: true });
for (const table of document.querySelectorAll("table.sorted")) {
  const heads = [...table.tHead.rows[0].cells];
  const inOrder = [...table.tBodies[0].rows];
  heads.forEach((head, column) => {
    if (!head.textContent.trim() || head.hasAttribute("data-plain")) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    const value = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      const [m, n] = [Number(x), Number(y)];
      const isNumber = x !== "" && y !== "" && !Number.isNaN(m) && !Number.isNaN(n);
      return isNumber ? m - n : bySorting.compare(x, y);
    };
    // The largest number or the first name comes first; the third press brings the model's order back.
    const ways = head.classList.contains("n") ? ["descending", "ascending"] : ["ascending", "descending"];
    button.addEventListener("click", () => {
      const way = ways[ways.indexOf(head.getAttribute("aria-sort")) + 1];
      for (const other of heads) other.removeAttribute("aria-sort");
      const rows = [...inOrder];
      if (way) {
        head.setAttribute("aria-sort", way);
        rows.sort((a, b) => (way === "ascending" ? compare(a, b) : compare(b, a)));
      }
      table.tBodies[0].append(...rows);
    });
  });
  if (inOrder.length > 8) addFilter(table, inOrder);
}
function addFilter(table, rows) {
  const label = document.createElement("label");
  const box = document.createElement("input");
  const found = document.createElement("output");
  box.type = "search";
  box.placeholder = "name, op or remark";
  label.className = "filter";
  label.append("Show rows with ", box, found);
  table.closest(".scroll").before(label);
  const texts = rows.map((row) => row.textContent.toLowerCase());
  box.addEventListener("input", () => {
    const words = box.value.toLowerCase().split(/\s+/);
    rows.forEach((row, index) => { row.hidden = !words.every((word) => texts[index].includes(word)); });
    found.textContent = box.value.trim() ? `${rows.filter((row) => !row.hidden).length} of ${rows.length}` : "";
  });
}
// On paper, nothing is folded away.
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  for (const details of opened) details.open = true;
});
addEventListener("afterprint", () => {
  for (const details of opened) details.open = false;
});
