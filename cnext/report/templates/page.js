"use strict";
// What is wider than the page gets a hint, and can be reached by keyboard; what is not is left out of the tab order.
document.documentElement.classList.add("measured");
const measure = new ResizeObserver(found => {
  for (const { target } of found) {
    const more = target.scrollWidth > target.clientWidth + 1;
    target.classList.toggle("scrolls", more);
    if (more) target.tabIndex = 0; else target.removeAttribute("tabindex");
  }
});
for (const wide of document.querySelectorAll(".wide")) measure.observe(wide);
for (const table of document.querySelectorAll("table.data")) {
  const head = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const text = cell => cell.textContent.trim();
  const lines = () => [head, ...[...body.rows].map(row => [...row.cells])].map(row => row.map(text));
  const figure = shown => parseFloat(shown.replace("\u2212", "-").replace(/,/g, ""));
  if (body.rows.length > 2) head.forEach((cell, column) => {
    const sort = document.createElement("button");
    sort.append(...cell.childNodes);
    cell.append(sort);
    sort.onclick = () => {
      const words = cell.classList.contains("words"), first = words ? "ascending" : "descending";
      const turn = (cell.ariaSort === first) === words ? -1 : 1;
      head.forEach(other => other.removeAttribute("aria-sort"));
      cell.setAttribute("aria-sort", turn > 0 ? "ascending" : "descending");
      const key = row => text(row.cells[column]);
      const order = (a, b) => {
        if (words) return a.localeCompare(b, undefined, { numeric: true });
        const [x, y] = [figure(a), figure(b)];
        if (isNaN(x) !== isNaN(y)) return isNaN(x) ? turn : -turn;
        return isNaN(x) ? a.localeCompare(b) : x - y;
      };
      body.append(...[...body.rows].sort((a, b) => turn * order(key(a), key(b))));
    };
  });
  const csv = () => lines().map(row => row.map(cell => `"${cell.replace(/"/g, '""')}"`).join(",")).join("\n");
  const signs = { "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "\u2212": "$-$",
    "\u00b1": "$\\pm$", "\u2013": "--", "<": "$<$", ">": "$>$", "|": "$|$", "\u03a3": "$\\Sigma$", "\u2192": "$\\to$" };
  const tex = cell => cell.replace(/[&%$#_{}]|[\\~^\u2212\u00b1\u2013<>|\u03a3\u2192]/g, sign => signs[sign] || "\\" + sign);
  const latex = () => {
    const [first, ...rest] = lines().map(row => row.map(tex).join(" & ") + " \\\\");
    const columns = head.map(cell => cell.classList.contains("words") ? "l" : "r").join("");
    return [`\\begin{tabular}{${columns}}`, "\\toprule", first, "\\midrule", ...rest, "\\bottomrule", "\\end{tabular}"].join("\n");
  };
  const bar = document.createElement("p");
  bar.className = "copy";
  for (const [name, make] of [["CSV", csv], ["LaTeX", latex]]) {
    const copy = document.createElement("button");
    copy.textContent = `copy as ${name}`;
    copy.onclick = () => {
      const area = document.createElement("textarea");
      area.value = make();
      area.readOnly = true;
      area.setAttribute("aria-label", `the table as ${name}`);
      bar.querySelector("textarea")?.remove();
      bar.append(area);
      area.select();
      const shown = done => { copy.textContent = done ? `copied as ${name}` : `select and copy: ${name}`; if (done) area.remove(); };
      if (navigator.clipboard) navigator.clipboard.writeText(area.value).then(() => shown(true), () => shown(false));
      else shown(false);
    };
    bar.append(copy);
  }
  table.parentElement.after(bar);
}
