"use strict";

// The pointer reads values off the line charts.
const NS = "http://www.w3.org/2000/svg";

function shown(value, isShare) {
  if (isShare) return (100 * value).toFixed(1) + "%";
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e9)) return value.toExponential(3);
  return value.toLocaleString("en", { maximumSignificantDigits: 5 });
}

function nearest(points, x) {
  let low = 0, high = points.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < x) low = middle + 1; else high = middle;
  }
  return low > 0 && x - points[low - 1][0] < points[low][0] - x ? points[low - 1] : points[low];
}

for (const figure of document.querySelectorAll("figure.lines")) {
  const { share, series } = JSON.parse(figure.querySelector("script.points").textContent);
  const svg = figure.querySelector("svg");
  const pointer = figure.querySelector(".pointer");
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  figure.append(tip);

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const scale = box.width / svg.viewBox.baseVal.width;
    const x = (event.clientX - box.left) / scale;
    const found = series.map((one) => ({ one, point: nearest(one.points, x) }));
    const closest = found.reduce((a, b) => (Math.abs(b.point[0] - x) < Math.abs(a.point[0] - x) ? b : a));
    pointer.replaceChildren();
    const line = document.createElementNS(NS, "line");
    for (const [name, value] of Object.entries({ x1: closest.point[0], x2: closest.point[0], y1: 26, y2: 174 })) {
      line.setAttribute(name, value);
    }
    pointer.append(line);
    tip.replaceChildren(`step ${Math.round(closest.point[2]).toLocaleString("en")}`);
    for (const { one, point } of found) {
      if (Math.abs(point[0] - closest.point[0]) > 4) continue;
      const dot = document.createElementNS(NS, "circle");
      for (const [name, value] of Object.entries({ cx: point[0], cy: point[1], r: 3.5, class: `mark ${one.colour}` })) {
        dot.setAttribute(name, value);
      }
      pointer.append(dot);
      const row = document.createElement("div");
      row.textContent = (series.length > 1 ? `${one.label}: ` : "") + shown(point[3], share);
      tip.append(row);
    }
    tip.hidden = false;
    const frame = figure.getBoundingClientRect();
    const left = closest.point[0] * scale + box.left - frame.left;
    tip.style.top = `${box.top - frame.top + 26 * scale}px`;
    tip.style.left = left + tip.offsetWidth + 16 > figure.clientWidth ? `${left - tip.offsetWidth - 8}px` : `${left + 8}px`;
  });
  svg.addEventListener("pointerleave", () => {
    pointer.replaceChildren();
    tip.hidden = true;
  });
}

// Examples by what became of the problem, and by a text in them.
for (const room of document.querySelectorAll(".examples")) {
  const controls = room.querySelector(".controls");
  const buttons = [...controls.querySelectorAll("button")];
  const search = controls.querySelector("input");
  const status = controls.querySelector("[role=status]");
  const examples = [...room.querySelectorAll("details.example")];
  const filter = () => {
    const course = buttons.find((button) => button.getAttribute("aria-pressed") === "true").dataset.course;
    const text = search.value.toLowerCase();
    let count = 0;
    for (const example of examples) {
      const isShown = (!course || example.dataset.course === course) && example.textContent.toLowerCase().includes(text);
      example.hidden = !isShown;
      count += isShown;
    }
    status.textContent = `${count} of ${examples.length}`;
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

const theme = document.getElementById("theme");
theme.hidden = false;
theme.addEventListener("click", () => {
  const root = document.documentElement;
  const isDark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
});
