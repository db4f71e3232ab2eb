"use strict";

// The search box: a row is shown if its text has what is sought, or one of its tasks does ("layers.3.experts.17").
{
  const box = document.getElementById("find"), found = document.getElementById("found");
  const rows = [...document.querySelectorAll("#assignments tbody tr")].map(row => ({
    row, text: row.textContent.toLowerCase(), names: row.dataset.names.toLowerCase().split("\n"),
  }));
  const inRange = (ranges, number) => ranges.split(", ").some(range => {
    const [low, high] = range.split("-").map(Number);
    return low <= number && number <= (high ?? low);
  });
  const has = ({text, names}, sought) => {
    if (text.includes(sought) || names.some(name => name.includes(sought))) return true;
    const [, before, number] = /^(.+\.)(\d+)$/.exec(sought) ?? [];
    return before !== undefined && names.some(name => {
      const at = name.lastIndexOf(".") + 1;
      return name.slice(0, at) === before && /^[\d, -]+$/.test(name.slice(at)) && inRange(name.slice(at), +number);
    });
  };
  document.getElementById("search").hidden = false;
  box.addEventListener("input", () => {
    const sought = box.value.trim().toLowerCase();
    let shown = 0;
    for (const one of rows) {
      one.row.hidden = sought !== "" && !has(one, sought);
      shown += !one.row.hidden;
    }
    found.textContent = sought ? `${shown} of ${rows.length} rows` : "";
  });
}

// The chart: every trace has a canvas, all on one scale. A view is ns since the first event of each trace, or since its
// first decode step: then each trace has its own shift.
const traces = document.getElementById("traces");
if (traces) {
  const charts = JSON.parse(traces.textContent);
  const timeline = document.getElementById("timeline"), tip = document.getElementById("tip");
  const canvases = [...timeline.querySelectorAll("canvas")];
  const ROW = 26, TOP = 40, SHORTEST = 200;
  const end = Math.max(1, ...charts.map(chart => chart.end));
  const view = {from: 0, to: end};
  const style = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const DARK_TEXT = "#111111", LIGHT_TEXT = "#ffffff", LIGHT_ON = ["attention", "head"];
  let pending = false, colours = {}, gutter = 100, shifts = charts.map(() => 0);
  timeline.hidden = false;

  const readColours = () => {
    colours = {};
    for (const name of ["ink", "soft", "page", "card", "line", "mark", "on-read"]) colours[name] = style("--" + name);
    for (const chart of charts) for (const kind of chart.kinds) colours["kind " + kind] = style("--" + kind);
  };

  const show = (from, to) => {
    const span = Math.min(Math.max(to - from, SHORTEST), end * 1.02);
    view.from = Math.min(Math.max(from, -0.01 * end - Math.max(...shifts)), 1.01 * end - Math.min(...shifts) - span);
    view.to = view.from + span;
    redraw();
  };
  const zoom = (factor, at = (view.from + view.to) / 2) =>
    show(at - (at - view.from) * factor, at + (view.to - at) * factor);
  const pan = share => show(view.from + share * (view.to - view.from), view.to + share * (view.to - view.from));
  const redraw = () => {
    if (pending) return;
    pending = true;
    requestAnimationFrame(() => {
      pending = false;
      charts.forEach((chart, i) => draw(chart, canvases[i], shifts[i]));
    });
  };

  const time = (ns, step) => {  // to as many digits as it takes to tell times apart that are a step apart
    const [scale, unit] = ns >= 1e9 ? [1e9, "s"] : ns >= 1e6 ? [1e6, "ms"] : ns >= 1e3 ? [1e3, "µs"] : [1, "ns"];
    return ns ? `${(ns / scale).toFixed(Math.max(0, Math.ceil(-Math.log10(step / scale) - 1e-9)))} ${unit}` : "0";
  };
  const duration = ns => time(ns, 10 ** (Math.floor(Math.log10(Math.max(ns, 1))) - 3));
  const size = nbytes => {
    let unit = 0;
    while (nbytes >= 1024 && unit < 4) { nbytes /= 1024; unit++; }
    return `${+nbytes.toPrecision(4)} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`;
  };
  const short = name => name.replace(/^layers\./, "");
  const fit = (pen, text, width) => {
    if (pen.measureText(text).width <= width) return text;
    while (text && pen.measureText(text + "…").width > width) text = text.slice(0, -1);
    return text && text + "…";
  };
  const firstAfter = (ends, at) => {  // the first event that ends after `at`: on a lane, ends are in order
    let low = 0, high = ends.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (ends[middle] > at) high = middle; else low = middle + 1;
    }
    return low;
  };

  const draw = (chart, canvas, shift) => {
    const width = canvas.clientWidth, height = TOP + chart.lanes.length * ROW + 6;
    const ratio = window.devicePixelRatio || 1;
    gutter = Math.round(Math.min(140, width * 0.26));
    canvas.style.height = height + "px";
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    const pen = canvas.getContext("2d");
    const from = view.from + shift, to = view.to + shift;
    const scale = (width - gutter) / (to - from), x = ns => gutter + (ns - from) * scale;
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.font = "12px system-ui, 'DejaVu Sans', sans-serif";
    pen.textBaseline = "middle";
    pen.fillStyle = colours.page;
    pen.fillRect(0, 0, width, height);
    pen.save();
    pen.beginPath();
    pen.rect(gutter, 0, width - gutter, height);
    pen.clip();
    drawSteps(chart, pen, x, width, height);
    drawAxis(pen, x, from, to, (width - gutter) / 110, height);
    chart.lanes.forEach((lane, row) => drawLane(chart, lane, pen, x, from, to, TOP + row * ROW, width));
    pen.restore();
    pen.fillStyle = colours.card;
    pen.fillRect(0, 0, gutter, height);
    pen.fillStyle = colours.ink;
    chart.lanes.forEach((lane, row) => pen.fillText(fit(pen, lane.name, gutter - 12), 8, TOP + row * ROW + ROW / 2));
  };

  const drawSteps = (chart, pen, x, width, height) => {
    for (const step of chart.steps) {
      const left = x(step.from), right = x(step.to);
      if (right < gutter || left > width || right - left < 1) continue;
      if (step.number % 2) {
        pen.fillStyle = colours.card;
        pen.fillRect(left, 0, right - left, height);
      }
      const visible = Math.max(left, gutter), room = Math.min(right, width) - visible;
      if (room < 30) continue;
      pen.fillStyle = colours.soft;
      const label = `${step.phase}, ${step.tokens} ${step.tokens === 1 ? "token" : "tokens"}`;
      pen.fillText(fit(pen, label, room - 8), visible + 4, 10);
    }
  };

  const drawAxis = (pen, x, from, to, labels, height) => {
    const rough = (to - from) / Math.max(2, labels), power = 10 ** Math.floor(Math.log10(rough));
    const tick = [1, 2, 5, 10].map(n => n * power).find(n => n >= rough);
    for (let number = Math.max(0, Math.ceil(from / tick)); number * tick <= to; number++) {
      const at = number * tick;
      pen.fillStyle = colours.line;
      pen.fillRect(Math.round(x(at)), 20, 1, height);
      pen.fillStyle = colours.soft;
      pen.fillText(time(at, tick), x(at) + 4, 29);
    }
  };

  const drawLane = (chart, lane, pen, x, from, to, top, width) => {
    const perPixel = (to - from) / (width - gutter);
    for (let i = firstAfter(lane.to, from), next; i < lane.from.length && lane.from[i] < to; i = next) {
      const right = Math.min(x(lane.to[i]), width + 2);
      const left = Math.max(x(lane.from[i]), gutter - 2), wide = Math.max(right - left, 1);
      const kind = chart.kinds[lane.kind[i]];
      // Of events narrower than a pixel, one in each pixel is drawn.
      next = wide > 1 ? i + 1 : Math.max(i + 1, firstAfter(lane.to, from + (Math.floor(left) + 1 - gutter) * perPixel));
      if (kind === "wait") {
        pen.strokeStyle = colours.soft;
        pen.strokeRect(left + 0.5, top + 5.5, Math.max(wide - 1, 0.5), ROW - 11);
      } else {
        pen.fillStyle = colours["kind " + kind];
        pen.fillRect(left, top + 3, wide > 4 ? wide - 0.5 : wide, ROW - 6);
      }
      if (wide > 34) {
        pen.fillStyle = kind === "wait" ? colours.soft : kind === "read" ? colours["on-read"]
          : LIGHT_ON.includes(kind) ? LIGHT_TEXT : DARK_TEXT;
        const text = (kind === "wait" ? "wait: " : "") + short(chart.tasks[lane.task[i]]);
        pen.fillText(fit(pen, text, wide - 8), left + 4, top + ROW / 2);
      }
    }
  };

  const under = (chart, canvas, shift, px, py) => {  // the event at that place, or within two pixels of it
    const lane = chart.lanes[Math.floor((py - TOP) / ROW)];
    if (!lane || px < gutter) return null;
    const perPixel = (view.to - view.from) / (canvas.clientWidth - gutter);
    const at = view.from + shift + (px - gutter) * perPixel;
    const i = firstAfter(lane.to, at - 2 * perPixel);
    return i < lane.from.length && lane.from[i] <= at + 2 * perPixel ? [lane, i] : null;
  };
  const describe = (chart, lane, i) => [
    chart.tasks[lane.task[i]],
    `${chart.kinds[lane.kind[i]]} on ${lane.name}, step ${lane.step[i]}`,
    `${duration(lane.to[i] - lane.from[i])}, from ${time(lane.from[i], 1e3)} to ${time(lane.to[i], 1e3)}`,
    ...(lane.bytes[i] ? [size(lane.bytes[i])] : []),
  ].join("\n");

  charts.forEach((chart, number) => {
    const canvas = canvases[number], pointers = new Map();
    const timeAt = px => view.from + (px - gutter) / (canvas.clientWidth - gutter) * (view.to - view.from);
    canvas.addEventListener("pointerdown", event => {
      canvas.setPointerCapture(event.pointerId);
      pointers.set(event.pointerId, event.offsetX);
      tip.hidden = true;
    });
    canvas.addEventListener("pointermove", event => {
      const before = pointers.get(event.pointerId);
      if (before === undefined) {
        const hit = under(chart, canvas, shifts[number], event.offsetX, event.offsetY);
        tip.hidden = !hit;
        if (hit) {
          tip.textContent = describe(chart, ...hit);
          const right = timeline.clientWidth - tip.offsetWidth;
          tip.style.left = Math.max(0, Math.min(canvas.offsetLeft + event.offsetX + 14, right)) + "px";
          tip.style.top = canvas.offsetTop + event.offsetY + 18 + "px";
        }
        return;
      }
      if (pointers.size === 2) {
        const [other] = [...pointers].filter(([id]) => id !== event.pointerId).map(([, px]) => px);
        const factor = Math.abs(before - other) / Math.max(8, Math.abs(event.offsetX - other));
        zoom(factor, timeAt((event.offsetX + other) / 2));
      } else {
        pan((before - event.offsetX) / (canvas.clientWidth - gutter));
      }
      pointers.set(event.pointerId, event.offsetX);
    });
    for (const kind of ["pointerup", "pointercancel"])
      canvas.addEventListener(kind, event => pointers.delete(event.pointerId));
    canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
    canvas.addEventListener("wheel", event => {
      if (event.ctrlKey || event.metaKey) zoom(Math.exp(event.deltaY / 300), timeAt(event.offsetX));
      else if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) pan(event.deltaX / (canvas.clientWidth - gutter));
      else return;  // the page scrolls
      event.preventDefault();
    }, {passive: false});
    canvas.addEventListener("keydown", event => {
      const act = {ArrowLeft: () => pan(-0.15), ArrowRight: () => pan(0.15), "+": () => zoom(0.7), "=": () => zoom(0.7),
        "-": () => zoom(1 / 0.7), Home: views.all}[event.key];
      if (!act || event.ctrlKey || event.metaKey) return;
      act();
      event.preventDefault();
    });
  });

  const showFrom = (starts, span) => {
    shifts = starts;
    show(-0.005 * span, 1.005 * span);
  };
  const fromFirst = span => showFrom(charts.map(() => 0), span);
  const views = {
    first: () => fromFirst(Math.max(...charts.map(chart => chart.firstView))),
    decode: () => {
      const steps = charts.map(chart => chart.steps.find(step => step.phase === "decode"));
      const longest = Math.max(0, ...steps.filter(Boolean).map(step => step.to - step.from));
      if (longest) showFrom(steps.map(step => step?.from ?? 0), longest);
    },
    all: () => fromFirst(end),
    in: () => zoom(0.5),
    out: () => zoom(2),
  };
  for (const button of timeline.querySelectorAll("button")) button.addEventListener("click", views[button.dataset.view]);

  for (const kind of new Set(charts.flatMap(chart => chart.kinds))) {
    const item = document.createElement("li"), sample = document.createElement("i");
    sample.className = kind;
    item.append(sample, kind);
    document.getElementById("chart-legend").append(item);
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readColours(); redraw(); });
  new ResizeObserver(redraw).observe(timeline);
  readColours();
  views.first();
}
