"use strict";

// What if: dials over the planner. Every turn is planned anew and shown beside the present plan.
{
  const { make } = Views;
  const { soft, small, title } = Plans;
  const PAUSE = 150; // ms without a turn before it is planned
  const HINT = Data.saved ? "A saved page cannot plan: open the live dashboard or the trace file to turn the dials."
    : "Turn a dial to see what would change.";
  const POINT = "Point at a cell, or walk there with the arrow keys, to see what it would hold.";
  const KEYS = ["format", "goal", "workload", "memory", "bandwidth", "ram", "add"];

  // The change that the address has; one that is none is told, and nothing changed.
  function fromAddress(params) {
    const text = params.get("change");
    if (!text) return {};
    try {
      const found = JSON.parse(text);
      if (found && typeof found === "object" && Object.keys(found).every((key) => KEYS.includes(key))) return found;
    } catch {
      // told below
    }
    Views.tell(new Error("The address asks for a change that this page does not know; the present plan is shown. Turn a dial instead."));
    return {};
  }

  function headline(answer, base) {
    const { predicted, delta } = answer, now = base.predicted;
    const rate = (plan, phase) => Units.rate(plan?.[`${phase}_tokens_per_s`], "tokens/s");
    const were = (text) => small(`now ${text}`);
    if (!predicted && answer === base) return "";
    if (!predicted) return make("div", { class: "figures" }, Plans.figure("decode", "–", were(rate(now, "decode"))));
    const beside = (name, better, worse, text, less) =>
      (answer === base ? [] : [Plans.change(delta?.[name], better, worse, less), were(text)]);
    const binds = answer === base ? [] : [answer.bound_by === base.bound_by ? small("as now") : were(base.bound_by)];
    return make("div", { class: "figures" },
      Plans.figure("decode", rate(predicted, "decode"), Plans.range(predicted),
        ...beside("decode_tokens_per_s", "faster", "slower", rate(now, "decode"))),
      Plans.figure("prefill", rate(predicted, "prefill"), ...beside("prefill_tokens_per_s", "faster", "slower", rate(now, "prefill"))),
      Plans.figure("first token after", Units.seconds(predicted.first_token_s),
        ...beside("first_token_s", "sooner", "later", Units.seconds(now?.first_token_s), true)),
      Plans.figure("what binds", answer.bound_by || "–", ...binds));
  }

  function refused(answer) {
    if (answer.feasible) return "";
    return make("p", { class: "note", id: "whatif-error", role: "alert", text: answer.error });
  }

  function basis({ predicted, took_s: took, policy }) {
    if (!predicted) return "";
    return soft(`Plan: ${policy}. These rates are computed, not run (${Plans.basis(predicted)}); planned in ${Units.seconds(took)}.`);
  }

  function command({ command: line, devices_toml: toml }) {
    if (!line) return "";
    const text = make("pre", { id: "whatif-command", tabindex: 0, text: line });
    const copy = make("button", { type: "button", text: "Copy" });
    copy.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(line);
        copy.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(text); // no clipboard without https: it is selected, to be copied by hand
        copy.textContent = "Selected: press ctrl+C";
      }
    });
    const save = make("button", { type: "button", id: "whatif-toml", text: "Download whatif.toml", on: { click: () => download(toml) } });
    const shown = make("details", {}, make("summary", { text: "whatif.toml: the machine as it would be" }),
      make("pre", { id: "whatif-toml-text", tabindex: 0, text: toml }));
    return make("div", {}, title("The same from the command line"), text,
      make("div", { class: "tools" }, copy, toml ? save : null), toml ? shown : null);
  }

  function download(toml) {
    const link = make("a", { href: URL.createObjectURL(new Blob([toml], { type: "application/toml" })), download: "whatif.toml" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  }

  Views.add({
    id: "whatif",
    title: "What if",
    mount(root, { summary, signal }) {
      const [top, controls, rest] = ["whatif-top", "whatif-dials", "whatif-answer"].map((name) => make("div", { class: name }));
      const state = make("p", { class: "soft whatif-state", role: "status" });
      let can = null, map = null, timer = null, running = null;

      function show(answer) {
        map?.leave();
        const placement = answer.placement;
        const told = make("output", { class: "told", text: POINT });
        const tell = (text) => { told.textContent = text; };
        map = placement?.experts ? ExpertMap.draw(placement, { tell }) : null;
        top.replaceChildren(headline(answer, can.base), refused(answer));
        rest.replaceChildren(basis(answer), ...Plans.notes(answer.notes),
          ...(answer.memory.length ? [title("Memory"), Plans.memory(answer.memory)] : []),
          ...(placement ? [title(answer === can.base ? "The placement now" : "The placement that would result"),
            Places.legend(placement), told,
            make("div", { class: "place-picture" }, PlacementGrid.draw(placement, { tell }), map ? map.root : "")] : []),
          ...(answer.candidates.length ? [title("The plans that were considered"), Plans.candidates(answer.candidates)] : []),
          command(answer));
      }

      // The newest change wins: what was asked before is dropped.
      async function plan(change) {
        running?.abort();
        running = new AbortController();
        const mine = running;
        root.setAttribute("aria-busy", "true");
        state.textContent = "Planning…";
        try {
          const answer = Object.keys(change).length ? await Data.post("whatif", change, { signal: mine.signal }) : can.base;
          if (mine !== running || signal.aborted) return;
          show(answer);
          const now = can.base.feasible ? "This is the present plan." : "Planned anew, the present machine has no plan.";
          state.textContent = Object.keys(change).length ? "" : `${now} ${HINT}`;
        } catch (error) {
          if (mine !== running || signal.aborted || error.name === "AbortError") return;
          state.textContent = "";
          if (!(error instanceof Refused)) throw error;
          top.replaceChildren(headline({ predicted: null }, can.base), refused({ feasible: false, error: error.message }));
        }
        root.removeAttribute("aria-busy");
      }

      function turned(change) {
        const some = Object.keys(change).length > 0;
        Views.keep({ change: some ? JSON.stringify(change) : null });
        reset.hidden = !some;
        clearTimeout(timer);
        timer = setTimeout(() => plan(change), PAUSE);
      }

      const reset = make("button", { type: "button", id: "whatif-reset", text: "Reset everything" });
      reset.addEventListener("click", () => {
        controls.replaceChildren(WhatIfDials.draw(can, {}, turned));
        turned({});
      });

      function begin(found) {
        if (signal.aborted) return;
        can = found;
        const change = fromAddress(Views.params());
        reset.hidden = !Object.keys(change).length;
        controls.replaceChildren(WhatIfDials.draw(can, change, turned));
        if (Data.saved) for (const field of controls.querySelectorAll("input, select, button")) field.disabled = true;
        const left = make("div", {}, make("div", { class: "tools" }, reset, state), controls);
        root.replaceChildren(top, make("div", { class: "whatif" }, left, rest));
        plan(change);
      }
      const load = () => {
        if (!summary.has.plan)
          return root.replaceChildren(Views.empty("Nothing can be planned from this source: it does not hold what plans are made with.",
            "Open a schedule (ciuic plan MODEL --save plan.json, then ciuic dashboard plan.json) or a running server."));
        Data.get("whatif", { signal }).then(begin).catch((error) => signal.aborted || Views.tell(error, load));
      };
      load();
      return {
        unmount() {
          clearTimeout(timer);
          running?.abort();
          map?.leave();
        },
      };
    },
  });
}
