"use strict";
// The page is complete without this script. With it a heading sorts the table of runs, a field filters it, configurations
// of a figure can be hidden, and a pointer over a figure reads the value beneath it.
const make = (tag, parent, fields = {}) => {
  const element = Object.assign(document.createElement(tag), fields);
  if (parent) parent.append(element);
  return element;
};

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const key = (row, column) => {
    const cell = row.cells[column];
    const raw = cell.dataset.value;
    if (raw === undefined) return cell.textContent;
    return raw === "" ? NaN : Number(raw);
  };
  const compare = (a, b, up) => {
    const missing = (x) => typeof x === "number" && Number.isNaN(x);
    if (missing(a) || missing(b)) return missing(a) - missing(b);
    const order = typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
    return up ? order : -order;
  };
  heads.forEach((head, column) => {
    const button = make("button", null, { type: "button" });
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows];
      rows.sort((a, b) => compare(key(a, column), key(b, column), up));
      body.append(...rows);
    });
  });
  body.querySelectorAll(".case-head").forEach((row) => row.remove()); // for paper
  const bar = make("label", null, { className: "filters", textContent: "Filter " });
  const field = make("input", bar, { type: "search", placeholder: "gpt2 diverged" });
  const shown = make("span", bar);
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = [...body.rows];
    for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
    shown.textContent = ` ${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
  });
  table.parentElement.before(bar);
}

const tip = make("div", document.body, { className: "tip", hidden: true });
tip.setAttribute("role", "status");
const tell = (event, text) => {
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 6);
  tip.style.left = `${Math.max(6, left)}px`;
  tip.style.top = `${Math.max(6, event.clientY - tip.offsetHeight - 10)}px`;
};
const short = (x) => (Math.abs(x) >= 1e5 || (x !== 0 && Math.abs(x) < 1e-3) ? x.toExponential(2) : String(+x.toPrecision(4)));

for (const plot of document.querySelectorAll(".plot")) {
  const svg = plot.querySelector("svg");
  if (!svg || !svg.querySelector("[data-limits]")) continue;
  const frames = [...svg.querySelectorAll("[data-limits]")].map((element) => {
    const [number, x0, x1, y0, y1, xScale, yScale] = element.dataset.limits.split(" ");
    const map = (low, high, scale) => {
      const [a, b] = scale === "log" ? [Math.log(+low), Math.log(+high)] : [+low, +high];
      return (share) => (scale === "log" ? Math.exp(a + share * (b - a)) : a + share * (b - a));
    };
    return { number, box: element.querySelector("path").getBBox(), x: map(x0, x1, xScale), y: map(y0, y1, yScale) };
  });
  const series = [...svg.querySelectorAll("[data-config]")];
  const lines = series.flatMap((element) => {
    const path = element.querySelector(":scope > path");
    const numbers = path ? (path.getAttribute("d").match(/-?[\d.]+/g) || []).map(Number) : [];
    return numbers.length ? [{ element, numbers, ...element.dataset }] : [];
  });
  const cells = plot.dataset.cells ? JSON.parse(plot.dataset.cells) : null;

  const nearest = (frame, at) => {
    let best = null, least = 400;
    for (const line of lines) {
      if (line.frame !== frame.number || line.element.classList.contains("off")) continue;
      for (let i = 0; i + 1 < line.numbers.length; i += 2) {
        const away = (line.numbers[i] - at.x) ** 2 + (line.numbers[i + 1] - at.y) ** 2;
        if (away < least) [best, least] = [{ line, x: line.numbers[i], y: line.numbers[i + 1] }, away];
      }
    }
    return best;
  };
  const look = (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const frame = frames.find(
      ({ box }) => at.x >= box.x && at.x <= box.x + box.width && at.y >= box.y && at.y <= box.y + box.height
    );
    if (!frame) return tell(event, "");
    const value = (x, y) => [
      frame.x((x - frame.box.x) / frame.box.width),
      frame.y(1 - (y - frame.box.y) / frame.box.height),
    ];
    if (cells) {
      const [column, row] = value(at.x, at.y).map(Math.floor);
      const run = cells[frame.number - 1];
      const bits = run.bits[row]?.[column];
      return tell(event, bits == null ? "" : `${run.modules[row]}, step ${run.steps[column]}: ${bits} bits of headroom`);
    }
    const found = nearest(frame, at);
    series.forEach((element) => element.classList.toggle("lit", element === found?.line.element));
    if (!found) return tell(event, "");
    const [x, y] = value(found.x, found.y);
    return tell(event, `${found.line.case} · ${found.line.config} · seed ${found.line.seed}\nstep ${Math.round(x)}: ${short(y)}`);
  };
  svg.addEventListener("pointermove", look);
  svg.addEventListener("pointerdown", look);
  svg.addEventListener("pointerleave", (event) => tell(event, ""));

  const bar = make("div", null, { className: "filters" });
  for (const config of new Set(series.map((element) => element.dataset.config))) {
    const button = make("button", bar, { type: "button", textContent: config });
    button.setAttribute("aria-pressed", "true");
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(on));
      for (const element of series) if (element.dataset.config === config) element.classList.toggle("off", !on);
    });
  }
  if (cells) {
    const label = make("label", bar, { textContent: "Modules with " });
    const field = make("input", label, { type: "search", placeholder: "attn" });
    field.addEventListener("input", () => {
      svg.querySelectorAll(".veil").forEach((veil) => veil.remove());
      const word = field.value.trim().toLowerCase();
      frames.forEach(({ number, box }) => {
        const { modules } = cells[number - 1];
        modules.forEach((module, row) => {
          if (!word || module.toLowerCase().includes(word)) return;
          const veil = document.createElementNS("http://www.w3.org/2000/svg", "rect");
          const height = box.height / modules.length;
          const place = { class: "veil", x: box.x, y: box.y + row * height, width: box.width, height };
          for (const [name, value] of Object.entries(place)) veil.setAttribute(name, value);
          svg.append(veil);
        });
      });
    });
  }
  plot.before(bar);
}
