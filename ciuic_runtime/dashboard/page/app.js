"use strict";

// Starts the page: which source and view the address names, the navigation, the theme, saving, the line of what is shown,
// and keys that hold everywhere. Views come from views.js; what they show is their own business.
(() => {
  const $ = (id) => document.getElementById(id);
  const ORDER = ["tokens", "whatif", "placement", "memory", "why"];
  const THEMES = ["auto", "light", "dark"];
  const THEME_SAYS = { auto: "as the system has them", light: "light", dark: "dark" };
  const THEME_SIGN = { auto: "◐", light: "☀", dark: "☾" };
  let shown = null; // {view, handle, left: AbortController}
  let summary = null;
  let source = null; // what GET sources says of it
  let connected = null; // null: not live
  let heard = 0; // events that brought the summary up to date
  let stop = () => {};

  const views = () => ORDER.map((id) => Views.all.find((view) => view.id === id)).filter(Boolean);

  // Views

  async function show(push = null) {
    const params = Views.params();
    const view = views().find((one) => one.id === Views.current());
    const wanted = Number(params.get("source") || 0);
    if (push) $("view").focus({ preventScroll: true });
    if (wanted !== Data.source || !summary) {
      leave();
      try {
        await open(wanted);
      } catch (error) {
        return Views.tell(error, () => show());
      }
    }
    mark(view.id);
    if (shown?.view === view && shown.handle.show) return shown.handle.show(params);
    leave();
    Views.tell(null);
    const root = Views.make("section", { class: `view view-${view.id}`, "aria-label": view.title });
    $("view").replaceChildren(root);
    const left = new AbortController();
    shown = { view, left, handle: {} };
    shown.handle = view.mount(root, { params, summary, signal: left.signal }) || {};
    $("view").setAttribute("aria-busy", "false");
  }

  function leave() {
    if (!shown) return;
    shown.left.abort();
    shown.handle.unmount?.();
    shown = null;
    Views.tip(null);
  }

  function go(id, given = {}) {
    history.pushState(null, "", Views.link(id, given));
    scrollTo(0, 0);
    show(true);
  }

  function mark(id) {
    for (const entry of $("views").children) entry.setAttribute("aria-current", entry.dataset.view === id ? "page" : "false");
    const view = views().find((one) => one.id === id);
    document.title = [view.title, $("title").textContent].join(" · ");
  }

  // The source

  async function open(id) {
    stop();
    Data.choose(id);
    summary = await Data.summary();
    const known = await Data.sources();
    source = known.find((one) => one.id === id);
    $("sources").hidden = known.length < 2;
    $("source").replaceChildren(...known.map((one) => Views.make("option", { value: one.id, text: one.name, selected: one.id === id })));
    const { model } = summary;
    $("title").textContent = model ? [model.name, model.format].filter(Boolean).join(" in ") : summary.title;
    $("save").hidden = Data.saved;
    $("trace").hidden = Data.saved || summary.kind === "schedule";
    connected = summary.kind === "live" && !Data.saved ? false : null;
    status();
    if (connected !== null) stop = Data.live(arrived);
  }

  function arrived(event) {
    if (event.type === "connection") connected = event.open;
    if (event.type === "steps") hear({ num_events: event.num_events, num_steps: event.num_steps,
      first_step: event.first_step, seconds: event.recorded_s });
    if (event.type === "marks") hear({ marks: event.marks });
    status();
    shown?.handle.live?.(event);
    if (event.type === "marks" || (event.type === "connection" && event.open)) renew();
  }

  function hear(news) {
    heard += 1;
    Object.assign(summary, news);
  }

  // A loss, a join and a server that was away may have changed all that the summary says: nodes, lanes, the plan.
  async function renew() {
    const mine = summary, before = heard;
    let now;
    try {
      now = await Data.get("summary");
    } catch (error) {
      if (error.status === 0) return; // of a server that is away again, the status line tells
      throw error;
    }
    if (mine !== summary) return; // another source was chosen meanwhile
    if (heard !== before) for (const name of ["num_events", "num_steps", "first_step", "seconds", "marks"]) delete now[name];
    Object.assign(summary, now);
    status();
    shown?.handle.live?.({ type: "summary" });
  }

  function status() {
    const line = $("status");
    const said = Data.saved ? "saved page" : connected === null ? source?.name : connected ? "live" : "live, not connected";
    const dot = Views.make("span", { class: `dot ${connected ? "on" : connected === null ? "still" : "off"}`, "aria-hidden": "true" });
    const simulated = (summary.devices || []).filter((device) => device.simulated).map((device) => device.name);
    const parts = [
      said, summary.measured === "simulated" ? "simulated, not measured" : "measured",
      summary.num_steps ? Units.number(summary.num_steps, "step") : "",
      summary.num_events ? Units.number(summary.num_events, "event") : "",
      summary.seconds ? Units.seconds(summary.seconds) : "",
      simulated.length ? `${simulated.join(", ")} simulated` : "",
      (summary.nodes || []).map((node) => node.alive ? node.name : `${node.name} (not used any more)`).join(", "),
    ];
    const text = parts.filter(Boolean).join(" · ");
    if (line.dataset.text === text && line.dataset.on === String(connected)) return;
    line.dataset.text = text;
    line.dataset.on = String(connected);
    line.replaceChildren(dot, text);
    if (summary.notes?.length) line.title = summary.notes.join("\n");
    if (summary.ray_dashboard && !Data.saved)
      line.append(" · ", Views.make("a", { href: summary.ray_dashboard, rel: "noopener", target: "_blank", text: "Ray's dashboard" }));
  }

  // The theme

  function theme(name) {
    if (name === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    $("theme").textContent = THEME_SIGN[name];
    $("theme").setAttribute("aria-label", `Colours: ${THEME_SAYS[name]}`);
    $("theme").title = `Colours: ${THEME_SAYS[name]}`;
    $("theme").dataset.name = name;
    Colours.forget();
  }

  function kept(name, value) {
    try {
      if (value === undefined) return localStorage.getItem(name);
      localStorage.setItem(name, value);
    } catch {
      // storage is switched off: the choice holds until the page is left
    }
    return null;
  }

  // Keys and buttons

  const typing = (event) => event.target.closest?.("input, select, textarea, dialog") || event.ctrlKey || event.metaKey || event.altKey;

  document.addEventListener("keydown", (event) => {
    if (typing(event)) return;
    const view = views()[Number(event.key) - 1];
    if (view) go(view.id);
    else if (event.key === "?") $("help-text").showModal();
    else return;
    event.preventDefault();
  });

  async function download(button, path) {
    button.disabled = true;
    try {
      await Data.download(path());
    } catch (error) {
      Views.tell(error, () => download(button, path));
    }
    button.disabled = false;
  }

  function where() {
    const query = new URLSearchParams({ ...Object.fromEntries(Views.params()), view: Views.current() });
    query.delete("source");
    return query;
  }

  $("save").addEventListener("click", (event) => download(event.currentTarget, () => `save?${where()}`));
  $("trace").addEventListener("click", (event) => download(event.currentTarget, () => "trace"));
  $("help").addEventListener("click", () => $("help-text").showModal());
  $("error-close").addEventListener("click", () => Views.tell(null));
  $("source").addEventListener("change", (event) => {
    history.pushState(null, "", `${Views.link(Views.current()).split("?")[0]}?source=${event.target.value}`);
    show();
  });
  $("theme").addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf($("theme").dataset.name) + 1) % THEMES.length];
    kept("ciuic.theme", next);
    theme(next);
  });
  addEventListener("popstate", () => show());
  addEventListener("unhandledrejection", (event) => {
    if (event.reason?.name === "AbortError") event.preventDefault();
    else if (event.reason instanceof Refused) {
      event.preventDefault();
      Views.tell(event.reason);
    } else Views.tell(event.reason instanceof Error ? event.reason : new Error(String(event.reason)));
  });

  // Frames as they come, for a benchmark that runs in the page.
  let measuring = null;
  window.ciuicFrames = {
    start() {
      const one = { frames: 0, worst_ms: 0, over_50ms: 0, begin: performance.now(), last: performance.now(), on: true };
      measuring = one;
      const tick = () => {
        if (!one.on) return;
        const now = performance.now();
        one.frames += 1;
        one.worst_ms = Math.max(one.worst_ms, now - one.last);
        one.over_50ms += now - one.last > 50;
        one.last = now;
        requestAnimationFrame(tick);
      };
      requestAnimationFrame(tick);
    },
    stop() {
      measuring.on = false;
      const { frames, begin, worst_ms, over_50ms } = measuring;
      return { frames, seconds: (performance.now() - begin) / 1000, worst_ms, over_50ms };
    },
  };

  Views.started(go);
  if (Data.at && !location.hash) history.replaceState(null, "", Data.at);
  theme(THEMES.find((name) => name === kept("ciuic.theme")) || "auto");
  $("views").append(...views().map((view, index) =>
    Views.a(view.id, {}, view.title, { "data-view": view.id, "aria-keyshortcuts": index + 1, title: `${view.title} (${index + 1})` })));
  show();
})();
