"use strict";

// Why this plan: the candidates, the bound and what binds; what was forecast beside what came; how good the calibration is.
{
  const { make } = Views;
  const { soft, small, title } = Plans;
  const none = (value) => value === null || value === undefined;

  const RECOSTED = "Recosted is what the same model of costs says once the batch and the reads that really came are known. "
    + "What forecast and recosted differ by is due to the workload; what recosted and measured differ by, to the model.";

  function chosen(found) {
    const { policy, goal, workload_text, predicted, bound, gap, binding } = found;
    const figures = predicted ? [
      Plans.figure("decode", Units.rate(predicted.decode_tokens_per_s, "tokens/s"), Plans.range(predicted)),
      Plans.figure("prefill", Units.rate(predicted.prefill_tokens_per_s, "tokens/s")),
      Plans.figure("first token after", Units.seconds(predicted.first_token_s)),
    ] : [];
    if (bound)
      figures.push(Plans.figure("no placement could beat",
        written(bound.decode_tokens_per_s, "tokens/s"), small("decode, an upper bound")));
    if (!none(gap)) figures.push(Plans.figure("gap to that bound", Units.percent(gap)));
    return [
      title(policy ? `Plan: ${policy}` : "Plan"),
      make("p", { text: `For ${goal}; ${workload_text}.` }),
      make("div", { class: "figures" }, ...figures),
      soft(predicted ? `These rates are computed before the run (${Plans.basis(predicted)}).` : "This plan has no forecast."),
      binding ? make("p", {}, "What binds decoding: ", make("b", { text: binding }), ". ",
        Views.a("whatif", {}, "Try what a change would bring"), ".") : "",
      bound ? soft(`The bound: ${bound.text}`) : "",
    ];
  }

  const written = (value, unit) => (none(value) ? "–"
    : unit === "s" || unit === "s/token" ? `${Units.seconds(value)}${unit.slice(1)}` : Units.rate(value, unit));

  function compared(figures) {
    if (!figures.length)
      return soft("There is nothing to compare: a running server and a recording of a run have measured figures.");
    const heads = ["", ...["forecast", "recosted", "measured", "measured / forecast − 1"].map((text) => ({ text, number: true }))];
    const rows = figures.map(({ label, unit, forecast, recosted, actual, error }) => [make("b", { text: label }),
      ...[forecast, recosted, actual].map((value) => written(value, unit)), Units.change(error)]);
    const table = Views.table(heads, rows, "Forecast, recosted and measured");
    table.classList.add("wide");
    return make("div", {}, table, soft(RECOSTED));
  }

  // Of a recording the age is that of when it began.
  function calibration({ basis, age_s: age, model_error: error, spread }, kind) {
    const when = none(age) ? "–" : `${Units.seconds(age)} ${kind === "trace" ? "before this run" : "ago"}`;
    return make("div", { class: "figures" },
      Plans.figure("the costs are", basis),
      Plans.figure("measured", when, none(age) ? small("the age is not known") : ""),
      Plans.figure("spread of the repetitions", Units.percent(spread), small("middle half, of the middle curve")),
      Plans.figure("error of the model", none(error) ? "–" : `± ${Units.percent(error)}`, small("that forecasts reckon with")));
  }

  function history(found) {
    if (!found) return soft("No runs of this model are remembered here: ciuic run and ciuic bench remember theirs.");
    const off = (factor) => (none(factor) ? "–" : `factor ${Units.figures(factor)}`);
    return make("div", { class: "figures" },
      Plans.figure("runs remembered", Units.count(found.runs)),
      Plans.figure("off by, in the middle", off(found.median), small("1 is right")),
      Plans.figure("lately", off(found.recent)), Plans.figure("at worst", off(found.worst)),
      Plans.figure("inside of the range given", Units.percent(found.inside), small("of the decode rates")));
  }

  Views.add({
    id: "why",
    title: "Why this plan",
    mount(root, { summary, signal }) {
      let drawn = null;
      const show = (found) => {
        if (signal.aborted) return;
        drawn = CurveCharts.draw(found.calibration.curves);
        root.replaceChildren(
          ...chosen(found), ...Plans.notes(found.notes),
          title("The plans that were considered"), Plans.candidates(found.candidates),
          title("Forecast, recosted and measured"), compared(found.figures),
          title("How good the costs are"), calibration(found.calibration, summary.kind),
          title("How far off forecasts were so far"), history(found.history),
          title("The measured operators"), drawn.root);
        drawn.fit();
      };
      const load = () => {
        if (!summary.has.schedule)
          return root.replaceChildren(Views.empty("There is no schedule here, so there is no plan to explain.",
            "Open one: ciuic plan MODEL --save plan.json, then ciuic dashboard plan.json; or look at a running server."));
        Data.get("why", { signal }).then(show).catch((error) => signal.aborted || Views.tell(error, load));
      };
      load();
      return { unmount: () => drawn?.leave() };
    },
  });
}
