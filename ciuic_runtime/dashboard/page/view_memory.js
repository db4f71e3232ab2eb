"use strict";

// Memory: what each tier holds over time beside what it can hold, below it what was read, evicted and waited for.
{
  const { make } = Views;
  const COLOURS = ["place-1", "place-0", "place-2", "place-3", "place-4", "place-5", "place-6"];
  const EVENTS = [
    ["reads", "pages read", "place-1"], ["evictions", "pages evicted", "place-3"],
    ["late", "reads that were late: a task waited", "place-5"],
  ];
  const BINARY = Array.from({ length: 50 }, (_, power) => 2 ** power); // so that ticks are whole MiB or GiB
  const REFRESH = 1000; // ms, at most so often

  const count = (value) => (Number.isInteger(value) ? Units.count(value) : "");
  const constant = (column, value) => column.map(() => value);
  const tierColumns = ({ time, used, capacity }) => (capacity ? [time, used, constant(time, capacity)] : [time, used]);
  const eventColumns = (events, name) => (name === "reads" ? [events.time, events.reads, events.bytes] : [events.time, events[name]]);
  const moved = ({ reads, evictions, late }) => [reads, evictions, late].some((column) => column.some(Boolean));
  const shape = ({ tiers, events }) =>
    JSON.stringify([tiers.map(({ name, what, capacity }) => [name, what, capacity]), moved(events)]);

  function charts(found, seconds) {
    const made = TimeCharts.make(seconds);
    found.tiers.forEach((tier, i) => {
      const { name, what, capacity } = tier;
      const label = `${name}: ${what}${capacity ? "" : " (its capacity is not known)"}`;
      const series = [{ label: "used", colour: COLOURS[i % COLOURS.length], fill: true }];
      if (capacity) series.push({ label: "capacity", colour: "ink", dash: true });
      made.add({ label, height: 150, unit: Units.bytes, steps: BINARY, top: capacity || 1, series, columns: tierColumns(tier) });
    });
    if (!moved(found.events)) return made;
    for (const [name, label, colour] of EVENTS) {
      const series = [{ label: name, colour }];
      if (name === "reads") series.push({ label: "bytes", unit: Units.bytes, figure: true });
      made.add({ label, height: 96, unit: count, top: 1, bars: true, series, columns: eventColumns(found.events, name) });
    }
    return made;
  }

  function fill(made, found, seconds) {
    made.until(seconds);
    found.tiers.forEach((tier, i) => made.set(i, tierColumns(tier)));
    if (moved(found.events)) EVENTS.forEach(([name], i) => made.set(found.tiers.length + i, eventColumns(found.events, name)));
  }

  function totals({ totals: all, simulated_peak: peak }) {
    const figures = all ? [
      Plans.figure("read from disk", Units.bytes(all.bytes_read)),
      Plans.figure("found in memory", Units.percent(all.hit_rate),
        Plans.small(all.hits === null ? "not counted here" : `${Units.count(all.hits)} of ${Units.count(all.hits + all.misses)} uses`)),
      Plans.figure("evicted", Units.number(all.evictions, "page")),
      Plans.figure("tasks waited for pages", Units.seconds(all.waited_s)),
    ] : [];
    const planned = Object.entries(peak || {}).map(([device, bytes]) =>
      Plans.figure(`planned peak of ${device}`, Units.bytes(bytes), Plans.small("simulated")));
    return [...figures, ...planned];
  }

  function longest(late) {
    if (!late.length) return Plans.soft("No task had to wait for a page: all were in memory, or came in time.");
    const rows = late.map(({ time, page, task, waited_s: waited, step }) => [
      page ? Views.a("placement", { name: page }, page) : null, Units.seconds(waited),
      Views.a("tokens", { step }, `step ${step}`), task, Units.time(time, 0.001),
    ]);
    const heads = ["page", { text: "waited", number: true }, "in", "task that waited", { text: "at", number: true }];
    const table = Views.table(heads, rows, "The longest waits for pages");
    table.classList.add("tall", "wide");
    return table;
  }

  Views.add({
    id: "memory",
    title: "Memory",
    mount(root, { summary, signal }) {
      const [figures, plots, waits] = ["figures", "plots", "waits"].map((name) => make("div", { class: name }));
      let made = null, drawn = "", lateDrawn = "", asked = 0, timer = null;

      const show = (found) => {
        const seconds = Math.max(summary.seconds, ...found.tiers.map(({ time }) => time.at(-1) || 0), found.events.time.at(-1) || 0);
        if (!found.tiers.length && !moved(found.events))
          return root.replaceChildren(Views.empty("Nothing was recorded of memory here.",
            "A running server records it (ciuic serve MODEL), and so does ciuic run MODEL --trace FILE."),
            make("div", { class: "figures" }, ...totals(found)));
        if (!root.contains(plots))
          root.replaceChildren(figures, tools(() => made), plots, Plans.title("The longest waits for pages"), waits);
        figures.replaceChildren(...totals(found));
        if (shape(found) === drawn) fill(made, found, seconds);
        else {
          made?.leave();
          made = charts(found, seconds);
          plots.replaceChildren(made.root);
          drawn = shape(found);
        }
        const late = JSON.stringify(found.late);
        if (late === lateDrawn || waits.contains(document.activeElement)) return; // nothing moves under a finger
        waits.replaceChildren(longest(found.late));
        lateDrawn = late;
      };
      const load = () => {
        asked = performance.now();
        Data.get("memory", { signal }).then((found) => signal.aborted || show(found))
          .catch((error) => signal.aborted || Views.tell(error, load));
      };
      load();
      return {
        live(event) {
          if (event.type === "connection" || timer !== null || document.hidden) return;
          timer = setTimeout(() => { timer = null; load(); }, Math.max(0, asked + REFRESH - performance.now()));
        },
        show() {},
        unmount() {
          clearTimeout(timer);
          made?.leave();
        },
      };
    },
  });

  function tools(made) {
    const button = (text, title, action) =>
      make("button", { type: "button", text, title, "aria-label": title, on: { click: () => action(made()) } });
    return make("div", { class: "tools" }, make("span", { class: "soft", text: "Drag over a chart to zoom into it." }),
      button("+", "Zoom in", (all) => all.by(0.5)), button("−", "Zoom out", (all) => all.by(2)),
      button("◀", "Earlier", (all) => all.by(1, -0.2)), button("▶", "Later", (all) => all.by(1, 0.2)),
      button("Everything", "Show everything", (all) => all.zoom()));
  }
}
