"use strict";
const pictures = JSON.parse(document.getElementById("pictures").textContent);
const plots = [...document.querySelectorAll(".plot")];
const dark = matchMedia("(prefers-color-scheme: dark)");

// Colours of the page, which plotly cannot read from its styles.
function draw(plot) {
  const style = getComputedStyle(document.documentElement);
  const [fore, dim, line] = ["--fore", "--dim", "--line"].map((name) => style.getPropertyValue(name));
  const variants = pictures[plot.dataset.picture];
  const chosen = plot.closest("section").querySelector("select.metric");
  const { data, layout, said } = structuredClone(variants[chosen ? chosen.value : ""]);
  const figure = plot.closest("figure");
  figure.querySelector("figcaption").textContent = said;
  plot.setAttribute("aria-label", `${figure.querySelector("h3").textContent}: ${said}`);
  for (const trace of data) {
    if (trace.meta === "front") trace.line.color = dim;
    if (trace.meta === "full") {
      trace.line = { color: fore, width: 2, dash: "dash" };
      trace.marker = { color: fore, size: 6 };
    }
  }
  for (const shape of layout.shapes || []) shape.line.color = dim;
  const axis = { gridcolor: line, linecolor: line, zeroline: false, automargin: true };
  Plotly.react(plot, data, {
    ...layout,
    xaxis: { ...axis, ...layout.xaxis },
    yaxis: { ...axis, ...layout.yaxis, title: { ...layout.yaxis.title, standoff: 10 } },
    font: { color: fore, size: 12 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 45, r: 12, t: 12, b: 40 },
    showlegend: false,
    hovermode: "closest",
    hoverlabel: { bgcolor: style.getPropertyValue("--soft"), font: { color: fore }, align: "left" },
  }, { responsive: true, displayModeBar: false });
  plot.dataset.drawn = "yes";
}

// Many pictures: each is drawn when it comes near, and all before printing.
const near = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (entry.isIntersecting) {
      near.unobserve(entry.target);
      draw(entry.target);
    }
  }
}, { rootMargin: "600px" });
plots.forEach((plot) => near.observe(plot));
addEventListener("beforeprint", () => plots.forEach(draw));
const redraw = (within) => plots
  .filter((plot) => plot.dataset.drawn && within.contains(plot))
  .forEach(draw);
dark.addEventListener("change", () => redraw(document));
document.querySelectorAll("select.metric").forEach((select) => {
  select.addEventListener("change", () => redraw(select.closest("section")));
});

// Numbers by size, texts by letters; what has no number comes last either way.
function compare(a, b, down) {
  const [x, y] = [a.dataset.number, b.dataset.number];
  if (x !== undefined && y !== undefined) return down ? y - x : x - y;
  if (x !== undefined || y !== undefined) return x !== undefined ? -1 : 1;
  const order = a.textContent.localeCompare(b.textContent, undefined, { numeric: true });
  return down ? -order : order;
}

document.querySelectorAll("th button").forEach((button) => {
  button.addEventListener("click", () => {
    const head = button.parentElement;
    const body = head.closest("table").tBodies[0];
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentElement.children) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const column = head.cellIndex;
    const rows = [...body.rows].sort((a, b) => compare(a.cells[column], b.cells[column], down));
    body.append(...rows);
    document.getElementById("announced").textContent =
      `Sorted by ${button.textContent}, ${down ? "largest" : "smallest"} first.`;
  });
});
