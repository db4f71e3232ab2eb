"use strict";

// Placement: where every part of every layer is computed and stored, the map of the experts, and why a page is where it is.
{
  const HINT = "Point at a cell, or walk there with the arrow keys, to see what it holds. A click or Enter tells why it is there.";

  // The box that asks why a page is where it is, and tells what became of it.
  function whyBox(placement) {
    const field = Views.make("input", { type: "search", id: "page-name", autocomplete: "off", spellcheck: "false" });
    field.placeholder = example(placement);
    const answer = Views.make("div", { class: "why-answer", "aria-live": "polite" });
    const ask = async (name) => {
      field.value = name;
      Views.keep({ name });
      const found = await Data.get(`explain?name=${encodeURIComponent(name)}`).then(explained, (error) => [refused(error)]);
      if (field.value === name) answer.replaceChildren(...found);
    };
    const submit = (event) => {
      event.preventDefault();
      if (field.value.trim()) ask(field.value.trim());
    };
    const form = Views.make("form", { class: "tools", on: { submit } },
      Views.make("label", { for: "page-name", text: "Why is this page here?" }), field, Views.make("button", { text: "Explain" }));
    return { root: Views.make("section", { class: "why-box card" }, form, answer), ask };
  }

  const example = ({ experts, layers, parts }) =>
    (experts ? `layers.${experts.layers[0]}.experts.${Math.min(17, experts.num_experts - 1)}` : `layers.${layers[0]}.${parts[0]}`);

  function refused(error) {
    if (!(error instanceof Refused)) throw error;
    return Views.make("p", { class: "note", text: error.message });
  }

  function explained({ name, text, bytes, device, home, resident, uses, hits, reads, waited_s }) {
    const told = (value, write) => (value === null || value === undefined ? null : write(value));
    const facts = {
      "size": Units.bytes(bytes), "computed on": device, "stored on": home,
      "in memory now": told(resident, (yes) => (yes ? "yes" : "no")), "uses": told(uses, Units.count),
      "found in memory": told(uses ? hits : null, (n) => `${Units.count(n)} times, ${Units.percent(n / uses)} of its uses`),
      "reads": told(reads, Units.count), "time that tasks waited for it": told(waited_s, Units.seconds),
    };
    const known = Object.entries(facts).filter(([, value]) => value !== null && value !== undefined);
    const list = Views.make("dl", { class: "facts" },
      ...known.flatMap(([label, value]) => [Views.make("dt", { text: label }), Views.make("dd", { text: value })]));
    const unknown = "Uses, reads and waits are known of pages that move, while a model runs or from a recording of it.";
    return [Views.make("h2", { text: name }), Views.make("p", { text }), list,
      uses === null ? Plans.soft(unknown) : ""];
  }

  // What of the experts is coloured.
  function picker(experts, show) {
    const known = ExpertMap.ways(experts);
    const missing = Object.keys(ExpertMap.WAYS).filter((way) => !known.includes(way)).map((way) => ExpertMap.WAYS[way]);
    const select = Views.make("select", { id: "expert-way", on: { change: () => show(select.value) } },
      ...known.map((way) => Views.make("option", { value: way, text: ExpertMap.WAYS[way] })));
    return Views.make("div", { class: "tools" }, Views.make("label", { for: "expert-way", text: "The map of experts shows" }), select,
      missing.length ? Views.make("span", { class: "soft", text: `Not known of this source: ${missing.join(", ")}.` }) : null);
  }

  function others(placement) {
    if (!placement.others.length) return "";
    const rows = placement.others.map((row) => [row.task, Places.said(row), Units.bytes(row.bytes)]);
    return Views.make("section", { class: "others" }, Views.make("h2", { text: "Outside of the layers" }),
      Views.table(["task", "where", { text: "size", number: true }], rows, "Tasks outside of the layers"));
  }

  function paging({ paging }) {
    if (!paging) return "";
    const ahead = paging.lookahead ? `guessed ${paging.lookahead} layers ahead` : "read when they are needed";
    const room = `${Units.bytes(paging.cache_bytes)} of ${paging.device}'s memory`;
    return Plans.soft(`Paging: what has its home on ${paging.disk} comes into ${room}; policy ${paging.policy}, routed experts ${ahead}.`);
  }

  Views.add({
    id: "placement",
    title: "Placement",
    mount(root, { summary, signal }) {
      let map = null, box = null;
      const show = (placement) => {
        if (signal.aborted) return;
        const told = Views.make("output", { class: "told", "aria-live": "polite", text: HINT });
        const tell = (text) => { told.textContent = text; };
        box = whyBox(placement);
        map = placement.experts && ExpertMap.draw(placement, { tell, pick: box.ask });
        root.replaceChildren(
          Views.make("div", { class: "place-view" },
            Views.make("div", { class: "place-main" }, map ? picker(placement.experts, map.show) : "", Places.legend(placement), told,
              Views.make("div", { class: "place-picture" }, PlacementGrid.draw(placement, { tell, pick: box.ask }), map ? map.root : ""),
              paging(placement)),
            Views.make("div", { class: "place-side" }, box.root, others(placement))));
        const name = Views.params().get("name");
        if (name) box.ask(name);
      };
      const load = () => {
        if (!summary.has.schedule)
          return root.replaceChildren(Views.empty("There is no schedule here, so nothing says where anything is.",
            "Open one: ciuic plan MODEL --save plan.json, then ciuic dashboard plan.json; or look at a running server."));
        Data.get("placement", { signal }).then(show).catch((error) => signal.aborted || Views.tell(error, load));
      };
      load();
      return {
        show: (now) => now.get("name") && box?.ask(now.get("name")),
        unmount: () => map?.leave(),
      };
    },
  });
}
