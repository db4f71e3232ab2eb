"use strict";

// What several views show of a plan: its candidates, its forecast rates, its memory; and how texts are set there.
const Plans = (() => {
  const { make } = Views;
  const BASIS = {
    measured: "forecast, from measured limits", estimated: "estimated: nothing of this was measured", mixed: "forecast, partly estimated",
  };
  const soft = (text) => make("p", { class: "soft", text });
  const small = (text, kind = null) => make("small", { class: kind, text });
  const title = (text) => make("h2", { text });
  const notes = (list) => list.map((text) => make("p", { class: "note", text }));
  const basis = (predicted) => BASIS[predicted.basis] || predicted.basis;

  // A forecast figure, with what there is beside it.
  function figure(label, value, ...beside) {
    return make("div", { class: "figure card" }, make("span", { class: "soft", text: label }), make("b", { text: value }), ...beside);
  }

  const range = ({ range: [low, high] }) => small(`${Units.figures(low)} to ${Units.rate(high, "tokens/s")}`);

  // By what share it changes: more is better for rates, less for times.
  function change(share, better, worse, lessIsBetter = false) {
    if (share === null || share === undefined) return "";
    if (Math.abs(share) < 0.0005) return small("as now");
    const good = share > 0 !== lessIsBetter;
    const said = `${share > 0 ? "▲" : "▼"} ${Units.percent(Math.abs(share))} ${good ? better : worse}`;
    return small(said, good ? "better" : "worse");
  }

  function candidates(list) {
    if (!list.length)
      return soft("No candidates are known of this plan: it was not made by the planner, or its rows were given by hand.");
    const heads = ["plan", { text: "decode, tokens/s", number: true }, { text: "prefill, tokens/s", number: true }, "verdict"];
    const rate = (one, value) => (one.feasible && value !== null ? Units.figures(value) : "–");
    const chosen = (one) => one.chosen ?? !one.why_not;
    const rows = list.map((one) => [one.name, rate(one, one.decode_tokens_per_s), rate(one, one.prefill_tokens_per_s),
      chosen(one) ? make("b", { text: "chosen" }) : `${one.feasible ? "" : "impossible: "}${one.why_not}`]);
    const table = Views.table(heads, rows, "Plans that were considered");
    table.classList.add("candidates");
    list.forEach((one, i) => chosen(one) && table.querySelector("tbody").rows[i].classList.add("chosen"));
    return table;
  }

  // Bars of what each device's memory is taken by, up to what can be used of it.
  function memory(list) {
    const sample = (kind, text) => make("li", {}, make("i", { class: `memory-${kind}` }), text);
    return make("div", { class: "memory-bars" }, ...list.map(memoryOf), make("ul", { class: "legend" },
      sample("weights", "weights"), sample("rest", "KV cache, working memory, pages read in"), sample("free", "free")));
  }

  function memoryOf({ device, weights, needs, usable }) {
    const rest = Math.max(0, (needs || 0) - weights), all = Math.max(usable || 0, needs || 0, weights, 1);
    const parts = [["weights", weights], ["rest", rest]].map(([kind, bytes]) => {
      const part = make("i", { class: `memory-${kind}` });
      part.style.width = `${100 * bytes / all}%`;
      return part;
    });
    const room = !usable ? "" : needs > usable ? `${Units.bytes(needs - usable)} more than is usable` : `of ${Units.bytes(usable)} usable`;
    const said = [`${Units.bytes(weights)} weights`, rest ? `${Units.bytes(rest)} cache, working memory and pages read in` : "", room];
    return make("div", { class: "memory-row" }, make("span", { text: device }), make("div", { class: "memory-bar" }, ...parts),
      small(said.filter(Boolean).join(", ")));
  }

  return { soft, small, title, notes, basis, figure, range, change, candidates, memory };
})();
