"use strict";

// What lies behind and above the lanes of the chart: ticks of time, the steps, and marks of the cluster.
// Drawn with a scale {from, to (ns), x(ns) -> px, left, right, height}.
const Axis = (() => {
  const STEPS = 9, TICKS = 27, MARKS = 43; // y of their texts
  const LETTER = 6.3; // px that one takes, usually

  // Ticks count from `origin` ns, which is the begin of the step that is looked at, or of the recording.
  function ticks(pen, scale, origin) {
    const { from, to, left, right, height, x } = scale;
    const rough = ((to - from) / Math.max(2, (right - left) / 110)), power = 10 ** Math.floor(Math.log10(rough));
    const tick = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
    const first = Math.ceil((Math.max(from, 0) - origin) / tick), last = Math.floor((to - origin) / tick);
    pen.fillStyle = Colours.css("faint");
    for (let n = first; n <= last; n++) pen.fillRect(Math.round(x(origin + n * tick)), 18, 1, height);
    pen.fillStyle = Colours.css("soft");
    for (let n = first; n <= last; n++) pen.fillText(Units.time((n * tick) / 1e9, tick / 1e9), x(origin + n * tick) + 4, TICKS);
  }

  // The first bar that ends after a time: bars are in order.
  function after(ends, seconds) {
    let low = 0, high = ends.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (ends[middle] > seconds) high = middle; else low = middle + 1;
    }
    return low;
  }

  // `chosen` is {step, from, to, phase, tokens} of the one that is looked at, or null; bars may be of several steps each.
  function steps(pen, scale, bars, chosen) {
    const { from, to, left, right, height, x } = scale;
    const begin = after(bars.end, from / 1e9);
    const wide = begin < bars.start.length ? x(bars.end[begin] * 1e9) - x(bars.start[begin] * 1e9) : 0;
    for (let i = begin; i < bars.start.length && bars.start[i] * 1e9 < to; i++) {
      const a = Math.max(left, x(bars.start[i] * 1e9)), b = Math.min(right, x(bars.end[i] * 1e9));
      if (wide < 3) break;
      if (i % 2) {
        pen.fillStyle = Colours.css("card");
        pen.fillRect(a, 2, b - a, height);
      }
      if (b - a < 34 || (chosen && bars.first[i] <= chosen.step && chosen.step <= bars.last[i])) continue;
      pen.fillStyle = Colours.css("soft");
      const number = bars.first[i] === bars.last[i] ? `step ${bars.first[i]}` : `steps ${bars.first[i]} to ${bars.last[i]}`;
      text(pen, `${number} · ${bars.phase[i]}, ${Units.number(bars.tokens[i], "token")}`, a + 4, STEPS, b - a - 8);
    }
    if (!chosen || chosen.to < from || chosen.from > to) return;
    const a = Math.max(left, x(chosen.from)), b = Math.min(right, x(chosen.to));
    pen.fillStyle = Colours.css("mark");
    pen.fillRect(a, 0, Math.max(2, b - a), 2);
    if (b - a < 3) return;
    pen.fillRect(Math.round(x(chosen.from)), 0, 1, height);
    pen.fillRect(Math.round(x(chosen.to)), 0, 1, height);
    pen.fillStyle = Colours.css("ink");
    text(pen, `step ${chosen.step} · ${chosen.phase}, ${Units.number(chosen.tokens, "token")}`, a + 4, STEPS, b - a - 8);
  }

  // A text cut to a width, by the usual width of a letter: measuring every text would take longer than drawing it.
  function text(pen, words, x, y, room) {
    const letters = Math.floor(room / LETTER);
    if (letters < 2) return;
    pen.fillText(words.length > letters ? `${words.slice(0, letters - 1)}…` : words, x, y);
  }

  const COLOUR = { lost: "slow", replanned: "mark", recovered: "good", joined: "good" };

  function marks(pen, scale, all) {
    let free = scale.left;
    for (const mark of all) {
      const x = Math.round(scale.x(mark.time * 1e9));
      if (x < scale.left - 1 || x > scale.right) continue;
      const colour = Colours.css(COLOUR[mark.kind] || "ink");
      pen.strokeStyle = colour;
      pen.lineWidth = 1.5;
      pen.setLineDash(mark.kind === "lost" ? [] : [5, 3]);
      pen.beginPath();
      pen.moveTo(x + 0.5, 34);
      pen.lineTo(x + 0.5, scale.height);
      pen.stroke();
      pen.setLineDash([]);
      if (x < free) continue;
      const words = mark.text.toLowerCase().includes(mark.kind) ? mark.text : `${mark.kind}: ${mark.text}`;
      pen.fillStyle = colour;
      text(pen, words, x + 5, MARKS, scale.right - x - 8);
      free = x + 12 + words.length * LETTER;
    }
  }

  return { ticks, steps, marks, text, after, LETTER, height: (withMarks) => (withMarks ? 54 : 38) };
})();
