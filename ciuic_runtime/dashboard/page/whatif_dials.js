"use strict";

// The dials of What if: from what can be changed (GET whatif) and a change, the fields that show it and change it further.
//   WhatIfDials.draw(can, change, tell) -> element; tell(change) is called with a new change, a body of POST whatif
const WhatIfDials = (() => {
  const { make } = Views;
  const STEPS = 240; // of a slider, from end to end
  const MIB = 2 ** 20, GIB = 2 ** 30;

  // Sizes to sixteen steps between powers of two, rates and counts to two digits: figures that can be said.
  const sixteenth = (value) => {
    const unit = 2 ** Math.max(0, Math.floor(Math.log2(value)) - 4);
    return Math.round(value / unit) * unit;
  };
  const twoDigits = (value) => Number(value.toPrecision(2));
  const tokens = { from: 1, round: (value) => Math.round(twoDigits(value)), write: (n) => Units.number(n, "token") };
  const bytes = { round: sixteenth, write: Units.bytes };
  const rate = { round: twoDigits, write: (x) => Units.rate(x, "B/s") };

  // What can be turned: where it stands in the body, what it is now, from where to where, and how it is written.
  function dials({ workload, devices }) {
    const group = "Workload";
    const found = [
      { ...tokens, group, at: ["workload", "batch"], label: "Requests at once (batch)", now: workload.batch, to: 512,
        write: (n) => Units.number(n, "request") },
      { ...tokens, group, at: ["workload", "prompt_tokens"], label: "Prompt", now: workload.prompt_tokens, to: 131072 },
      { ...tokens, group, at: ["workload", "max_tokens"], label: "New tokens", now: workload.max_tokens, to: 32768 },
    ];
    return [...found, ...devices.flatMap(ofDevice)];
  }

  function ofDevice({ name, kind, memory_bytes: all, usable_bytes: usable, bandwidth, basis }) {
    const what = { CPU: "memory of the host", DISK: "disk", SIM: "simulated" }[kind] || kind;
    const group = `${name} (${what}, ${basis === "unknown" ? "not measured" : basis})`, host = kind === "CPU", disk = kind === "DISK", found = [];
    if (host)
      found.push({ ...bytes, group, at: ["ram", name], label: "Memory installed", now: all, from: Math.max(GIB, all / 16), to: all * 16 });
    if (!disk && usable > 0)
      found.push({ ...bytes, group, at: ["memory", name], label: host ? "Of it for the model" : "Memory for the model", now: usable,
        from: Math.max(MIB, usable / 64), to: host ? all * 16 : Math.max(all, 2 * usable) });
    if (bandwidth)
      found.push({ ...rate, group, at: ["bandwidth", name], label: disk ? "Speed of reading" : "Bandwidth of its memory",
        now: bandwidth, from: bandwidth / 8, to: bandwidth * 16 });
    return found;
  }

  // A change is never written into: another one is made, without what is as it is now.
  function put(change, name, value) {
    const { [name]: before, ...rest } = change;
    return value === null ? rest : { ...rest, [name]: value };
  }

  function putInto(change, [part, name], value) {
    const inner = put(change[part] || {}, name, value);
    return put(change, part, Object.keys(inner).length ? inner : null);
  }

  // Logarithmic; `held` is its value in the change, null where it is as now.
  function slider(dial, held, turn) {
    const id = `dial-${dial.at.join("-").replace(/[^\w-]/g, "-")}`;
    const place = (value) => Math.round(STEPS * Math.log(value / dial.from) / Math.log(dial.to / dial.from));
    const value = (at) => dial.round(dial.from * (dial.to / dial.from) ** (at / STEPS));
    const range = make("input", { type: "range", id, min: 0, max: STEPS, step: 1 });
    const said = make("output", { for: id });
    const back = make("button", { type: "button", class: "plain", text: `reset to ${dial.write(dial.now)}` });
    back.setAttribute("aria-label", `${dial.label}: back to ${dial.write(dial.now)}`);
    const write = (turned) => {
      said.textContent = dial.write(turned ?? dial.now);
      said.classList.toggle("turned", turned !== null);
      range.setAttribute("aria-valuetext", said.textContent);
      back.hidden = turned === null;
    };
    range.addEventListener("input", () => {
      const at = Number(range.value), turned = at === place(dial.now) ? null : value(at);
      write(turned);
      turn(turned);
    });
    back.addEventListener("click", () => {
      range.value = place(dial.now);
      range.focus();
      write(null);
      turn(null);
    });
    range.value = place(held ?? dial.now);
    write(held);
    return make("div", { class: "dial" }, make("label", { for: id, text: dial.label }), said, range, back);
  }

  function picker(label, id, values, now, held, turn) {
    const select = make("select", { id }, ...values.map((value) =>
      make("option", { value, text: value === now ? `${value} (now)` : value, selected: value === (held ?? now) })));
    select.addEventListener("change", () => turn(select.value === now ? null : select.value));
    return make("div", { class: "dial" }, make("label", { for: id, text: label }), select);
  }

  // GPUs of the catalogue that the machine would have besides.
  function more(gpus, held, turn) {
    let added = held;
    const list = make("ul", { class: "added" });
    const select = make("select", { id: "dial-add", "aria-label": "A GPU of the catalogue" }, ...gpus.map((gpu) =>
      make("option", { value: gpu.name, text: `${gpu.name}: ${Units.bytes(gpu.memory_bytes)}`, title: Units.rate(gpu.bandwidth, "B/s") })));
    const give = (next) => {
      added = next;
      write();
      turn(added.length ? added : null);
    };
    const out = (i) => make("button", { type: "button", text: "×", "aria-label": `Take ${added[i]} out again`,
      on: { click: () => give(added.filter((_, k) => k !== i)) } });
    const write = () => list.replaceChildren(...added.map((name, i) => make("li", {}, name, out(i))));
    const add = make("button", { type: "button", id: "dial-add-one", text: "Add", on: { click: () => give([...added, select.value]) } });
    write();
    return make("fieldset", {}, make("legend", { text: "A GPU more (from its data sheet, estimated)" }),
      make("div", { class: "row" }, select, add), list);
  }

  function draw(can, first, tell) {
    let change = first;
    const give = (next) => {
      change = next;
      tell(change);
    };
    const whole = (name) => (value) => give(put(change, name, value));
    const all = dials(can);
    const [workload, ...devices] = [...new Set(all.map(({ group }) => group))].map((group) => {
      const sliders = all.filter((dial) => dial.group === group).map((dial) =>
        slider(dial, change[dial.at[0]]?.[dial.at[1]] ?? null, (value) => give(putInto(change, dial.at, value))));
      return make("fieldset", {}, make("legend", { text: group }), ...sliders);
    });
    const plan = make("fieldset", {}, make("legend", { text: "Plan" }),
      picker("Format of the weights", "dial-format", can.formats, can.format, change.format, whole("format")),
      picker("Goal", "dial-goal", can.goals, can.goal, change.goal, whole("goal")));
    const gpus = can.gpus.length ? more(can.gpus, change.add || [], whole("add")) : "";
    return make("form", { class: "dials", "aria-label": "What would be different", on: { submit: (event) => event.preventDefault() } },
      plan, workload, gpus, ...devices);
  }

  return { draw };
})();
