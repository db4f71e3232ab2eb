"use strict";

// Tokens: the strip of steps, the chart of the chosen one, and in words why it took as long as it did.
Views.add({
  id: "tokens",
  title: "Tokens",
  mount(root, { params, summary, signal }) {
    const { make } = Views;
    const button = (text, action, given = {}) => make("button", { type: "button", text, on: { click: action }, ...given });
    if (summary.has?.steps === false && summary.kind !== "live") {
      const hint = "Open a trace, which ciuic run --trace FILE writes, with ciuic dashboard FILE.";
      root.append(Views.empty("This source has no steps: nothing was run with it yet.", hint));
      if (summary.has.schedule)
        root.append(make("p", { class: "empty" }, Views.a("why", {}, "Why this plan"), " · ", Views.a("placement", {}, "What is where")));
      return {};
    }
    const legend = { ...Colours.NAMES, planned: "planned", prefill: "prefill (the prompt)", slow: "slow for its phase" };
    const slow = make("span", { class: "tools", id: "slow" });
    const stripBox = make("div", { class: "strip" });
    const ganttBox = make("div", { class: "gantt" });
    const answer = make("aside", { class: "answer card", "aria-label": "Why this step took as long as it did", "aria-live": "polite" });
    const search = make("input", {
      type: "search", id: "find", placeholder: "layers.3.experts.17", "aria-keyshortcuts": "/",
      "aria-label": "Find a task or a page by name; Enter goes to the next",
    });
    const found = make("output", { class: "found", for: "find" });
    const thisStep = button("This step", () => gantt.showStep(), { id: "this-step", disabled: true });
    let chosen = null; // the number of the step that is shown, or about to be
    let rank = -1; // of the slow steps, when going through them by key
    const waiting = new Set(); // what is done soon
    let kinds = "";
    let begun = false;
    const live = summary.kind === "live" && !Data.saved;

    root.append(
      make("div", { class: "headline" },
        make("h2", { text: "Steps" }), slow,
        make("span", { class: "tools spread" },
          button("−", () => strip.zoom(1 / 1.6), { "aria-label": "Narrower bars" }),
          button("+", () => strip.zoom(1.6), { "aria-label": "Wider bars" }),
          button("All", () => strip.fit(), { title: "All steps" }),
          button("Newest", () => strip.newest(), { title: "Follow the newest steps" }))),
      stripBox,
      Views.legend([...Colours.CAUSES, "planned", "prefill", "slow"], legend),
      make("div", { class: "tokens" },
        make("div", {},
          make("div", { class: "tools", role: "toolbar", "aria-label": "What the chart shows" },
            thisStep, button("Whole trace", () => gantt.showAll(), { id: "whole-trace" }),
            button("−", () => gantt.zoom(2), { "aria-label": "Zoom out" }),
            button("+", () => gantt.zoom(0.5), { "aria-label": "Zoom in" }),
            search, found),
          ganttBox, make("div", { id: "kinds" })),
        answer),
    );
    const bars = Bars.of();
    const strip = Strip.of(stripBox, bars, { choose, finer });
    const gantt = Gantt.of(ganttBox, { summary, bars, choose, found: (text) => { found.textContent = text; } });
    const usual = (step) => (step.phase === "decode" ? bars.usual.decode : bars.usual.prefill * step.tokens);
    const MOST = 8000; // bars kept; beyond, they are asked for anew, several steps to a bar

    async function load() {
      const first = bars.size === 0;
      bars.set(await Data.get("steps?most=2000", { signal }));
      strip.came(first);
      if (live && first && strip.state.width < 3) strip.newest();
      slower();
      if (chosen === null) Answer.hint(answer, bars.slowest(1), choose, bars.size);
      else strip.select(chosen);
      return gantt.redraw();
    }

    async function finer(from, to) {
      if (Data.saved) return;
      bars.refine(await Data.get(`steps?from=${from}&to=${to}&most=2000`, { signal }));
      strip.redraw();
      gantt.redraw();
    }

    async function requests() {
      gantt.requests(await Data.get("requests?most=500", { signal }));
    }

    async function choose(number) {
      chosen = number;
      Views.keep({ step: number, from: null, to: null });
      strip.select(number);
      let step;
      try {
        step = await Data.get(`steps/${number}`, { signal });
      } catch (error) {
        if (error.name !== "AbortError" && chosen === number)
          answer.replaceChildren(make("h2", { text: `Step ${number}` }), make("p", { text: error.message }));
        return;
      }
      if (chosen !== number) return; // another one was chosen meanwhile
      gantt.step(step);
      thisStep.disabled = false;
      Answer.show(answer, step, { usual: usual(step), before: () => beside(-1), after: () => beside(1) });
      legends(step);
    }

    function beside(by) {
      const next = chosen + by;
      if (next >= (summary.first_step || 0) && next < (summary.first_step || 0) + summary.num_steps) choose(next);
    }

    // The kinds of task that the chosen step has.
    function legends(step) {
      const seen = new Set(step.lanes.flatMap((lane) => lane.actual.kind));
      const names = Colours.KINDS.filter((kind) => seen.has(kind));
      if (names.join() === kinds) return;
      kinds = names.join();
      document.getElementById("kinds").replaceChildren(Views.legend(names, { wait: "waits for a page", read: "read from disk" }));
    }

    function slower() {
      const worst = bars.slowest(4);
      const entry = ({ step, seconds }) => button(`${step}: ${Units.seconds(seconds)}`, () => choose(step), {
        class: "plain", title: `Step ${step} took ${Units.seconds(seconds)}`,
      });
      const says = worst.length ? [make("span", { class: "soft", text: worst[0].slow ? "slowest:" : "longest:" })] : [];
      slow.replaceChildren(...says, ...worst.map(entry));
    }

    function newest() {
      slower();
      gantt.redraw();
      if (chosen === null) Answer.hint(answer, bars.slowest(1), choose, bars.size);
    }

    // At most once a second, and once more after the last time that it was asked for.
    function soon(action) {
      if (waiting.has(action)) return;
      waiting.add(action);
      setTimeout(() => {
        waiting.delete(action);
        if (!signal.aborted) action();
      }, 1100);
    }

    function keys(event) {
      if (event.target.closest("input, select, textarea, dialog") || event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "/") search.focus();
      else if (event.key === "s") {
        const worst = bars.slowest(20);
        if (!worst.length) return;
        rank = (rank + 1) % worst.length;
        choose(worst[rank].step);
      } else return;
      event.preventDefault();
    }

    search.addEventListener("input", () => gantt.find(search.value));
    search.addEventListener("keydown", (event) => {
      if (event.key === "Enter") gantt.next(event.shiftKey ? -1 : 1);
      if (event.key === "Escape") { search.value = ""; gantt.find(""); }
    });
    document.addEventListener("keydown", keys, { signal });

    gantt.showAll();
    const from = params.get("from"), to = params.get("to");
    const first = params.get("step");
    if (first !== null) chosen = Number(first);
    async function begin() {
      begun = true;
      await Promise.all([load(), requests()]);
      if (first === null) return;
      await choose(Number(first));
      if (from && to) gantt.show(from * 1e9, to * 1e9);
    }
    // A live source is asked once it is connected, so that no step is missed in between.
    if (live && !Data.connected) setTimeout(() => { if (!begun && !signal.aborted) begin(); }, 1500);
    else begin();

    return {
      live(event) {
        if (event.type === "connection" && event.open) {
          gantt.added(0);
          if (!begun) return begin();
          return Promise.all([load(), requests()]); // what came while it was not connected
        }
        if (event.type === "steps" && event.first.length) {
          const was = bars.size, anew = event.first_step + event.num_steps < bars.end, gap = was && event.first[0] > bars.end;
          gantt.added(anew || gap ? 0 : event.since * 1e9);
          if (was > MOST || anew || gap) return load();
          bars.add(event);
          strip.came(!was);
          soon(newest);
        } else if (event.type === "requests") soon(requests);
        else if (event.type === "marks" || event.type === "summary") gantt.renewed();
        return null;
      },
      show(next) {
        const step = next.get("step");
        if (step !== null && Number(step) !== chosen) choose(Number(step));
      },
      unmount() {
        strip.close();
        gantt.close();
      },
    };
  },
});
