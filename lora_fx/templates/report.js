"use strict";
// The page is whole without this. It adds arrow keys and a line of text to grids, and sorting to tables.
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
for (const table of document.querySelectorAll("table.sorted")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    if (!head.textContent.trim() || head.hasAttribute("data-plain")) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "descending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "ascending" : "descending");
      const value = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
      const compare = (a, b) => {
        const [x, y] = [value(a), value(b)];
        const [m, n] = [Number(x), Number(y)];
        const isNumber = x !== "" && y !== "" && !Number.isNaN(m) && !Number.isNaN(n);
        return isNumber ? m - n : x.localeCompare(y);
      };
      const rows = [...table.tBodies[0].rows].sort((a, b) => (down ? compare(a, b) : compare(b, a)));
      table.tBodies[0].append(...rows);
    });
  });
}
