// A conversation with the model that this server has, through its own API. Everything that is shown is put in as text.

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "max_tokens", "seed"];
const FIELDS = ["system", ...NUMBERS, "text"];
const GONE = "The server cannot be reached. See whether it is still running, then send the message again.";
const CUT = "The connection broke before the answer was whole. See whether the server is still running.";

let model = null; // what /v1/models says
let messages = []; // {role, content, reasoning, note} in the order in which they were said
let running = null; // of the answer that is just being given: its AbortController
let afterKey = null; // what goes on when a key has been given

class Refused extends Error {
  constructor(says, status) {
    super(says);
    this.status = status;
  }
}

// The server

async function call(path, body, signal) {
  const headers = { "content-type": "application/json" };
  const key = kept("ciuic.key");
  if (key) headers.authorization = `Bearer ${key}`;
  const options = body ? { method: "POST", body: JSON.stringify(body) } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers, signal, cache: "no-store" });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Refused(GONE, 0);
  }
  if (!response.ok) throw new Refused(await explained(response), response.status);
  return response;
}

async function explained(response) {
  const said = await response.json().then((body) => body.error.message, () => "");
  const says = said ? sentence(said) : `The server answered with status ${response.status}.`;
  if (response.status === 429) {
    const seconds = Number(response.headers.get("retry-after")) || 1;
    return `The server is busy. Try again in ${seconds === 1 ? "a second" : `${seconds} seconds`}. (${says})`;
  }
  if (response.status === 503) return `The server is shutting down and takes nothing new. (${says})`;
  if (response.status === 400 && said.includes("no chat template"))
    return `This model cannot chat: it has no chat template that would make a prompt of a conversation. Give it whole texts to continue, by POST /v1/completions. (${says})`;
  return says;
}

function sentence(text) {
  return text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

// What server-sent events say, one by one; refused where the stream ends before its mark of being whole.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  let whole = false;
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        throw error.name === "AbortError" ? error : new Refused(CUT, 0);
      });
      if (done && whole) return;
      if (done) throw new Refused(CUT, 0);
      const lines = (held + value).split("\n");
      held = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") whole = true;
        else yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it is at its end, or nobody reads on
  }
}

// One turn

async function ask(text) {
  const settings = chosen();
  if (!settings || running) return;
  tell("");
  const question = { role: "user", content: text };
  const told = [...messages, question].map(({ role, content }) => ({ role, content }));
  const system = $("system").value.trim();
  const body = {
    model: model.id, stream: true, stream_options: { include_usage: true }, ...settings,
    messages: system ? [{ role: "system", content: system }, ...told] : told,
  };
  const answer = { role: "assistant", content: "", reasoning: "", note: "" };
  messages.push(question, answer);
  const views = [show(question), show(answer)];
  $("text").value = "";
  fit();
  scroll(true);
  running = new AbortController();
  busy(true);
  const times = { begin: performance.now(), first: 0, last: 0, pieces: 0, tokens: 0 };
  let failed = null;
  let reason = null;
  try {
    const response = await call("/v1/chat/completions", body, running.signal);
    for await (const event of events(response)) {
      if (event.error) throw new Refused(sentence(event.error.message), 0);
      reason = take(event, answer, views[1], times) || reason;
    }
  } catch (error) {
    failed = error;
  }
  views[1].end();
  running = null;
  busy(false);
  finish(failed, reason, question, answer, views, times);
  save();
}

function take(event, answer, view, times) {
  if (event.usage) times.tokens = event.usage.completion_tokens;
  const choice = event.choices[0];
  if (!choice) return null;
  const { content = "", reasoning_content: reasoning = "" } = choice.delta;
  if (content || reasoning) {
    times.last = performance.now();
    times.first ||= times.last;
    times.pieces += 1;
    answer.content += content;
    answer.reasoning += reasoning;
    view.add(content, reasoning);
  }
  return choice.finish_reason;
}

function finish(failed, reason, question, answer, views, times) {
  if (!messages.includes(question)) return; // a new conversation has begun meanwhile
  const stopped = failed && failed.name === "AbortError";
  if (failed && !answer.content && !answer.reasoning) {
    // Nothing came of it: the question goes back to where it was written.
    messages.splice(messages.indexOf(question), 2);
    views.forEach((view) => view.remove());
    if (!$("text").value) $("text").value = question.content;
    fit();
  } else {
    const ends = stopped ? "stopped" : failed ? "broken off" : reason === "length" ? "cut off at the most tokens there may be" : "";
    answer.note = [rates(times), ends].filter(Boolean).join(" · ");
    views[1].note(answer.note);
  }
  $("empty").hidden = messages.length > 0;
  if (failed && !stopped) {
    model = null; // asked for anew, since it may be another one then
    refuse(failed, submit);
  }
}

// Tokens per second after the first one. What was not told at the end is counted by pieces of text.
function rates({ begin, first, last, pieces, tokens }) {
  if (!first) return "";
  const count = tokens || pieces;
  const seconds = (last - first) / 1000;
  const rate = count > 1 && seconds > 0 ? `${tokens ? "" : "about "}${figures((count - 1) / seconds)} tokens/s` : "";
  const told = `${tokens ? "" : "about "}${count} token${count === 1 ? "" : "s"}`;
  return [told, rate, `first after ${figures((first - begin) / 1000)} s`].filter(Boolean).join(" · ");
}

function figures(value) {
  return value >= 100 ? value.toFixed(0) : value.toPrecision(2);
}

// The settings as the API has them; nothing where one of them is wrong, which is then told.
function chosen() {
  const found = {};
  for (const name of NUMBERS) {
    const field = $(name);
    if (!field.checkValidity()) {
      $("settings").open = true;
      field.focus();
      tell(`${field.labels[0].firstChild.data.trim()}: ${field.validationMessage}`);
      return null;
    }
    if (field.value) found[name] = Number(field.value);
  }
  return found;
}

// What is seen

function show(message) {
  const item = element("li", message.role);
  const who = element("span", "unseen", message.role === "user" ? "You: " : "The model: ");
  const thinking = element("details", "thinking");
  const title = element("summary", "", "Thoughts");
  const thoughts = element("div", "thoughts");
  const text = element("div", "text");
  const note = element("p", "note", message.note || "");
  thinking.append(title, thoughts);
  thinking.hidden = !message.reasoning;
  note.hidden = !message.note;
  item.append(who, thinking, text, note);
  const [said, thought] = [text, thoughts].map((place) => place.appendChild(document.createTextNode("")));
  said.data = message.content;
  thought.data = message.reasoning || "";
  $("messages").append(item);
  $("empty").hidden = true;

  // Pieces come faster than anybody looks: they are put in once a frame.
  let waiting = null;
  const newer = ["", ""];
  const put = () => {
    const low = atEnd();
    said.appendData(newer[0]);
    thought.appendData(newer[1]);
    newer.fill("");
    waiting = null;
    scroll(low);
  };
  return {
    add(content, reasoning) {
      newer[0] += content;
      newer[1] += reasoning;
      if (reasoning) {
        thinking.hidden = false;
        title.textContent = "Thinking…";
      }
      if (content) title.textContent = "Thoughts";
      waiting ??= requestAnimationFrame(put);
    },
    end() {
      if (waiting !== null) cancelAnimationFrame(waiting);
      put();
      title.textContent = "Thoughts";
    },
    note(words) {
      const low = atEnd();
      note.textContent = words;
      note.hidden = !words;
      scroll(low);
    },
    remove: () => item.remove(),
  };
}

function element(kind, name, text = "") {
  const made = document.createElement(kind);
  made.className = name;
  made.textContent = text;
  return made;
}

function atEnd() {
  const { scrollTop, clientHeight, scrollHeight } = $("scroll");
  return scrollTop + clientHeight > scrollHeight - 40;
}

function scroll(low) {
  if (low) $("scroll").scrollTop = $("scroll").scrollHeight;
}

function busy(now) {
  const focused = [$("send"), $("stop")].includes(document.activeElement);
  $("send").hidden = now;
  $("stop").hidden = !now;
  $("messages").setAttribute("aria-busy", now); // read out when it is whole
  $("messages").lastElementChild?.classList.toggle("busy", now);
  if (focused) $("text").focus();
}

function tell(words) {
  $("error").textContent = words;
  $("error").hidden = !words;
}

// A key is asked for where one is missing; anything else is told.
function refuse(error, again) {
  if (error.status !== 401) {
    tell(error instanceof Refused ? error.message : `This page made a mistake: ${error.message}`);
    return;
  }
  if (kept("ciuic.key")) tell("The server does not know this API key.");
  keep("ciuic.key", null);
  afterKey = again;
  $("key").hidden = false;
  $("key-text").focus();
}

function fit() {
  const field = $("text");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

// What survives a reload

function kept(name) {
  try {
    return sessionStorage.getItem(name);
  } catch {
    return null; // storage is switched off
  }
}

function keep(name, value) {
  try {
    if (value === null) sessionStorage.removeItem(name);
    else sessionStorage.setItem(name, value);
    return true;
  } catch {
    return false;
  }
}

function save() {
  const fields = Object.fromEntries(FIELDS.map((name) => [name, $(name).value]));
  const said = messages.filter((message) => message.content || message.reasoning);
  if (said.at(-1)?.role === "user") fields.text ||= said.pop().content; // it is not answered yet
  if (!keep("ciuic.chat", JSON.stringify({ messages: said, fields })))
    tell("This browser does not keep the conversation: it will be gone after a reload.");
}

function restore() {
  const saved = JSON.parse(kept("ciuic.chat") || '{"messages": [], "fields": {}}');
  messages = saved.messages;
  messages.forEach(show);
  for (const [name, value] of Object.entries(saved.fields)) $(name).value = value;
  $("empty").hidden = messages.length > 0;
  fit();
  scroll(true);
}

// Beginning

async function begin(again = begin) {
  try {
    model = (await (await call("/v1/models")).json()).data[0];
    $("model").textContent = model.id;
    document.title = `${model.id} · chat`;
    return true;
  } catch (error) {
    refuse(error, again);
    return false;
  }
}

async function submit() {
  const text = $("text").value;
  if (!text.trim() || running) return;
  if (model || (await begin(submit))) await ask(text);
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});

$("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});

$("stop").addEventListener("click", () => running?.abort());

$("new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  $("messages").replaceChildren();
  $("empty").hidden = false;
  tell("");
  save();
  $("text").focus();
});

$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = $("key-text").value.trim();
  if (!/^[\x21-\x7e]+$/.test(key)) return tell("An API key has neither blanks nor letters beyond ASCII.");
  keep("ciuic.key", key);
  $("key-text").value = "";
  $("key").hidden = true;
  tell("");
  $("text").focus();
  afterKey();
});

$("text").addEventListener("input", fit);
$("settings").addEventListener("change", save);
addEventListener("pagehide", save);

restore();
begin();
$("text").focus();
