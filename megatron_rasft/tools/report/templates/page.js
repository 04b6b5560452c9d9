"use strict";

// Draws the charts one by one. Between two charts the browser paints and handles input.
async function drawCharts() {
  const options = {
    mode: "vega-lite",
    actions: false,
    renderer: "svg", // its colours may be variables of the style sheet
    ast: true, // the page's security policy forbids compiling expressions
    tooltip: { theme: "custom", formatTooltip },
    config: {
      autosize: { type: "fit-x", contains: "padding" },
      background: null,
      font: "inherit",
      view: { stroke: null, continuousHeight: 150, discreteHeight: 150 },
      mark: { invalid: "filter" }, // a line skips the steps that only another run has
      line: { strokeWidth: 1.6, strokeJoin: "round" },
      point: { size: 22, filled: true },
      area: { opacity: 0.16 },
      rule: { color: "var(--base)", strokeDash: [2, 2] },
      bar: { binSpacing: 0 },
      legend: { disable: true }, // the page has legends that wrap
      axis: {
        title: null, labelColor: "var(--quiet)", labelFontSize: 11, titleColor: "var(--quiet)", titleFontSize: 11, titleFontWeight: "normal",
        titleAnchor: "end", domainColor: "var(--base)", tickColor: "var(--base)", tickSize: 3,
      },
      axisY: { domain: false, ticks: false, gridColor: "var(--grid)", minExtent: 36, maxExtent: 60 },
    },
  };
  for (const figure of document.querySelectorAll("figure")) {
    const spec = JSON.parse(figure.querySelector("script").textContent);
    const { names, rows } = spec.data;
    const values = rows.map((row) => Object.fromEntries(names.map((name, place) => [name, row[place]])));
    await vegaEmbed(figure.querySelector(".plot"), { ...spec, width: "container", data: { values } }, options);
    await new Promise((resume) => setTimeout(resume));
  }
  document.documentElement.dataset.drawn = "";
}

// A row for each value. Values that a run does not have at a step are left out.
function formatTooltip(values, sanitize) {
  const rows = Object.entries(values).filter(([, value]) => value !== "null");
  return `<table>${rows.map(([name, value]) => `<tr><th>${sanitize(name)}</th><td>${sanitize(value)}</td></tr>`).join("")}</table>`;
}

// Examples are filtered by the course of the problem and by a text.
for (const examples of document.querySelectorAll(".examples")) {
  const controls = examples.querySelector(".controls");
  const buttons = [...controls.querySelectorAll("button")];
  const search = controls.querySelector("input");
  const items = [...examples.querySelectorAll("details.example")];
  const filter = () => {
    const course = buttons.find((button) => button.getAttribute("aria-pressed") === "true").dataset.course;
    const text = search.value.toLowerCase();
    for (const item of items) {
      item.hidden = (course && item.dataset.course !== course) || !item.textContent.toLowerCase().includes(text);
    }
    controls.querySelector("[role=status]").textContent = `${items.filter((item) => !item.hidden).length} of ${items.length}`;
  };
  for (const button of buttons) {
    button.addEventListener("click", () => {
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
      filter();
    });
  }
  search.addEventListener("input", filter);
  controls.hidden = false;
  filter();
}

// The page of a run that goes on is loaded again, but not while somebody searches it or reads a part that they opened.
const live = document.getElementById("live");
if (live) {
  const isReady = () => ["drawn", "searchable"].every((mark) => mark in document.documentElement.dataset);
  const isRead = () =>
    document.querySelector("main details[open], tr.opened") !== null || [...document.querySelectorAll("input")].some((input) => input.value);
  live.hidden = false;
  live.addEventListener("click", () => live.setAttribute("aria-pressed", String(live.getAttribute("aria-pressed") !== "true")));
  setInterval(() => {
    if (live.getAttribute("aria-pressed") === "true" && isReady() && !isRead()) location.reload();
  }, 1000 * live.dataset.seconds);
}

const theme = document.getElementById("theme");
theme.hidden = false;
theme.addEventListener("click", () => {
  const root = document.documentElement;
  const isDark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
});

drawCharts();
