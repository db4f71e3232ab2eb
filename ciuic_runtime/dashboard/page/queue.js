"use strict";

// Requests along the time axis: a thin span for each, from its arrival over the prompt to its last token, and a line of how
// many run and wait. Spans that do not meet share a row.
//   const queue = Queue.of(answer of GET requests); queue.height; queue.draw(pen, scale, top, now in s); queue.under(s, y)
const Queue = (() => {
  const MOST_ROWS = 16, LINE = 30;

  function of(answer) {
    const size = answer.request.length;
    const ends = (i) => answer.ended[i] ?? Infinity;
    const order = Array.from({ length: size }, (_, i) => i).sort((a, b) => answer.arrived[a] - answer.arrived[b]);
    const free = []; // when the row's last request ended
    const row = new Int32Array(size);
    for (const i of order) {
      let place = free.findIndex((end) => end <= answer.arrived[i]);
      if (place < 0) place = free.length;
      free[place] = ends(i);
      row[i] = place;
    }
    const rows = Math.min(MOST_ROWS, free.length), tall = rows > 8 ? 5 : 9;
    const counts = counted(answer, size);
    const most = Math.max(1, ...counts.running, ...counts.waiting);
    const height = size ? rows * tall + 6 + LINE + 6 : 0;

    function draw(pen, scale, top, now) {
      const end = (i) => (answer.ended[i] ?? now) * 1e9;
      // Each kind of span in one colour after the other: what waits is hatched.
      for (const [from, to, colour] of [
        [(i) => answer.arrived[i], (i) => answer.admitted[i] ?? answer.ended[i] ?? now, "queued"],
        [(i) => answer.admitted[i], (i) => answer.first_token[i] ?? answer.ended[i] ?? now, "attention"],
        [(i) => answer.first_token[i], (i) => answer.ended[i] ?? now, "embedding"],
      ]) {
        pen.fillStyle = colour === "queued" ? Colours.hatch(pen, "waiting") : Colours.of(colour);
        for (let i = 0; i < size; i++) {
          if (row[i] >= rows || from(i) === null || answer.arrived[i] * 1e9 > scale.to || end(i) < scale.from) continue;
          const a = Math.max(scale.left - 2, scale.x(from(i) * 1e9)), b = Math.min(scale.right + 2, scale.x(to(i) * 1e9));
          if (b > a) pen.fillRect(a, top + row[i] * tall, Math.max(1, b - a - 0.5), tall - 2);
        }
      }
      pen.fillStyle = Colours.css("ink");
      for (let i = 0; i < size; i++) {
        if (row[i] >= rows || answer.first_token[i] === null) continue;
        const x = scale.x(answer.first_token[i] * 1e9);
        if (x >= scale.left && x <= scale.right) pen.fillRect(x - 1, top + row[i] * tall - 1, 2, tall);
      }
      line(pen, scale, top + rows * tall + 6, now);
    }

    function line(pen, scale, top, now) {
      const y = (n) => top + LINE - (n / most) * (LINE - 4);
      const trace = (values) => {
        let i = Math.max(0, Axis.after(counts.time, scale.from / 1e9) - 1);
        pen.beginPath();
        pen.moveTo(scale.left, y(counts.time[i] * 1e9 <= scale.from ? values[i] : 0));
        if (counts.time[i] * 1e9 <= scale.from) i += 1;
        for (; i < counts.time.length && counts.time[i] * 1e9 < scale.to; i++) {
          const x = Math.max(scale.left, scale.x(counts.time[i] * 1e9));
          pen.lineTo(x, y(i ? values[i - 1] : 0));
          pen.lineTo(x, y(values[i]));
        }
        pen.lineTo(Math.min(scale.right, scale.x(now * 1e9)), y(i ? values[i - 1] : 0));
      };
      pen.lineWidth = 1.5;
      trace(counts.running);
      pen.strokeStyle = Colours.of("attention");
      pen.stroke();
      trace(counts.waiting);
      pen.strokeStyle = Colours.css("slow");
      pen.setLineDash([3, 2]);
      pen.stroke();
      pen.setLineDash([]);
    }

    function names(pen, top, room) {
      pen.fillStyle = Colours.css("ink");
      const some = free.length > rows ? `requests (${rows} of ${free.length} rows)` : "requests";
      Axis.text(pen, some, 8, top + Math.max(5, (rows * tall) / 2), room);
      pen.fillStyle = Colours.of("attention");
      Axis.text(pen, `running, to ${most}`, 8, top + rows * tall + 12, room);
      pen.fillStyle = Colours.css("slow");
      Axis.text(pen, "waiting", 8, top + rows * tall + 27, room);
    }

    // What is said of the place: a request, or how many run and wait.
    function under(seconds, y, now, slack) {
      const here = Math.floor(y / tall);
      if (here < rows) {
        const covers = (one) => answer.arrived[one] - slack <= seconds && seconds <= (answer.ended[one] ?? now) + slack;
        const i = order.find((one) => row[one] === here && covers(one));
        return i === undefined ? null : describe(i, now);
      }
      const i = Axis.after(counts.time, seconds) - 1;
      return `${counts.running[i] ?? 0} running, ${counts.waiting[i] ?? 0} waiting`;
    }

    function describe(i, now) {
      const { arrived, admitted, first_token: first, ended } = answer;
      const cached = answer.cached_tokens[i] ? ` (${answer.cached_tokens[i]} cached)` : "";
      return [
        `Request ${answer.request[i]}: ${Units.number(answer.prompt_tokens[i], "prompt token")}${cached}, ${answer.new_tokens[i]} new`,
        `waited ${Units.seconds((admitted[i] ?? ended[i] ?? now) - arrived[i])} in the queue`,
        first[i] === null ? "no token yet" : `first token after ${Units.seconds(first[i] - arrived[i])}`,
        first[i] !== null && ended[i] !== null && answer.new_tokens[i] > 1
          ? Units.rate((answer.new_tokens[i] - 1) / (ended[i] - first[i]), "tokens/s") : "",
        answer.preemptions[i] ? `preempted ${answer.preemptions[i]} times` : "",
        ended[i] === null ? "runs" : `ended: ${answer.finish_reason[i] || "not said"}`,
      ].filter(Boolean).join("\n");
    }

    return { height, draw, names, under, size };
  }

  // How many requests run and wait after each time at which that changes.
  function counted(answer, size) {
    const changes = [];
    for (let i = 0; i < size; i++) {
      changes.push([answer.arrived[i], 0, 1]);
      if (answer.admitted[i] !== null) changes.push([answer.admitted[i], 1, -1]);
      const ran = answer.admitted[i] !== null;
      if (answer.ended[i] !== null) changes.push([answer.ended[i], ran ? -1 : 0, ran ? 0 : -1]);
    }
    changes.sort((a, b) => a[0] - b[0]);
    const found = { time: [], running: [], waiting: [] };
    let running = 0, waiting = 0;
    for (const [time, more, queued] of changes) {
      running += more;
      waiting += queued;
      if (found.time.at(-1) === time) for (const name of ["time", "running", "waiting"]) found[name].pop();
      found.time.push(time);
      found.running.push(running);
      found.waiting.push(waiting);
    }
    return found;
  }

  return { of };
})();
