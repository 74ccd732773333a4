"use strict";
// A click on the head of a column sorts the table, largest first; another, smallest first. Cells without a value last.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    const value = (row) => {
      const text = row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const number = Number(text.replaceAll(",", ""));
      return text === "–" || text === "" ? null : Number.isNaN(number) ? text : number;
    };
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign < 0 ? "descending" : "ascending");
      const order = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
      const rows = [...body.rows].map((row) => [value(row), row]);
      rows.sort(([a], [b]) => (a === null) - (b === null) || (a === null ? 0 : sign * order(a, b)));
      body.append(...rows.map(([, row]) => row));
    });
  });
}
// What a figure's <title> elements say is shown at once, beside the pointer.
for (const title of document.querySelectorAll("svg title")) {
  title.parentNode.dataset.tip = title.textContent;
  title.remove();
}
const tip = document.body.appendChild(document.createElement("div"));
tip.id = "tip";
tip.hidden = true;
document.addEventListener("pointermove", (event) => {
  const on = event.target.closest("[data-tip]");
  tip.hidden = !on;
  if (!on) return;
  tip.textContent = on.dataset.tip;
  const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = `${Math.max(8, Math.min(event.clientX + 12, room))}px`;
  const below = event.clientY + 16;
  tip.style.top = `${below + tip.offsetHeight > window.innerHeight ? event.clientY - tip.offsetHeight - 8 : below}px`;
});
