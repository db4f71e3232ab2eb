"use strict";

// The strip: one stacked bar per step, by what the time went to, with a mark where the plan was. It follows the newest
// steps until somebody scrolls back. Steps that took far longer than others of their phase have a cap and a figure.
//   const strip = Strip.of(root, bars, {choose(step), finer(from, to)}): finer is called when bars of several steps are
//   seen that are wide enough to be told apart; strip.came() when bars were added; strip.select(step)
//   strip.fit(), strip.newest(), strip.zoom(factor); strip.state: what is seen, for tests and benchmarks
const Strip = (() => {
  const HEIGHT = 160, TOP = 26, FOOT = 18, GUTTER = 58;
  const USUAL = 8, WIDEST = 40; // px of a step
  const TALLEST = 6; // times the median of what is seen: taller bars are cut off and carry their figure
  const FONT = "12px system-ui, 'DejaVu Sans', sans-serif";

  function of(root, bars, { choose, finer }) {
    const causes = Colours.CAUSES;
    const canvas = Views.make("canvas", {
      tabindex: "0", role: "slider", "aria-label": "Steps: arrow keys go from bar to bar, Enter opens one, s goes to the slowest",
      "aria-valuemin": "0", "aria-valuemax": "0", "aria-valuenow": "0",
    });
    root.append(canvas);
    let width = USUAL; // px of a step
    let left = 0; // steps from the first one to the left edge, may be a fraction
    let follow = true;
    let cursor = -1; // index of a bar
    let chosen = -1; // a step number
    let drag = null;
    let top = 1; // s at the top of the axis
    let asking = 0; // the timer of finer bars

    const room = () => Math.max(1, canvas.clientWidth - GUTTER);
    const fits = () => room() / width; // steps
    const many = () => bars.end - bars.begin; // steps
    const latest = () => Math.max(0, many() - fits());
    const x = (i) => GUTTER + (bars.columns.first[i] - bars.begin - left) * width;
    const wideOf = (i) => (bars.columns.last[i] - bars.columns.first[i] + 1) * width;
    const y = (seconds, base) => base - Math.min(1, seconds / top) * (base - TOP);

    // Drawing

    function draw() {
      const wide = canvas.clientWidth;
      if (!wide) return;
      const pen = Views.pen(canvas, wide, HEIGHT);
      pen.font = FONT;
      pen.textBaseline = "middle";
      pen.fillStyle = Colours.css("page");
      pen.fillRect(0, 0, wide, HEIGHT);
      const base = HEIGHT - FOOT;
      const from = bars.near(bars.begin + Math.floor(left)), to = Math.min(bars.size, bars.near(bars.begin + Math.ceil(left + fits())) + 1);
      top = scale(from, to);
      axis(pen, wide, base);
      pen.save();
      pen.beginPath();
      pen.rect(GUTTER, 0, wide - GUTTER, HEIGHT);
      pen.clip();
      const shown = columns(from, to);
      stacks(pen, shown, base);
      planned(pen, shown, base);
      prompts(pen, shown, base);
      slow(pen, shown, base, wide);
      selection(pen, base);
      numbers(pen, wide);
      pen.restore();
      part(pen, wide);
      state.bars = shown.length;
      state.top = top;
    }

    // Bars as they are drawn: of those that begin in one pixel, the longest.
    function columns(from, to) {
      const shown = [];
      for (let i = from, at = -Infinity; i < to; i++) {
        const here = x(i), wide = wideOf(i);
        if (here < at + 1 && shown.length) {
          const before = shown[shown.length - 1];
          if (bars.total[i] > bars.total[before.bar]) before.bar = i;
          continue;
        }
        at = wide < 1 ? Math.floor(here) : here;
        shown.push({ bar: i, x: at, wide: wide >= 4 ? wide - 1 : Math.max(1, wide) });
      }
      return shown;
    }

    // Seconds at the top: the longest bar that is seen, or a few times the usual if it is far beyond.
    function scale(from, to) {
      let most = 0;
      const seen = [];
      for (let i = from; i < to; i++) {
        most = Math.max(most, bars.total[i], bars.columns.planned[i] ?? 0);
        seen.push(bars.total[i]);
      }
      seen.sort((a, b) => a - b);
      return Math.min(most, TALLEST * (seen[seen.length >> 1] || most)) * 1.04 || 1;
    }

    function axis(pen, wide, base) {
      const power = 10 ** Math.floor(Math.log10(top / 4)), tick = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= top / 4);
      pen.textAlign = "right";
      for (let value = 0; value <= top * 1.001; value += tick) {
        const height = Math.round(y(value, base));
        pen.fillStyle = Colours.css("faint");
        pen.fillRect(GUTTER, height, wide - GUTTER, 1);
        pen.fillStyle = Colours.css("soft");
        pen.fillText(Units.time(value, tick), GUTTER - 6, height);
      }
      pen.fillText("step", GUTTER - 6, HEIGHT - FOOT / 2);
      pen.textAlign = "left";
    }

    // All of one colour after the other.
    function stacks(pen, shown, base) {
      const scaled = (base - TOP) / top, floor = new Float64Array(shown.length);
      causes.forEach((cause, which) => {
        pen.fillStyle = cause === "waiting" ? Colours.hatch(pen, "waiting") : Colours.of(cause);
        shown.forEach((one, i) => {
          const begin = floor[i], tall = bars.columns.seconds[one.bar][which] * scaled;
          floor[i] = begin + tall;
          if (begin >= base - TOP || tall <= 0) return;
          pen.fillRect(one.x, base - Math.min(floor[i], base - TOP), one.wide, Math.min(tall, base - TOP - begin));
        });
      });
    }

    // A line across the bar, on a lighter one so that it is seen on every colour.
    function planned(pen, shown, base) {
      for (const [colour, tall, shift] of [["page", 3, -1.5], ["ink", 1, -0.5]]) {
        pen.fillStyle = Colours.css(colour);
        for (const one of shown) {
          const seconds = bars.columns.planned[one.bar];
          if (seconds !== null && seconds <= top && one.wide >= 2) pen.fillRect(one.x - 0.5, y(seconds, base) + shift, one.wide + 1, tall);
        }
      }
    }

    function prompts(pen, shown, base) {
      pen.fillStyle = Colours.css("ink");
      for (const one of shown) if (bars.columns.phase[one.bar] === "prefill") pen.fillRect(one.x, base + 1, one.wide, 3);
    }

    function slow(pen, shown, base, wide) {
      const late = [];
      for (const one of shown) {
        if (bars.total[one.bar] > top) cut(pen, one.x, one.wide);
        if (bars.slow(one.bar)) late.push({ seconds: bars.total[one.bar], middle: one.x + one.wide / 2 });
      }
      pen.fillStyle = Colours.css("slow");
      pen.beginPath();
      for (const { seconds, middle } of late) {
        const head = y(seconds, base);
        pen.moveTo(middle - 4, head - 7);
        pen.lineTo(middle + 4, head - 7);
        pen.lineTo(middle, head - 1);
      }
      pen.fill();
      figures(pen, late, wide);
    }

    // Along the top, how long the slow ones took: the slowest first, as far as there is room.
    function figures(pen, late, wide) {
      const taken = [];
      pen.textAlign = "center";
      for (const { seconds, middle } of late.sort((a, b) => b.seconds - a.seconds).slice(0, 40)) {
        const text = Units.seconds(seconds), half = pen.measureText(text).width / 2 + 4;
        const place = Math.min(Math.max(middle, GUTTER + half), wide - half);
        if (taken.some((other) => Math.abs(other.place - place) < other.half + half)) continue;
        taken.push({ place, half });
        pen.fillText(text, place, 8);
      }
      pen.textAlign = "left";
    }

    // A bar that is longer than the axis: a gap near its top.
    function cut(pen, at, wide) {
      pen.fillStyle = Colours.css("page");
      pen.fillRect(at - 1, TOP + 8, wide + 2, 2);
      pen.fillRect(at - 1, TOP + 12, wide + 2, 2);
    }

    function selection(pen, base) {
      const outline = (i, colour, thick) => {
        const wide = Math.max(wideOf(i), 3), head = Math.min(y(bars.total[i], base), base - 6);
        pen.strokeStyle = Colours.css(colour);
        pen.lineWidth = thick;
        pen.strokeRect(x(i) - 1.5, head - 1.5, wide + 2, base - head + 3);
      };
      const place = bars.at(chosen);
      if (place >= 0) outline(place, "mark", 2.5);
      if (cursor >= 0 && cursor < bars.size && cursor !== place) outline(cursor, "soft", 1);
    }

    function numbers(pen, wide) {
      if (!bars.size) return;
      pen.fillStyle = Colours.css("soft");
      const rough = Math.max(1, 90 / width), power = 10 ** Math.floor(Math.log10(rough));
      const tick = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
      const from = bars.begin + left;
      for (let step = Math.ceil(from / tick) * tick; step < Math.min(bars.end, from + fits()); step += tick) {
        const at = GUTTER + (step - from) * width;
        if (at + pen.measureText(step).width < wide) pen.fillText(step, at, HEIGHT - FOOT / 2);
      }
    }

    // Which part of all steps is seen, where not all are.
    function part(pen, wide) {
      if (many() <= fits() + 0.5) return;
      const each = (wide - GUTTER) / many();
      pen.fillStyle = Colours.css("faint");
      pen.fillRect(GUTTER, HEIGHT - 4, wide - GUTTER, 4);
      pen.fillStyle = Colours.css("soft");
      pen.fillRect(GUTTER + left * each, HEIGHT - 4, Math.max(12, fits() * each), 4);
    }

    const redraw = Views.frame(draw);

    // Moving

    function scroll(to) {
      left = Math.min(Math.max(0, to), latest());
      follow = left >= latest() - 0.5;
      redraw();
      clearTimeout(asking);
      asking = setTimeout(refine, 200);
    }

    // Finer bars, where those that are seen are of several steps and there is room for each.
    function refine() {
      if (width < 1.5 || fits() > 2000) return;
      const found = bars.shared(bars.begin + Math.floor(left), bars.begin + Math.ceil(left + fits()));
      if (found) finer(...found);
    }

    function zoom(factor, px = canvas.clientWidth / 2) {
      const step = left + (px - GUTTER) / width;
      width = Math.min(WIDEST, Math.max(Math.min(1, room() / Math.max(1, many())), width * factor));
      scroll(step - (px - GUTTER) / width);
    }

    function fit() {
      width = Math.min(24, room() / Math.max(1, many()));
      scroll(0);
    }

    function newest() {
      width = Math.max(USUAL, width);
      scroll(latest());
    }

    // The first time all that there is; later the newest, unless somebody scrolled back.
    function came(first = false) {
      if (first) fit();
      else if (follow) {
        if (width > 3) width = Math.max(3, Math.min(width, Math.max(USUAL, room() / many())));
        scroll(latest());
      }
      redraw();
    }

    function move(to) {
      cursor = Math.min(Math.max(0, to), bars.size - 1);
      reveal(cursor);
      canvas.setAttribute("aria-valuemax", bars.end - 1);
      canvas.setAttribute("aria-valuenow", bars.columns.worst[cursor]);
      canvas.setAttribute("aria-valuetext", describe(cursor).replaceAll("\n", ", "));
      const box = canvas.getBoundingClientRect();
      if (document.activeElement === canvas) Views.tip(describe(cursor), box.left + x(cursor), box.top + HEIGHT);
      redraw();
    }

    function reveal(i) {
      const step = bars.columns.first[i] - bars.begin;
      if (step < left) scroll(step - 2);
      else if (step > left + fits() - 1) scroll(step - fits() + 3);
    }

    function select(step) {
      chosen = step;
      const place = bars.at(step);
      if (place >= 0) {
        cursor = place;
        reveal(place);
      }
      redraw();
    }

    function describe(i) {
      const { first, last, worst, phase, tokens, planned: plans, seconds } = bars.columns;
      const lines = [
        `Step ${worst[i]}: ${phase[i]}, ${Units.number(tokens[i], "token")}`,
        `${Units.seconds(bars.total[i])}${plans[i] === null ? "" : `, planned ${Units.seconds(plans[i])}`}`,
        ...causes.map((cause, which) => [Colours.NAMES[cause], seconds[i][which]]).filter(([, s]) => s > 0)
          .map(([name, s]) => `${Units.seconds(s)} ${name}`),
      ];
      if (last[i] > first[i]) lines.push(`the longest of ${last[i] - first[i] + 1} steps, ${first[i]} to ${last[i]}`);
      return lines.join("\n");
    }

    // The bar at a place: where they are thin, the tallest within two pixels.
    function under(px) {
      if (px < GUTTER) return -1;
      const reach = width < 3 ? 2 : 0, step = (at) => Math.floor(bars.begin + left + (at - GUTTER) / width);
      let best = -1;
      for (let i = bars.near(step(px - reach)); i < bars.size && bars.columns.first[i] <= step(px + reach); i++)
        if (best < 0 || bars.total[i] > bars.total[best]) best = i;
      return best;
    }

    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      drag = { x: event.offsetX, left, moved: false, bar: event.offsetY > HEIGHT - 8 };
    });
    canvas.addEventListener("pointermove", (event) => {
      if (drag) {
        const by = event.offsetX - drag.x;
        drag.moved ||= Math.abs(by) > 4;
        if (drag.moved) scroll(drag.bar ? drag.left + (by * many()) / room() : drag.left - by / width);
        return;
      }
      const bar = under(event.offsetX);
      Views.tip(bar >= 0 ? describe(bar) : null, event.clientX, event.clientY);
    });
    canvas.addEventListener("pointerup", (event) => {
      const still = drag && !drag.moved;
      drag = null;
      const bar = still ? under(event.offsetX) : -1;
      if (bar >= 0) choose(bars.columns.worst[bar]);
    });
    canvas.addEventListener("pointercancel", () => { drag = null; });
    canvas.addEventListener("pointerleave", () => Views.tip(null));
    canvas.addEventListener("blur", () => Views.tip(null));
    canvas.addEventListener("wheel", (event) => {
      if (event.ctrlKey || event.metaKey) zoom(Math.exp(-event.deltaY / 300), event.offsetX);
      else if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) scroll(left + (event.deltaX || event.deltaY) / width);
      else return; // the page scrolls
      event.preventDefault();
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || !bars.size) return;
      const here = cursor < 0 ? bars.size : cursor, page = Math.max(1, Math.round(state.bars / 2));
      const open = () => choose(bars.columns.worst[Math.min(here, bars.size - 1)]);
      const act = {
        ArrowLeft: () => move(here - 1), ArrowRight: () => move(here + 1), Home: () => move(0), End: () => move(bars.size - 1),
        PageUp: () => move(here - page), PageDown: () => move(here + page), Enter: open, " ": open,
        "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5),
      }[event.key];
      if (!act) return;
      act();
      event.preventDefault();
    });

    const state = {
      bars: 0, top: 1, x: (step) => x(bars.at(step)) + wideOf(bars.at(step)) / 2,
      get size() { return bars.size; }, get steps() { return many(); }, get follow() { return follow; }, get left() { return left; },
      get width() { return width; }, get chosen() { return chosen; }, get usual() { return bars.usual; },
    };
    const watch = new ResizeObserver(() => scroll(follow ? latest() : left));
    watch.observe(canvas);
    const undo = Colours.changed(redraw);
    Strip.state = state;
    return {
      came, select, fit, newest, zoom, canvas, state, redraw,
      close() {
        clearTimeout(asking);
        watch.disconnect();
        undo();
      },
    };
  }

  return { of, state: null };
})();
