"use strict";

// Colours from the style sheet's variables, resolved for the theme in use, as canvas takes them.
//   Colours.of("experts"): of a kind of task or of a cause ("compute", "disk", "copy", "network", "waiting")
//   Colours.css("ink"): any other variable ("page", "ink", "soft", "line", "card", "mark", "slow")
//   Colours.on("experts"): what is read on that colour; Colours.rgb("experts"): [r, g, b] of 0..255
//   Colours.series(i): the i-th of eight that can be told apart, for devices and lines
//   Colours.hatch(pen, name = "waiting"): a pattern for what waits, so that it is told apart without colour
//   Colours.changed(action): called after the theme changed (returns what undoes this)
const Colours = (() => {
  const CAUSES = ["compute", "disk", "copy", "network", "waiting"];
  const KINDS = ["attention", "experts", "shared_experts", "mlp", "router", "norm", "embedding", "head", "copy", "read",
    "wait", "sample", "network", "other"];
  const SERIES = ["attention", "experts", "router", "mlp", "embedding", "shared_experts", "head", "sample"];
  const NAMES = { compute: "computing", disk: "waiting for the disk", copy: "copying", network: "network",
    waiting: "waiting for something else" };
  const actions = new Set();
  let found = new Map();
  let patterns = new Map();
  let probe = null;

  function css(name) {
    if (!found.has(name)) {
      if (!probe) {
        probe = document.createElement("i");
        probe.hidden = true;
        document.documentElement.append(probe);
      }
      probe.style.color = `var(--${name})`;
      found.set(name, getComputedStyle(probe).color);
    }
    return found.get(name);
  }

  const known = (kind) => (KINDS.includes(kind) || CAUSES.includes(kind) ? kind : "other");
  const of = (kind) => css(known(kind));
  const rgb = (kind) => of(kind).match(/[\d.]+/g).slice(0, 3).map(Number);
  const series = (index) => css(SERIES[index % SERIES.length]);

  // Black or white, whichever is read better on that colour.
  function on(kind) {
    const [r, g, b] = rgb(kind).map((value) => ((value / 255) ** 2.2));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.22 ? "#111111" : "#ffffff";
  }

  function hatch(pen, name = "waiting") {
    if (!patterns.has(name)) {
      const cell = document.createElement("canvas");
      cell.width = cell.height = 6;
      const ink = cell.getContext("2d");
      ink.strokeStyle = css(name);
      ink.lineWidth = 1.6;
      ink.beginPath();
      for (const x of [-6, 0, 6]) {
        ink.moveTo(x, 6.5);
        ink.lineTo(x + 6.5, 0);
      }
      ink.stroke();
      patterns.set(name, pen.createPattern(cell, "repeat"));
    }
    return patterns.get(name);
  }

  function forget() {
    found = new Map();
    patterns = new Map();
    for (const action of actions) action();
  }

  function changed(action) {
    actions.add(action);
    return () => actions.delete(action);
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", forget);
  return { CAUSES, KINDS, NAMES, of, css, rgb, on, series, hatch, changed, forget };
})();
