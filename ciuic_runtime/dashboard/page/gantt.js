"use strict";

// The chart: a lane for each resource, the planned bars of the chosen step in pale above those that came, the late task
// with what it waited for, requests and marks along the same axis. Beyond the chosen step it draws tiles.
//   const gantt = Gantt.of(root, {summary, bars, choose(step), found(text)})
//   gantt.step(answer of GET steps/n); gantt.requests(answer); gantt.showStep(), gantt.showAll(), gantt.zoom(factor)
//   gantt.find(text); gantt.next(); gantt.state: what is drawn, for tests and benchmarks
//   gantt.added(since): events came, none of which begins before `since` ns; gantt.renewed(): the summary was brought up to date
// Lanes go by name everywhere: a step, a tile and the summary each have some of them, in an order of their own.
const Gantt = (() => {
  const LANE = 36, PLANNED = 8, ACTUAL = 19; // px: of a lane, and of its two rows
  const SHORTEST = 2000; // ns that the chart covers at least
  const DETAIL = 120; // px: below that a step is drawn from tiles
  const LABEL = 44; // px that a bar needs to carry its name
  const FONT = "12px system-ui, 'DejaVu Sans', sans-serif";

  function of(root, { summary, bars, choose, found }) {
    const label = "Chart of what every resource did; the text beside it says the same";
    const canvas = Views.make("canvas", { tabindex: "0", role: "img", "aria-label": label });
    root.append(canvas);
    const tiles = Tiles.of(summary, (tile) => {
      if (tile) meet(tile.lanes.keys());
      redraw();
    });
    const rows = Rows.of(summary.kinds);
    const names = []; // of lanes, from the top down
    const kindOf = (name) => Math.max(0, summary.kinds.indexOf(name));
    const waits = summary.kinds.indexOf("wait");
    const view = { from: 0, to: Math.max(SHORTEST, summary.seconds * 1e9) };
    const state = {
      view, draws: 0, last_ms: 0, worst_ms: 0, first_ms: null, bars: 0, pieces: 0, late: null, hits: 0, requests: 0, lanes: names,
    };
    let whole = true;
    let step = null; // the chosen step: {answer, from, to, actual: piece, planned: piece}
    let queue = null;
    let sought = "";
    let hits = []; // of the chosen step, in time order: [name of the lane, index]
    let hit = -1;
    let gutter = 110;
    let seen = []; // what was drawn: [{tile, from, to}]
    const labels = {
      x: new Float64Array(4096), room: new Float64Array(4096), y: new Float64Array(4096), kind: new Uint8Array(4096),
      text: new Array(4096), count: 0,
    };

    // Data

    // Lanes that are not here yet: a server's first request brings some, a node that joins, a second read at a time.
    function meet(lanes) {
      for (const name of lanes) if (!names.includes(name)) names.push(name);
    }

    function setStep(answer) {
      meet(answer.lanes.map((lane) => lane.name));
      step = {
        answer, step: answer.step, phase: answer.phase, tokens: answer.tokens,
        from: answer.start * 1e9, to: answer.end * 1e9,
        actual: columns(answer.lanes, "actual"), planned: columns(answer.lanes, "planned"),
      };
      search(sought);
      showStep();
    }

    // Lanes of a step's answer, in the form that tiles have.
    function columns(lanes, which) {
      const tasks = [], numbers = new Map(), made = new Map();
      const number = (name) => {
        if (!numbers.has(name)) numbers.set(name, tasks.push(name) - 1);
        return numbers.get(name);
      };
      for (const lane of lanes) {
        const given = lane[which];
        if (!given || !given.from.length) continue;
        const from = Float64Array.from(given.from, (s) => s * 1e9), to = Float64Array.from(given.to, (s) => s * 1e9);
        made.set(lane.name, {
          from, to, task: Int32Array.from(given.task, number), kind: Uint8Array.from(given.kind, kindOf), bytes: given.bytes,
          waits: given.waits_for,
        });
      }
      return { lanes: made, tasks, labels: tasks.map((name) => name.replace(/^layers\./, "")) };
    }

    // What is shown

    const end = () => Math.max(SHORTEST, summary.seconds * 1e9);

    function show(from, to) {
      const span = Math.min(Math.max(to - from, SHORTEST), end() * 1.04);
      view.from = Math.min(Math.max(from, -0.02 * end()), Math.max(-0.02 * end(), end() * 1.02 - span));
      view.to = view.from + span;
      redraw();
    }

    function zoom(factor, at = (view.from + view.to) / 2) {
      whole = false;
      show(at - (at - view.from) * factor, at + (view.to - at) * factor);
    }
    function pan(share) {
      const by = share * (view.to - view.from);
      whole = false;
      show(view.from + by, view.to + by);
    }
    function showAll() {
      whole = true;
      show(-0.005 * end(), 1.005 * end());
    }
    function showStep() {
      if (!step) return showAll();
      whole = false;
      const planned = step.answer.planned ? step.from + step.answer.planned.seconds * 1e9 : 0, to = Math.max(step.to, planned);
      return show(step.from - 0.02 * (to - step.from), to + 0.02 * (to - step.from));
    }

    // Drawing

    const lanesTop = () => Axis.height(summary.marks?.length) + (queue?.height || 0) + 4;
    const height = () => lanesTop() + names.length * LANE + 6;

    function draw() {
      const begun = performance.now();
      const wide = canvas.clientWidth;
      if (!wide) return;
      const tall = height();
      if (canvas.style.height !== `${tall}px`) canvas.style.height = `${tall}px`;
      const longest = Math.max(0, ...names.map((name) => name.length)) * Axis.LETTER + 20;
      gutter = Math.round(Math.min(Math.max(120, longest), 220, wide * 0.24));
      const pen = Views.pen(canvas, wide, tall);
      const perNs = (wide - gutter) / (view.to - view.from);
      const x = (ns) => gutter + (ns - view.from) * perNs;
      const scale = { from: view.from, to: view.to, left: gutter, right: wide, height: tall, perNs, x };
      pen.font = FONT;
      pen.textBaseline = "middle";
      pen.fillStyle = Colours.css("page");
      pen.fillRect(0, 0, wide, tall);
      pen.save();
      pen.beginPath();
      pen.rect(gutter, 0, wide - gutter, tall);
      pen.clip();
      Axis.steps(pen, scale, bars.columns, step);
      Axis.ticks(pen, scale, origin());
      if (queue) queue.draw(pen, scale, Axis.height(summary.marks?.length), summary.seconds);
      lanes(pen, scale, perNs);
      if (summary.marks?.length) Axis.marks(pen, scale, summary.marks);
      late(pen, scale);
      outlineHits(pen, scale);
      pen.restore();
      gutters(pen, tall);
      state.draws += 1;
      state.last_ms = performance.now() - begun;
      state.worst_ms = Math.max(state.worst_ms, state.last_ms);
      if (state.bars) state.first_ms ??= performance.now(); // since the page was opened: bars are painted
    }

    // Times count from the begin of the chosen step while the view is about it, else from the recording's.
    const origin = () => (step && view.to - view.from < 12 * (step.to - step.from) ? step.from : 0);

    function lanes(pen, scale, perNs) {
      const inside = step && (step.to - step.from) * perNs > DETAIL && step.from < view.to && step.to > view.from;
      const margin = inside ? 0.03 * (step.to - step.from) : 0;
      const apart = !inside || view.from < step.from - margin || view.to > step.to + margin;
      seen = apart ? tiles.cover(view.from, view.to, 1 / perNs) : [];
      state.bars = 0;
      state.pieces = seen.length;
      labels.count = 0;
      rows.begin(scale.right - gutter, names.length * 2, devicePixelRatio || 1);
      for (let lane = 0; lane < names.length; lane++) {
        const top = laneTop(lane);
        rows.row(2 * lane);
        if (step) lay(step.planned, lane, -Infinity, Infinity, perNs, top + 3, false, false);
        rows.end(2 * lane);
        rows.row(2 * lane + 1);
        for (const piece of seen) lay(piece.tile, lane, piece.from, piece.to, perNs, top + 12, true, inside);
        if (inside) lay(step.actual, lane, -Infinity, Infinity, perNs, top + 12, true, false);
        rows.end(2 * lane + 1);
      }
      rows.flush();
      pen.imageSmoothingEnabled = false;
      for (let lane = 0; lane < names.length; lane++) {
        const top = laneTop(lane);
        pen.fillStyle = Colours.css("line");
        pen.fillRect(gutter, top + LANE - 1, scale.right - gutter, 1);
        pen.globalAlpha = 0.5;
        rows.put(pen, 2 * lane, gutter, top + 3, PLANNED);
        pen.globalAlpha = 1;
        rows.put(pen, 2 * lane + 1, gutter, top + 12, ACTUAL);
      }
      hatch(pen);
      captions(pen);
    }

    // Puts bars of one lane into the row of pixels, and remembers which are wide enough for their name.
    function lay(tile, lane, from, to, perNs, top, named, apart) {
      const all = tile.lanes.get(names[lane]);
      if (!all) return;
      const { from: begins, to: ends, kind, task, count, busy } = all;
      const dim = sought ? matches(tile) : null;
      const first = Axis.after(ends, Math.max(view.from, from)), last = Math.min(view.to, to);
      for (let i = first; i < begins.length && begins[i] < last; i++) {
        let a = begins[i], b = ends[i];
        // A bar that reaches into several tiles is drawn from the first of them that is seen.
        if (a < from && from > view.from) continue;
        if (apart) {
          if (a >= step.from - 1 && b <= step.to + 1) continue;
          if (a < step.from) b = Math.min(b, Math.max(a, step.from)); else a = Math.max(a, Math.min(b, step.to));
        }
        const share = count && count[i] > 1 ? Math.min(1, busy[i] / (ends[i] - begins[i])) : 1;
        const x0 = (a - view.from) * perNs, x1 = (b - view.from) * perNs;
        const faded = dim !== null && !(task[i] >= 0 && dim[task[i]]);
        rows.bar(x0, x1, kind[i], share, faded);
        state.bars += 1;
        const wide = x1 - x0 > LABEL || (kind[i] === waits && x1 - x0 > 3);
        if (named && wide && task[i] >= 0 && labels.count < labels.x.length) {
          const n = labels.count++;
          labels.x[n] = gutter + Math.max(0, x0);
          labels.room[n] = Math.min(x1, canvas.clientWidth - gutter) - Math.max(0, x0);
          labels.text[n] = tile.labels[task[i]];
          labels.kind[n] = kind[i];
          labels.y[n] = top;
        }
      }
    }

    function hatch(pen) {
      if (waits < 0) return;
      pen.fillStyle = Colours.hatch(pen, "wait");
      for (let n = 0; n < labels.count; n++)
        if (labels.kind[n] === waits) pen.fillRect(labels.x[n], labels.y[n], labels.room[n], ACTUAL);
    }

    function captions(pen) {
      for (let which = 0; which < summary.kinds.length; which++) {
        if (which === waits) continue;
        pen.fillStyle = Colours.on(summary.kinds[which]);
        for (let n = 0; n < labels.count; n++)
          if (labels.kind[n] === which)
            Axis.text(pen, labels.text[n], labels.x[n] + 4, labels.y[n] + ACTUAL / 2 + 0.5, labels.room[n] - 8);
      }
    }

    const laneTop = (lane) => lanesTop() + lane * LANE;

    function late(pen, scale) {
      state.late = null;
      const one = step?.answer.late, lane = one ? names.indexOf(one.lane) : -1;
      if (lane < 0 || (step.to - step.from) * scale.perNs < 60) return;
      const reads = one.read ? laneOf(one.read) : -1;
      const y = (which) => laneTop(which) + 12;
      state.late = Late.draw(pen, scale, one, { y: y(lane), read: reads < 0 ? null : y(reads), height: ACTUAL });
    }

    // The lane on which a page was read: of several disk lanes the one that has that read.
    function laneOf(read) {
      const task = step.actual.tasks.indexOf(read.page);
      const has = (all) => all.task.some((one, i) => one === task && Math.abs(all.from[i] - read.start * 1e9) < 1000);
      const name = [...step.actual.lanes.keys()].find((one) => has(step.actual.lanes.get(one)));
      return names.indexOf(name ?? step.answer.lanes.find((one) => one.kind === "disk")?.name);
    }

    function outlineHits(pen, scale) {
      if (!sought) return;
      const outline = ([name, i], thick) => {
        const all = step.actual.lanes.get(name), lane = names.indexOf(name);
        const a = Math.max(scale.left - 3, scale.x(all.from[i])), b = Math.min(scale.right + 3, scale.x(all.to[i]));
        if (b < scale.left || a > scale.right) return;
        pen.lineWidth = thick;
        pen.strokeRect(a - 0.5, laneTop(lane) + 11.5, Math.max(3, b - a), ACTUAL + 1);
      };
      pen.strokeStyle = Colours.css("mark");
      if (hits.length <= 500) for (const one of hits) outline(one, 1);
      if (hit >= 0) outline(hits[hit], 3);
    }

    function gutters(pen, tall) {
      pen.fillStyle = Colours.css("card");
      pen.fillRect(0, 0, gutter, tall);
      pen.fillStyle = Colours.css("line");
      pen.fillRect(gutter - 1, 0, 1, tall);
      pen.fillStyle = Colours.css("soft");
      Axis.text(pen, origin() ? `from step ${step.answer.step}` : "time", 8, 27, gutter - 12);
      queue?.names(pen, Axis.height(summary.marks?.length), gutter - 12);
      names.forEach((name, lane) => {
        pen.fillStyle = Colours.css("ink");
        Axis.text(pen, name, 8, laneTop(lane) + 21, gutter - 12);
        if (!step?.planned.lanes.has(name)) return;
        pen.fillStyle = Colours.css("soft");
        pen.font = "9px system-ui, 'DejaVu Sans', sans-serif";
        pen.fillText("planned", 8, laneTop(lane) + 7.5);
        pen.font = FONT;
      });
    }

    const redraw = Views.frame(draw);

    // Searching

    function matches(tile) {
      if (tile.soughtFor !== sought) {
        tile.soughtFor = sought;
        tile.sought = Uint8Array.from(tile.tasks, (name) => (name.toLowerCase().includes(sought) ? 1 : 0));
      }
      return tile.sought;
    }

    function search(text) {
      sought = text.trim().toLowerCase();
      hits = [];
      hit = -1;
      if (sought && step) {
        const good = matches(step.actual);
        const begins = ([name, i]) => step.actual.lanes.get(name).from[i];
        step.actual.lanes.forEach((all, name) => all.task.forEach((task, i) => { if (good[task]) hits.push([name, i]); }));
        hits.sort((one, other) => begins(one) - begins(other));
      }
      state.hits = hits.length;
      found(sought ? (hits.length ? Units.number(hits.length, "match", "matches") + " in this step" : "no match in this step") : "");
      redraw();
    }

    function next(by = 1) {
      if (!hits.length) return;
      hit = (hit + by + hits.length) % hits.length;
      const [name, i] = hits[hit], all = step.actual.lanes.get(name);
      const middle = (all.from[i] + all.to[i]) / 2, long = all.to[i] - all.from[i];
      const span = Math.max(Math.min(view.to - view.from, step.to - step.from), long * 1.5, SHORTEST);
      const close = long / span < 0.02 ? long * 20 : span; // so that it can be read
      if (middle < view.from + 0.1 * span || middle > view.to - 0.1 * span || close !== view.to - view.from) {
        whole = false;
        show(middle - close / 2, middle + close / 2);
      }
      found(`${hit + 1} of ${hits.length}: ${describe(step.actual, name, i).split("\n").slice(0, 3).join(", ")}`);
      redraw();
    }

    // Pointing

    function under(px, py) {
      if (px < gutter) return null;
      const perPixel = (view.to - view.from) / (canvas.clientWidth - gutter), at = view.from + (px - gutter) * perPixel;
      const lane = Math.floor((py - lanesTop()) / LANE);
      if (lane < 0 || lane >= names.length) return { at, lane: -1 };
      const planned = py - laneTop(lane) < 12;
      const inside = step && at >= step.from && at <= step.to && (step.to - step.from) / perPixel > DETAIL;
      const pools = planned ? [step?.planned] : [
        inside ? step.actual : null, ...seen.filter((piece) => piece.from <= at && at < piece.to).map((piece) => piece.tile),
      ];
      for (const tile of pools) {
        const all = tile?.lanes.get(names[lane]);
        if (!all) continue;
        const i = Axis.after(all.to, at - 2 * perPixel);
        if (i < all.to.length && all.from[i] <= at + 2 * perPixel) return { at, lane, planned, tile, i, all, name: names[lane] };
      }
      return { at, lane };
    }

    function describe(tile, name, i, planned = false) {
      const all = tile.lanes.get(name), seconds = (all.to[i] - all.from[i]) / 1e9, kind = summary.kinds[all.kind[i]];
      const several = all.count?.[i] > 1, from = origin();
      const time = (ns) => Units.time((ns - from) / 1e9, Math.max(1e-6, (view.to - view.from) / 1e12));
      const where = `${several ? "" : `${kind} `}on ${name}${all.step ? `, step ${all.step[i]}` : ""}`;
      return [
        several ? `${Units.number(all.count[i], "event")}, mostly ${kind}` : tile.tasks[all.task[i]],
        planned ? `planned, ${where}` : where,
        several ? `busy ${Units.seconds(all.busy[i] / 1e9)} of ${Units.seconds(seconds)}` : Units.seconds(seconds),
        `from ${time(all.from[i])} to ${time(all.to[i])}${from ? " of the step" : ""}`,
        all.bytes?.[i] ? `${Units.bytes(all.bytes[i])}, ${Units.rate(all.bytes[i] / seconds, "B/s")}` : "",
        all.waits?.[i] ? `waits for ${all.waits[i]}` : "",
      ].filter(Boolean).join("\n");
    }

    function said(spot, py) {
      if (!spot) return names[Math.floor((py - lanesTop()) / LANE)] ?? null; // beside the chart it may be cut
      if (spot.tile) return describe(spot.tile, spot.name, spot.i, spot.planned);
      const perPixel = (view.to - view.from) / (canvas.clientWidth - gutter), top = Axis.height(summary.marks?.length);
      const mark = summary.marks?.find((one) => Math.abs(one.time * 1e9 - spot.at) < 4 * perPixel);
      if (mark && spot.lane < 0) return `${mark.kind} at ${Units.time(mark.time, 1e-3)}: ${mark.text}`;
      if (!queue || py < top || py >= top + queue.height) return null;
      return queue.under(spot.at / 1e9, py - top, summary.seconds, (3 * perPixel) / 1e9);
    }

    Pointing.on(canvas, {
      gutter: () => gutter, pan, zoom,
      at: (px) => view.from + ((px - gutter) / (canvas.clientWidth - gutter)) * (view.to - view.from),
      says: (px, py) => said(under(px, py), py),
      click(px, py) {
        const spot = under(px, py), number = spot?.all?.step?.[spot.i];
        if (number !== undefined && number !== step?.step) choose(number);
      },
      double(px, py) {
        const spot = under(px, py), all = spot?.all;
        if (!all) return zoom(0.4);
        const long = all.to[spot.i] - all.from[spot.i];
        whole = false;
        return show(all.from[spot.i] - long * 0.5, all.to[spot.i] + long * 0.5);
      },
      keys: { Home: showAll, End: showStep, Enter: () => next() },
    });

    function renewed() {
      meet(summary.lanes.map((lane) => lane.name));
      redraw();
    }

    renewed();
    const undo = Colours.changed(() => { rows.recolour(); redraw(); });
    const watch = new ResizeObserver(redraw);
    watch.observe(canvas);
    state.x = (seconds) => gutter + ((seconds * 1e9 - view.from) / (view.to - view.from)) * (canvas.clientWidth - gutter);
    state.y = (lane) => laneTop(lane) + 20;
    Object.defineProperty(state, "marks", { get: () => summary.marks || [] });
    Gantt.state = state;
    Object.defineProperty(state, "tiles", { get: () => tiles.state });
    return Gantt.current = {
      canvas, state, zoom, pan, showAll, showStep, next, find: search, redraw, step: setStep,
      show(from, to) {
        whole = false;
        show(from, to);
      },
      requests(answer) {
        queue = answer.request.length ? Queue.of(answer) : null;
        state.requests = answer.request.length;
        redraw();
      },
      added(since) {
        tiles.added(since);
        if (whole) showAll(); else redraw();
      },
      renewed,
      close() {
        tiles.close();
        watch.disconnect();
        undo();
      },
    };
  }

  return { of, state: null, current: null };
})();
