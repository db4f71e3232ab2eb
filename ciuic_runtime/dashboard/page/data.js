"use strict";

// The JSON that the server has, or that a saved page carries.
//   await Data.get("steps/12"), await Data.post("whatif", {...}): of the source that is shown; {signal} as a last argument
//   await Data.summary(): GET summary, asked once per source and kept up to date by what arrives live
//   await Data.sources(); Data.source, Data.choose(id); Data.saved; Data.has("steps/12"): a saved page may not have it
//   Data.live(handler) -> stop(): handler({type: "steps" | "requests" | "marks" | "connection", ...}); Data.connected
//     (app.js adds {type: "summary"}: it was brought up to date)
//   await Data.download("save?view=tokens"): a file, with the API key where there is one
// What cannot be had is an Error whose message says what to do (Refused, with .status; 0: not reached).
class Refused extends Error {
  constructor(says, status) {
    super(says);
    this.status = status;
  }
}

const Data = (() => {
  const GONE = "The server cannot be reached. See whether it is still running.";
  const embedded = document.getElementById("saved");
  const { at = "", answers = null } = embedded ? JSON.parse(embedded.textContent) : {};
  const root = answers ? "" : `${location.pathname.replace(/\/dashboard(\/.*)?$/, "")}/dashboard`;
  let source = 0;
  let summaries = new Map();
  let connected = false; // to what happens live
  let asking = null; // the promise of a key that is just being asked for

  const base = () => `${root}/api/${source}/`;

  async function get(path, { signal } = {}) {
    if (answers) return fromSaved(path);
    return (await call(base() + path, { signal })).json();
  }

  async function post(path, body, { signal } = {}) {
    if (answers) throw new Refused("This is a saved page, which cannot plan; open the live dashboard or the trace file for it.", 0);
    const headers = { "content-type": "application/json" };
    return (await call(base() + path, { method: "POST", headers, body: JSON.stringify(body), signal })).json();
  }

  async function fromSaved(path) {
    if (Object.hasOwn(answers, path)) return answers[path];
    throw new Refused(`${path} is not in this saved page; open the live dashboard or the trace file for it.`, 404);
  }

  async function sources() {
    if (answers) return [{ id: 0, name: "saved page", kind: "saved" }];
    return (await (await call(`${root}/api/sources`)).json()).sources;
  }

  function summary() {
    if (!summaries.has(source)) {
      const asked = get("summary");
      asked.catch(() => summaries.delete(source)); // asked for anew next time
      summaries.set(source, asked);
    }
    return summaries.get(source);
  }

  // One call; a missing or wrong key is asked for, and the call made again.
  async function call(path, options = {}) {
    for (;;) {
      const key = kept("ciuic.key");
      const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
      let response;
      try {
        response = await fetch(path, { ...options, headers });
      } catch (error) {
        throw error.name === "AbortError" ? error : new Refused(GONE, 0);
      }
      if (response.ok) return response;
      if (response.status !== 401) throw new Refused(await explained(response), response.status);
      if (key === kept("ciuic.key")) await askKey(key !== null);
    }
  }

  async function explained(response) {
    const said = await response.json().then((body) => body.error.message, () => "");
    return said ? sentence(said) : `The server answered with status ${response.status}.`;
  }

  const sentence = (text) => text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

  function askKey(wrong) {
    asking ??= new Promise((resolve) => {
      const dialog = document.getElementById("key");
      const field = document.getElementById("key-text");
      if (wrong) document.getElementById("key-says").textContent = "The server does not know this API key. Give another one.";
      field.value = "";
      dialog.addEventListener("close", () => {
        if (field.value) keep("ciuic.key", field.value);
        field.value = "";
        asking = null;
        resolve();
      }, { once: true });
      dialog.showModal();
    });
    return asking;
  }

  function kept(name) {
    try {
      return sessionStorage.getItem(name);
    } catch {
      return null; // storage is switched off
    }
  }

  function keep(name, value) {
    try {
      sessionStorage.setItem(name, value);
    } catch {
      Views.tell(new Error("This browser keeps nothing for this tab: the key is asked for again at each call."));
    }
  }

  // What happens, as it happens. A stream that breaks is taken up again, after 1 s, then 2, 4, 8.
  function live(handler) {
    if (answers) return () => {};
    const stopped = new AbortController();
    const here = source;
    let pause = 1;
    const run = async () => {
      while (!stopped.signal.aborted) {
        try {
          const response = await call(`${root}/api/${here}/live`, { signal: stopped.signal, cache: "no-store" });
          connected = true;
          handler({ type: "connection", open: true });
          for await (const event of events(response)) {
            pause = 1;
            if (!stopped.signal.aborted) handler(event);
          }
        } catch (error) {
          if (stopped.signal.aborted) return;
          if (!(error instanceof Refused) && !(error instanceof TypeError)) Views.tell(error);
          if (error.status === 404 || error.status === 409) return; // a source that never changes
        }
        if (stopped.signal.aborted) return;
        connected = false;
        handler({ type: "connection", open: false });
        await new Promise((resolve) => setTimeout(resolve, pause * 1000));
        pause = Math.min(8, pause * 2);
      }
    };
    run();
    return () => {
      connected = false;
      stopped.abort();
    };
  }

  async function* events(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let held = "";
    try {
      for (;;) {
        const { done, value } = await reader.read();
        if (done) return;
        const lines = (held + value).split("\n");
        held = lines.pop();
        for (const line of lines) {
          const event = line.startsWith("data:") ? JSON.parse(line.slice(5)) : undefined;
          if (event === null) return; // the server ends the stream
          if (event) yield event;
        }
      }
    } finally {
      reader.cancel().catch(() => {}); // it is at its end, or nobody reads on
    }
  }

  async function download(path) {
    const response = await call(base() + path);
    const name = /filename="?([^";]+)/.exec(response.headers.get("content-disposition") || "")?.[1] || "dashboard.html";
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await response.blob());
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  }

  return {
    saved: answers !== null,
    at, // the address at which a saved page was saved
    get root() { return root; },
    get source() { return source; },
    get connected() { return connected; },
    choose(id) { source = id; },
    has: (path) => answers === null || Object.hasOwn(answers, path),
    get, post, sources, summary, live, download,
  };
})();
