"use strict";

// The views, and what they share.
//   Views.add({id, title, mount(root, {params, summary, signal}) -> {live(event)?, show(params)?, unmount()?}})
//     root: an empty element; params: URLSearchParams; signal: aborted when the view is left.
//     live gets what Data.live gets; show is called when only the parameters changed (without it: mounted anew).
//   Views.make("p", {class: "soft", text: "…", on: {click}, anything: "as attribute"}, ...children)
//   Views.link("tokens", {step: 12}) -> href; Views.a("tokens", {step: 12}, "step 12") -> a link that does not reload
//   Views.go("whatif", {change: "{}"}); Views.params(); Views.keep({step: 12}): into the URL, without a new view
//   Views.tell(error, again?): the bar at the top; Views.tell(null) closes it
//   Views.empty("This file has no schedule.", "Open one with ciuic dashboard plan.json."): an empty state
//   Views.table(["Task", {text: "Bytes", number: true}], [["a", "1 B"], ...], caption): cells are texts or elements
//   Views.legend(["compute", ...], names): coloured samples with their words
//   Views.tip(text, x, y): the tool tip at a place in the window; Views.tip(null) hides it
//   Views.pen(canvas, width, height): sizes it for this screen, returns its 2D context, in CSS pixels
//   Views.frame(draw) -> redraw(): draws once in the next frame, however often it is asked
const Views = (() => {
  const all = [];
  let go = null; // of app.js: shows a view

  function make(tag, given = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(given)) {
      if (name === "text") made.textContent = value;
      else if (name === "on") for (const [kind, action] of Object.entries(value)) made.addEventListener(kind, action);
      else if (value === true) made.setAttribute(name, "");
      else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
    }
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  }

  function link(id, params = {}) {
    const query = new URLSearchParams();
    if (Data.source) query.set("source", Data.source);
    for (const [name, value] of Object.entries(params))
      if (value !== null && value !== undefined) query.set(name, value);
    const text = query.size ? `?${query}` : "";
    return Data.saved ? `#/${id}${text}` : `${Data.root}/${id}${text}`;
  }

  function a(id, params, text, given = {}) {
    const click = (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey || event.button) return; // a new tab or window
      event.preventDefault();
      go(id, params);
    };
    return make("a", { href: link(id, params), text, on: { click }, ...given });
  }

  function params() {
    if (!Data.saved) return new URLSearchParams(location.search);
    return new URLSearchParams(location.hash.split("?")[1] || "");
  }

  function keep(changes) {
    const next = Object.fromEntries(params());
    delete next.source;
    for (const [name, value] of Object.entries(changes)) next[name] = value;
    history.replaceState(null, "", link(current(), next));
  }

  // The id of the view that the address names; without one, the tokens.
  function current() {
    const id = Data.saved ? /^#\/(\w+)/.exec(location.hash)?.[1] : location.pathname.slice(Data.root.length + 1);
    return all.some((view) => view.id === id) ? id : "tokens";
  }

  function tell(error, again) {
    const bar = document.getElementById("error");
    bar.hidden = !error;
    if (!error) return;
    const mine = error instanceof Refused || error.constructor === Error;
    document.getElementById("error-text").textContent = mine ? error.message : `This page made a mistake: ${error.message}`;
    if (!mine) console.error(error);
    const button = document.getElementById("error-again");
    button.hidden = !again;
    button.onclick = again ? () => { tell(null); again(); } : null;
  }

  const empty = (says, hint = "") => make("div", { class: "empty" }, make("p", { text: says }), make("p", { class: "soft", text: hint }));

  function table(heads, rows, caption = "") {
    const columns = heads.map((head) => (typeof head === "string" ? { text: head } : head));
    const head = columns.map(({ text, number }) => make("th", { scope: "col", class: number && "n", text }));
    const cell = (value, index) => {
      const made = make("td", { class: columns[index].number && "n" });
      made.append(value ?? "–");
      return made;
    };
    const body = rows.map((row) => make("tr", {}, ...row.map(cell)));
    return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption || "Table" },
      make("table", {}, caption ? make("caption", { class: "unseen", text: caption }) : null,
        make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body)));
  }

  function legend(kinds, names = {}) {
    const items = kinds.map((kind) => make("li", {}, make("i", { class: `colour-${kind}` }), names[kind] || kind.replace("_", " ")));
    return make("ul", { class: "legend" }, ...items);
  }

  function tip(text, x, y) {
    const box = document.getElementById("tip");
    box.hidden = !text;
    if (!text) return;
    box.textContent = text;
    const left = x + 14 + box.offsetWidth > innerWidth ? x - 14 - box.offsetWidth : x + 14;
    const top = y + 18 + box.offsetHeight > innerHeight ? y - 12 - box.offsetHeight : y + 18;
    box.style.left = `${Math.max(4, left)}px`;
    box.style.top = `${Math.max(4, top)}px`;
  }

  function pen(canvas, width, height) {
    const ratio = devicePixelRatio || 1;
    const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (canvas.width !== w || canvas.height !== h) {
      canvas.width = w;
      canvas.height = h;
    }
    const made = canvas.getContext("2d", { alpha: false });
    made.setTransform(ratio, 0, 0, ratio, 0, 0);
    return made;
  }

  function frame(draw) {
    let waiting = false;
    const run = () => {
      waiting = false;
      draw();
    };
    return () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(run);
    };
  }

  return {
    all, make, link, a, params, keep, current, tell, empty, table, legend, tip, pen, frame,
    add(view) { all.push(view); },
    go(id, given = {}) { go(id, given); },
    started(show) { go = show; },
  };
})();
