"use strict";

// Charts one below the other on one axis of time, drawn by uPlot: they zoom and point together.
//   const charts = TimeCharts.make(seconds); charts.root; charts.add({...}); charts.set(i, columns); charts.seconds(s); charts.leave()
const TimeCharts = (() => {
  const GUTTER = 76; // px of the left axis, the same for all so that times stand below each other
  let groups = 0;

  function make(seconds) {
    const key = `time-${groups += 1}`;
    const root = Views.make("div", { class: "time-charts" });
    const all = []; // {given, columns, place, plot}
    let end = seconds, range = null; // the range is null where everything is shown

    const width = () => Math.max(200, root.clientWidth);

    function build(one) {
      one.plot?.destroy();
      const { label, unit, top, height, series, bars = false } = one.given;
      const ink = Colours.css("soft"), line = Colours.css("line");
      const axis = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 }, font: "12px system-ui, sans-serif" };
      one.plot = new uPlot({
        width: width(), height, title: label,
        cursor: { sync: { key, scales: ["x", null] }, drag: { x: true, y: false }, points: { show: !bars } },
        scales: {
          x: { time: false, range: () => range || [0, end || 1] },
          y: { range: (plot, low, high) => [0, Math.max(top || 0, high || 1) * 1.05] },
          none: { range: [0, 1] },
        },
        axes: [
          { ...axis, size: 26, values: (plot, ticks, a, b, step) => ticks.map((s) => Units.time(s, step)), space: 70 },
          { ...axis, size: GUTTER, incrs: one.given.steps, values: (plot, ticks) => ticks.map((value) => unit(value)), space: 22 },
        ],
        series: [
          { label: "at", value: (plot, s) => Units.time(s ?? (bars ? null : plot.data[0].at(-1)), 0.001) },
          ...series.map((entry) => shaped(entry, bars, unit)),
        ],
        hooks: { setSelect: [selected] },
      }, one.columns, one.place);
      one.plot.over.addEventListener("dblclick", () => zoom());
    }

    function selected({ select: { left, width: wide }, posToVal }) {
      if (wide > 2) zoom(posToVal(left, "x"), posToVal(left + wide, "x"));
    }

    // A line that holds until the next sample, a bar, or only a figure in the legend.
    function shaped(entry, bars, unit) {
      const colour = Colours.css(entry.colour || "ink");
      const write = entry.unit || unit;
      // Where nobody points, the newest value of what holds until the next.
      const said = (plot, value, s) => {
        const known = value ?? (bars ? null : plot.data[s].at(-1));
        return known === null || known === undefined ? "–" : write(known);
      };
      const common = { label: entry.label, value: said, points: { show: false } };
      if (entry.figure) return { ...common, scale: "none", paths: () => null };
      if (bars) return { ...common, stroke: colour, fill: colour, width: 0, paths: uPlot.paths.bars({ size: [0.9, 24, 1], align: 1 }) };
      if (entry.dash) return { ...common, stroke: colour, width: 2, dash: [6, 4] };
      const below = colour.replace("rgb(", "rgba(").replace(")", ", 0.25)");
      return { ...common, stroke: colour, fill: entry.fill ? below : undefined, width: 2, paths: uPlot.paths.stepped({ align: 1 }) };
    }

    // Everything again where nothing is given.
    function zoom(from = null, to = null) {
      const least = (end || 1) / 1e5;
      range = from === null ? null : [Math.max(0, from), Math.min(end, Math.max(to, from + least))];
      if (range && range[0] <= 0 && range[1] >= end) range = null;
      const [low, high] = range || [0, end || 1];
      for (const { plot } of all) {
        plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
        plot.setScale("x", { min: low, max: high });
      }
    }

    function by(factor, shift = 0) {
      const [low, high] = range || [0, end || 1], span = (high - low) * factor;
      const middle = Math.min(Math.max((low + high) / 2 + shift * (high - low), span / 2), Math.max(span / 2, end - span / 2));
      zoom(middle - span / 2, middle + span / 2);
    }

    const sized = new ResizeObserver(() => all.forEach(({ plot, given }) => plot.setSize({ width: width(), height: given.height })));
    const themed = Colours.changed(() => all.forEach(build));
    sized.observe(root);
    root.tabIndex = 0;
    root.setAttribute("role", "group");
    root.setAttribute("aria-label", "Charts over time. Plus and minus zoom, arrow keys pan, Home shows everything.");
    root.addEventListener("keydown", (event) => {
      const act = {
        "+": () => by(0.5), "=": () => by(0.5), "-": () => by(2),
        ArrowLeft: () => by(1, -0.2), ArrowRight: () => by(1, 0.2), Home: () => zoom(),
      }[event.key];
      if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
      act();
      event.preventDefault();
    });

    return {
      root, zoom, by,
      // {label, height, unit: (value) => text, steps: between ticks, top: least top of the scale, bars, columns,
      //  series: [{label, colour, dash, fill, figure, unit}]}; the last column is the newest
      add({ columns, ...given }) {
        const one = { given, columns, place: Views.make("div", { class: "time-chart" }) };
        root.append(one.place);
        all.push(one);
        build(one);
      },
      set(index, columns) {
        all[index].columns = columns;
        all[index].plot.setData(columns, false);
      },
      // How long the recording is now; what is zoomed in stays where it is.
      until(s) {
        end = s;
        for (const { plot } of all) plot.setScale("x", { min: (range || [0])[0], max: range ? range[1] : end });
      },
      get shown() { return range || [0, end]; },
      leave() {
        sized.disconnect();
        themed();
        for (const { plot } of all) plot.destroy();
      },
    };
  }

  return { make };
})();
