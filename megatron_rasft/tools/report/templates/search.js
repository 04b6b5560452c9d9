"use strict";

// Searches and sorts all rollouts of a run. They are in compressed blocks, of which the browser unpacks only those that it needs.

const NUM_SHOWN = 50; // rows that are shown at first, and added by "show more"
const MAX_KEPT_CHARS = 250e6; // of unpacked texts, which make the next searches fast
const SNIPPET_CHARS = 70;
const LABELS = { true: "correct", false: "not correct", null: "not an attempt" };

// The columns of a table: name, value of a row, and how the value is written.
const COLUMNS = {
  rollouts: [
    { name: "problem", value: (row) => row.problem, isOpener: true },
    { name: "refresh", value: (row) => row.step, isNumber: true },
    { name: "sample", value: (row) => row.sample, isNumber: true },
    { name: "verdict", value: (row) => row.verdict, swatch: (row) => `var(--verdict-${row.verdict})` },
    { name: "reason", value: (row) => row.reason },
    { name: "finish", value: (row) => row.finish },
    { name: "tokens", value: (row) => row.numTokens, isNumber: true },
    { name: "weight", value: (row) => row.weight, isNumber: true, text: (row) => (row.weight ? row.weight.toPrecision(3) : "–") },
  ],
  problems: [
    { name: "problem", value: (row) => row.problem, isOpener: true },
    { name: "course", value: (row) => row.course },
    { name: "refreshes", value: (row) => row.history.length, isNumber: true },
    { name: "samples", value: (row) => sum(row.history.map((visit) => visit[1])), isNumber: true },
    { name: "first solved", value: (row) => rate(row.history[0]), isNumber: true, text: (row) => percent(rate(row.history[0])) },
    { name: "last solved", value: (row) => rate(row.history.at(-1)), isNumber: true, text: (row) => percent(rate(row.history.at(-1))) },
    { name: "change", value: (row) => rate(row.history.at(-1)) - rate(row.history[0]), isNumber: true, text: (row) => change(row) },
  ],
};

const sum = (values) => values.reduce((total, value) => total + value, 0);
const rate = (visit) => visit[4]; // the mean reward, if there are rewards
const percent = (share) => `${(100 * share).toFixed(0)}%`;
const change = (row) => {
  const points = Math.round(100 * (rate(row.history.at(-1)) - rate(row.history[0])));
  return points ? `${points > 0 ? "+" : "−"}${Math.abs(points)} points` : "0";
};

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((child) => child !== null));
  return made;
}

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let place = 0; place < text.length; place++) bytes[place] = text.charCodeAt(place);
  return bytes;
}

function unpacked(base64) {
  const stream = new Blob([bytesOf(base64)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).text();
}

// One compressed block: rows for the tables, and the texts of each row.
class Block {
  static numKeptChars = 0;

  constructor(script, formulas) {
    this.step = Number(script.dataset.step);
    this.drawn = formulas; // (formula, MathML) of all blocks of this kind
    [this.packedRows, this.packedTexts, this.packedFormulas] = script.textContent.trim().split(" ");
    script.remove(); // the strings are kept once
  }

  async rows() {
    const rows = JSON.parse(await unpacked(this.packedRows));
    this.packedRows = null;
    return rows;
  }

  // The texts are kept, unless many others are kept already.
  joinedTexts() {
    this.joined ??= unpacked(this.packedTexts).then((text) => {
      if (Block.numKeptChars + text.length > MAX_KEPT_CHARS) this.joined = undefined;
      else Block.numKeptChars += text.length;
      return text;
    });
    return this.joined;
  }

  // Texts as elements, with their formulas drawn.
  async written(...places) {
    const texts = (await this.joinedTexts()).split("\0");
    const numbers = JSON.parse(await unpacked(this.packedFormulas));
    return places.map((place) => textOf(texts[place], numbers[place].map((number) => this.drawn[number])));
  }
}

// The rollouts and problems of one run.
class Archive {
  static async read(part) {
    const archive = new Archive();
    const blocks = async (kind) => {
      const formulas = JSON.parse(await unpacked(part.querySelector(`script[data-formulas=${kind}]`).textContent.trim()));
      return [...part.querySelectorAll(`script[data-kind=${kind}]`)].map((script) => new Block(script, formulas));
    };
    archive.blocks = await blocks("rollouts");
    archive.rollouts = [];
    archive.byProblem = new Map();
    for (const block of archive.blocks) archive.addRollouts(block, await block.rows());
    archive.problems = [];
    for (const block of await blocks("problems")) {
      block.members = (await block.rows()).map(([problem, course, history, hasTexts], place) => ({ block, place, problem, course, history, hasTexts }));
      archive.problems.push(...block.members);
    }
    archive.problemOf = new Map(archive.problems.map((row) => [row.problem, row]));
    return archive;
  }

  addRollouts(block, rows) {
    block.members = rows.map(([problem, sample, verdict, reason, finish, filter, numTokens, weight, age, isSolved], place) => {
      const row = { block, place, step: block.step, problem, sample, verdict, reason, finish, filter, numTokens, weight, age, isSolved };
      if (!this.byProblem.has(problem)) this.byProblem.set(problem, []);
      this.byProblem.get(problem).push(row);
      this.rollouts.push(row);
      return row;
    });
  }
}

// The controls and the table of one run.
class Search {
  constructor(part, archive) {
    this.part = part;
    this.archive = archive;
    this.kind = "rollouts";
    this.order = { rollouts: { name: "refresh", isDown: true }, problems: { name: "problem", isDown: false } };
    this.input = part.querySelector("input");
    this.table = part.querySelector("table.results");
    this.more = part.querySelector(".more");
    this.status = part.querySelector("[role=status]");
    this.number = 0; // of the newest search; older ones stop
    this.listen();
  }

  listen() {
    let timer;
    this.input.addEventListener("focus", () => this.prepare(), { once: true });
    this.input.addEventListener("input", () => {
      clearTimeout(timer);
      timer = setTimeout(() => this.run(), 200);
    });
    for (const select of this.part.querySelectorAll("select")) select.addEventListener("change", () => this.run());
    for (const button of this.part.querySelectorAll("button[data-kind]")) {
      button.addEventListener("click", () => {
        this.kind = button.dataset.kind;
        for (const other of this.part.querySelectorAll("button[data-kind]")) other.setAttribute("aria-pressed", String(other === button));
        for (const select of this.part.querySelectorAll("select")) select.hidden = this.kind === "problems";
        this.run();
      });
    }
    this.more.addEventListener("click", () => this.show(this.numShown + NUM_SHOWN));
  }

  // Unpacks the texts while somebody types.
  async prepare() {
    for (const block of this.archive.blocks) {
      await block.joinedTexts();
      if (block.joined === undefined) return; // no room for more
    }
  }

  // Finds the rows that the controls select. Before texts are unpacked, rows that the other controls leave out are dropped.
  async run() {
    const number = ++this.number;
    const text = this.input.value.trim();
    const pattern = new RegExp(text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), "i");
    const rows = this.kind === "problems" ? this.archive.problems : this.archive.rollouts.filter((row) => this.isSelected(row));
    this.snippets = new Map();
    if (!text) {
      this.found = rows;
    } else {
      const byBlock = Map.groupBy(rows, (row) => row.block);
      this.found = [];
      let numDone = 0;
      let shownAt = performance.now();
      for (const [block, members] of byBlock) {
        await this.searchBlock(block, members, pattern);
        if (number !== this.number) return;
        numDone++;
        if (performance.now() - shownAt > 400) {
          this.status.textContent = `${percent(numDone / byBlock.size)} searched, ${this.found.length.toLocaleString("en")} found`;
          shownAt = performance.now();
        }
      }
    }
    this.status.textContent = `${this.found.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} ${this.kind}`;
    this.sort();
  }

  isSelected(row) {
    const [verdict, use] = [...this.part.querySelectorAll("select")].map((select) => select.value);
    return (!verdict || row.verdict === verdict) && (!use || (row.weight !== 0) === (use === "yes"));
  }

  async searchBlock(block, members, pattern) {
    const joined = await block.joinedTexts();
    const texts = pattern.test(joined) ? joined.split("\0") : [];
    const size = texts.length / block.members.length; // texts of a row
    for (const row of members) {
      const own = texts.slice(row.place * size, (row.place + 1) * size).join("\n");
      const match = pattern.exec(own);
      if (match) this.snippets.set(row, snippet(own, match.index, match[0].length));
      if (match || pattern.test(row.problem)) this.found.push(row);
    }
  }

  sort() {
    const { name, isDown } = this.order[this.kind];
    const { value } = COLUMNS[this.kind].find((column) => column.name === name);
    const sign = isDown ? -1 : 1;
    const compare = (a, b) => (value(a) < value(b) ? -sign : value(a) > value(b) ? sign : 0);
    this.found = [...this.found].sort(compare);
    this.head();
    this.show(NUM_SHOWN);
  }

  head() {
    const { name, isDown } = this.order[this.kind];
    const cells = COLUMNS[this.kind].map((column) => {
      const isSorted = column.name === name;
      const button = element("button", { type: "button", className: "sort", textContent: column.name + (isSorted ? (isDown ? " ↓" : " ↑") : "") });
      button.addEventListener("click", () => {
        // numbers begin with the largest, names with the first of the alphabet
        this.order[this.kind] = { name: column.name, isDown: isSorted ? !isDown : Boolean(column.isNumber) };
        this.sort();
      });
      const cell = element("th", { scope: "col", className: column.isNumber ? "number" : "" }, button);
      if (isSorted) cell.ariaSort = isDown ? "descending" : "ascending";
      return cell;
    });
    this.table.tHead.replaceChildren(element("tr", {}, ...cells));
  }

  show(limit) {
    this.numShown = limit;
    this.table.tBodies[0].replaceChildren(...this.found.slice(0, limit).flatMap((row) => this.rowOf(row)));
    this.more.hidden = this.found.length <= limit;
  }

  rowOf(row) {
    const columns = COLUMNS[this.kind];
    const cells = columns.map((column) => {
      const text = column.text ? column.text(row) : column.isNumber ? column.value(row).toLocaleString("en") : column.value(row);
      const content = column.isOpener ? this.opener(row, text) : text;
      const swatch = column.swatch ? element("i", { className: "swatch" }) : null;
      if (swatch) swatch.style.background = column.swatch(row);
      return element("td", { className: column.isNumber ? "number" : "" }, swatch, content);
    });
    const rows = [element("tr", {}, ...cells)];
    const found = this.snippets.get(row);
    if (found) {
      const mark = element("mark", { textContent: found.match });
      rows.push(element("tr", { className: "snippet" }, element("td", { colSpan: columns.length }, found.before, mark, found.after)));
    }
    return rows;
  }

  // The button that opens a problem below its row, and closes it.
  opener(row, text) {
    const button = element("button", { type: "button", className: "open", textContent: text, ariaExpanded: "false" });
    button.addEventListener("click", async () => {
      if (button.opened) {
        button.opened.remove();
        button.opened = null;
      } else {
        const cell = element("td", { colSpan: COLUMNS[this.kind].length });
        button.opened = element("tr", { className: "opened" }, cell);
        const next = button.closest("tr").nextElementSibling;
        (next?.className === "snippet" ? next : button.closest("tr")).after(button.opened);
        cell.append(await this.problemView(row));
      }
      button.ariaExpanded = String(Boolean(button.opened));
    });
    return button;
  }

  // A problem with its history, its texts, and beside them its rollouts. The chosen rollout comes first.
  async problemView(chosen) {
    const problem = this.archive.problemOf.get(chosen.problem);
    const rollouts = [...(this.archive.byProblem.get(chosen.problem) ?? [])].sort((a, b) => b.step - a.step || a.sample - b.sample);
    const first = this.kind === "rollouts" ? chosen : rollouts[0];
    const left = element("div", { className: "demonstration" });
    if (problem) left.append(...historyOf(problem.history));
    if (problem?.hasTexts) {
      const place = 3 * problem.place;
      const texts = await problem.block.written(place, place + 1, place + 2);
      ["Problem", "Answer or tests", "Demonstration"].forEach((title, number) => left.append(heading(title), texts[number]));
    } else {
      left.append(element("p", { className: "missing", textContent: "The problem's text was not found." }));
    }
    const right = element("div", { className: "rollouts" });
    if (first) right.append(heading(`Refresh after step ${first.step}, sample ${first.sample}`), ...(await rolloutView(first)));
    const others = rollouts.filter((row) => row !== first);
    if (others.length) right.append(heading(`${others.length} more rollouts of this problem`), ...others.map(foldedRollout));
    return element("div", { className: "beside" }, left, right);
  }
}

function snippet(text, place, length) {
  const start = Math.max(0, place - SNIPPET_CHARS);
  const end = place + length;
  return {
    before: (start ? "… " : "") + text.slice(start, place),
    match: text.slice(place, end),
    after: text.slice(end, end + SNIPPET_CHARS) + (end + SNIPPET_CHARS < text.length ? " …" : ""),
  };
}

const heading = (text) => element("h5", { textContent: text });

// The MathML was written by the report from known elements, so it may be parsed. All else is text.
function textOf(text, formulas) {
  if (!text) return element("pre", {}, element("span", { className: "left-out", textContent: "(empty)" }));
  const made = element("pre", { className: formulas.length ? "prose" : "" });
  let end = 0;
  for (const [source, markup] of formulas) {
    const start = text.indexOf(source, end);
    made.append(text.slice(end, start), element("template", { innerHTML: markup }).content);
    end = start + source.length;
  }
  made.append(text.slice(end));
  return made;
}

function historyOf(history) {
  const bars = history.map((visit) => {
    const bar = element("i");
    bar.style.height = `${100 * rate(visit)}%`;
    return element("span", { title: `after step ${visit[0]}: ${visit[3]} of ${visit[2]} correct` }, bar);
  });
  const [first, last] = [history[0], history.at(-1)];
  const range = history.length > 1 ? `refreshes after steps ${first[0]} to ${last[0]}` : `refresh after step ${first[0]}`;
  return [
    heading("Solve rate by refresh"),
    element("div", { className: "history" }, ...bars),
    element("p", { className: "note", textContent: `${range}: ${history.slice(-8).map((visit) => `${visit[3]}/${visit[2]}`).join(" → ")}` }),
  ];
}

function summaryOf(row) {
  const swatch = element("i", { className: "swatch" });
  swatch.style.background = `var(--verdict-${row.verdict})`;
  const facts = [
    row.reason,
    `${row.numTokens.toLocaleString("en")} tokens`,
    `finish reason ${row.finish}`,
    row.weight ? `weight ${row.weight.toPrecision(3)}` : "not trained on",
    row.filter && `removed by the filter ${row.filter}`,
    row.age && `weights ${row.age} steps behind`,
  ];
  const verdict = element("span", { className: "verdict", title: LABELS[row.isSolved] }, swatch, row.verdict);
  return [verdict, element("span", { className: "quiet", textContent: facts.filter(Boolean).join(" · ") })];
}

async function rolloutView(row) {
  return [element("p", {}, ...summaryOf(row)), ...(await row.block.written(row.place))];
}

// A rollout whose text is unpacked when it is opened.
function foldedRollout(row) {
  const where = element("span", { className: "quiet", textContent: `step ${row.step}, sample ${row.sample}  ` });
  const folded = element("details", {}, element("summary", {}, where, ...summaryOf(row)));
  folded.addEventListener("toggle", async () => folded.append(...(await row.block.written(row.place))), { once: true });
  return folded;
}

async function startSearches() {
  for (const part of document.querySelectorAll(".search")) {
    const search = new Search(part, await Archive.read(part));
    part.querySelector(".controls").hidden = false;
    await search.run();
  }
  document.documentElement.dataset.searchable = "";
}

startSearches();
