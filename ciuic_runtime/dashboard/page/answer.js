"use strict";

// Why one step took as long as it did, in plain words, and what would make it faster.
//   Answer.show(root, answer of GET steps/n, {usual: s, before(), after()}); Answer.hint(root, slowest, choose, size)
const Answer = (() => {
  const { make } = Views;

  function show(root, answer, { usual, before, after }) {
    const total = Colours.CAUSES.reduce((sum, cause) => sum + answer.seconds[cause], 0);
    root.replaceChildren(
      make("div", { class: "headline" },
        make("h2", { text: `Step ${answer.step}: ${Units.seconds(total)}` }),
        make("span", { class: "spread row" },
          make("button", { type: "button", text: "‹", "aria-label": "The step before", on: { click: before } }),
          make("button", { type: "button", text: "›", "aria-label": "The next step", on: { click: after } }))),
      make("p", { class: "soft", text: batch(answer, total, usual) }),
      verdict(answer),
      ...parts(answer, total),
      ...faster(answer),
      ...figures(answer, total),
      ...idle(answer),
      tasks(answer),
    );
  }

  function batch(answer, total, usual) {
    const of = [answer.phase, Units.number(answer.tokens, "token"), answer.sequences > 1 ? Units.number(answer.sequences, "sequence") : ""];
    const numbers = (answer.requests || []).map((one) => one.request);
    if (numbers.length) of.push(`request${numbers.length === 1 ? "" : "s"} ${list(numbers)}`);
    if (usual && total > 1.2 * usual) of.push(`${Units.times(total / usual)} the usual ${Units.seconds(usual)}`);
    return of.filter(Boolean).join(" · ");
  }

  const list = (all) => (all.length > 6 ? `${all.slice(0, 6).join(", ")} and ${all.length - 6} more` : all.join(", "));

  // The late task and what it waited for; without one, what binds.
  function verdict(answer) {
    const { late, binds } = answer;
    const box = make("div", { class: late ? "why" : "why fine", id: "verdict" });
    if (late) box.append(make("p", {}, ...linked(sentence(late.text), [late.waits_for, late.task])));
    else box.append(make("p", { text: "No task was late." }));
    if (binds) box.append(make("p", { class: late ? "soft" : "", text: sentence(binds.text) }));
    return box;
  }

  // A whole sentence; a name at its begin stays as it is.
  const sentence = (text) => (/^\S*[.:\d]/.test(text) ? text[0] : text[0].toUpperCase()) + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

  // A text in which the name of the page leads to why it is where it is.
  function linked(text, names) {
    const page = names.find((name) => name && text.includes(name));
    if (!page) return [text];
    const at = text.lastIndexOf(page); // the task's name, which may be its begin, comes first
    const link = Views.a("placement", { name: page }, page, { title: "Why this page is where it is" });
    return [text.slice(0, at), link, text.slice(at + page.length)];
  }

  function parts(answer, total) {
    if (!total) return [];
    const bar = make("div", { class: "parts", "aria-hidden": "true" });
    const rows = [];
    for (const cause of Colours.CAUSES) {
      const seconds = answer.seconds[cause];
      if (!seconds) continue;
      const piece = make("i", { class: `colour-${cause}` });
      piece.style.width = `${(seconds / total) * 100}%`;
      bar.append(piece);
      rows.push(make("li", {}, make("div", {}, make("i", { class: `colour-${cause}` }), Colours.NAMES[cause]),
        make("span", { text: Units.seconds(seconds) }), make("span", { text: Units.percent(seconds / total) })));
    }
    return [make("h3", { text: "Where the time went" }), bar, make("ul", { class: "legend" }, ...rows)];
  }

  function faster(answer) {
    if (!answer.faster?.length) return [];
    const items = answer.faster.map(({ text, whatif }) => make("li", {}, text, " ",
      whatif ? Views.a("whatif", { change: JSON.stringify(whatif) }, "Try it in What if", { class: "try" }) : null));
    return [make("h3", { text: "What would make it faster" }), make("ul", { id: "faster" }, ...items)];
  }

  function figures(answer, total) {
    const rows = [["took", Units.seconds(total)]];
    const { planned, recosted, overlap } = answer;
    if (planned) rows.push(["planned", `${Units.seconds(planned.seconds)} (${planned.basis}); it took ${beside(total / planned.seconds)}`]);
    if (recosted) rows.push(["recosted", `${Units.seconds(recosted.seconds)} with the batch and the reads that came`]);
    if (overlap) {
      const hidden = `${overlap.percent.toFixed(0)} % of ${Units.seconds(overlap.read_s)}`;
      rows.push(["overlap", `${hidden} of reads hidden behind computing`]);
    }
    const why = (answer.notes || []).map((note) => make("p", { class: "soft", text: note }));
    return [make("h3", { text: "Planned and actual" }), ...why,
      make("dl", { class: "facts" }, ...rows.flatMap(([name, value]) => [make("dt", { text: name }), make("dd", { text: value })]))];
  }

  const beside = (factor) => (factor >= 2 ? `${Units.times(factor)} that` : `${Units.change(factor - 1)}`);

  function idle(answer) {
    if (!answer.idle?.length) return [];
    const says = { disk: "waiting for the disk", copy: "waiting for a copy", network: "waiting for the network" };
    const rows = [...answer.idle].sort((a, b) => b.seconds - a.seconds).slice(0, 8)
      .flatMap(({ lane, cause, seconds }) => [
        make("dt", { text: lane }), make("dd", { text: `${Units.seconds(seconds)}, ${says[cause] || cause}` }),
      ]);
    return [make("h3", { text: "Idle" }), make("dl", { class: "facts" }, ...rows)];
  }

  // The chart in words: every task of the step, made when it is opened.
  function tasks(answer) {
    const box = make("details", { id: "tasks" }, make("summary", { text: "All tasks of this step" }));
    box.addEventListener("toggle", () => {
      if (!box.open || box.children.length > 1) return;
      const rows = [];
      for (const lane of answer.lanes)
        lane.actual.from.forEach((from, i) => rows.push([from, [
          lane.actual.task[i], lane.name, lane.actual.kind[i],
          Units.seconds(from - answer.start), Units.seconds(lane.actual.to[i] - from),
          lane.actual.waits_for?.[i] || "",
        ]]));
      rows.sort((a, b) => a[0] - b[0]);
      const heads = ["Task", "Lane", "Kind", { text: "Begins", number: true }, { text: "Takes", number: true }, "Waits for"];
      const made = Views.table(heads, rows.slice(0, 2000).map(([, row]) => row), `Tasks of step ${answer.step}`);
      made.classList.add("tall");
      box.append(made);
      if (rows.length > 2000) box.append(make("p", { class: "soft", text: `The first 2,000 of ${Units.count(rows.length)} tasks.` }));
    });
    return box;
  }

  function hint(root, slowest, choose, size) {
    root.replaceChildren(make("h2", { text: "Why was a token slow?" }));
    if (!size) {
      const says = "No step is recorded yet. When the model answers a request, its steps show up above as they are taken.";
      return root.append(make("p", { text: says }));
    }
    const first = "Click a tall bar above. What every device did is then below it, and here in words what the time was lost to.";
    root.append(make("p", { text: first }));
    const [worst] = slowest;
    const times = worst.usual && worst.slow ? `, ${Units.times(worst.seconds / worst.usual)} the usual ${Units.seconds(worst.usual)}` : "";
    const says = worst.slow ? "The slowest" : "No step stands out: all took about what is usual. The longest";
    return root.append(
      make("p", { text: `${says}: step ${worst.step} took ${Units.seconds(worst.seconds)}${times}.` }),
      make("p", {}, make("button", {
        type: "button", class: "main", id: "slowest", text: "Why?", "aria-label": `Why did step ${worst.step} take so long?`,
        on: { click: () => choose(worst.step) },
      })),
    );
  }

  return { show, hint };
})();
