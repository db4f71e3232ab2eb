"use strict";

// Small charts of what our operators reach of a device's limits, by rows: one for each operator, size and format.
//   CurveCharts.draw(curves) -> {root, fit(), leave()}
const CurveCharts = (() => {
  const { make } = Views;
  const SAYS = { compute: "of the matrix rate", memory: "of the memory's bandwidth" };
  const LINES = ["place-1", "place-0", "place-2", "place-3", "place-4", "place-5"]; // by number of threads
  const HEIGHT = 170;
  const NONE = "No operator was measured for this model here: shares of the limits are assumed. ciuic calibrate MODEL measures them.";

  // Curves that belong into one chart, and the rows at which any of them was measured.
  function grouped(curves) {
    const found = new Map();
    for (const curve of curves.filter(({ points }) => points.length)) {
      const size = curve.operator.startsWith("scores") ? `${Units.rate(curve.size, "flop")} per pair` : Units.bytes(curve.size);
      const name = `${curve.device}: ${curve.operator}, ${curve.format}, ${size}`;
      found.set(name, [...(found.get(name) || []), curve]);
    }
    return [...found];
  }

  function draw(curves) {
    if (!curves.length) return { root: Plans.soft(NONE), fit() {}, leave() {} };
    const threads = [...new Set(curves.map((curve) => curve.threads))].sort((a, b) => a - b);
    const colour = (curve) => LINES[threads.indexOf(curve.threads) % LINES.length];
    const charts = grouped(curves).map(([name, members]) => (
      { name, members, place: make("figure", {}, make("figcaption", { text: name })), plot: null }));

    function build({ name, members, place }) {
      const rows = [...new Set(members.flatMap(({ points }) => points.map((point) => point.rows)))].sort((a, b) => a - b);
      const columns = [rows], series = [{}], said = [];
      for (const curve of members)
        for (const what of ["compute", "memory"]) {
          const at = new Map(curve.points.map((point) => [point.rows, point[what]]));
          columns.push(rows.map((row) => at.get(row) ?? null));
          said.push(`${SAYS[what]}, ${Units.number(curve.threads, "thread")}`);
          const dash = what === "memory" ? [5, 4] : undefined;
          series.push({ stroke: Colours.css(colour(curve)), width: 2, dash, spanGaps: true, points: { show: true, size: 5 } });
        }
      const ink = Colours.css("soft"), line = Colours.css("line");
      const axis = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 }, font: "11px system-ui, sans-serif" };
      const point = (plot) => {
        const { idx: i, left, top } = plot.cursor;
        if (i === null || i === undefined || left < 0) return Views.tip(null);
        const box = plot.over.getBoundingClientRect();
        const lines = said.map((text, s) => (columns[s + 1][i] === null ? "" : `${Units.percent(columns[s + 1][i])} ${text}`));
        const text = [`${name}, ${Units.number(rows[i], "row")}`, ...lines.filter(Boolean)].join("\n");
        Views.tip(text, box.left + left, box.top + top);
      };
      return new uPlot({
        width: Math.max(180, place.clientWidth), height: HEIGHT, legend: { show: false },
        cursor: { y: false, drag: { x: false, y: false } },
        scales: { x: { time: false, distr: 3, log: 2 }, y: { range: (plot, low, high) => [0, Math.max(1, high || 0)] } },
        axes: [{ ...axis, size: 30, space: 30, values: (plot, ticks) => ticks.map((row) => (row === null ? "" : Units.count(row))) },
          { ...axis, size: 52, space: 30, values: (plot, ticks) => ticks.map(Units.percent) }],
        series, hooks: { setCursor: [point] },
      }, columns, place);
    }

    const leave = () => charts.forEach((chart) => {
      chart.plot?.destroy();
      chart.plot = null;
    });
    const fit = () => {
      leave();
      for (const chart of charts) chart.plot = build(chart);
    };
    const sized = new ResizeObserver(() => charts.forEach(({ plot, place }) =>
      plot && plot.width !== place.clientWidth && plot.setSize({ width: Math.max(180, place.clientWidth), height: HEIGHT })));
    const themed = Colours.changed(fit);
    const grid = make("div", { class: "curves" }, ...charts.map(({ place }) => place));
    const said = "Share of the limit over the rows of a call (tokens; of routed experts, tokens per expert).";
    const samples = threads.map((n) => {
      const sample = make("i");
      sample.style.background = `var(--${LINES[threads.indexOf(n) % LINES.length]})`;
      return make("li", {}, sample, Units.number(n, "thread"));
    });
    const lines = [["solid", SAYS.compute], ["dashed", SAYS.memory]].map(([kind, text]) =>
      make("li", {}, make("i", { class: `line ${kind}` }), text));
    sized.observe(grid);
    return {
      root: make("div", {}, make("p", { class: "soft", text: said }), make("ul", { class: "legend" }, ...lines, ...samples), grid), fit,
      leave() {
        sized.disconnect();
        themed();
        leave();
      },
    };
  }

  return { draw };
})();
