// The chat box: the public API, streamed, as any client would use it.

import { milliseconds, rate } from "./format.js";

const element = (id) => document.getElementById(id);
const [form, log, prompt, send, stop, clear, speed] = ["form", "log", "prompt", "send", "stop", "clear", "speed"].map(element);

const PAINT_MS = 30;

let conversation = [];
let running = null;
let modelName = null;

function headers() {
  const key = element("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function failure(response) {
  let message = "";
  try {
    message = (await response.json()).error.message;
  } catch {
    message = `The server answered with ${response.status}.`;
  }
  return new Error(message);
}

async function model(signal) {
  if (modelName !== null) return modelName;
  const response = await fetch("v1/models", { headers: headers(), signal });
  if (!response.ok) throw await failure(response);
  modelName = (await response.json()).data[0].id;
  return modelName;
}

// The payloads of a stream of server-sent events, as they come.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function entry(who, text, style = "") {
  element("log-empty")?.remove();
  const name = Object.assign(document.createElement("p"), { className: "who", textContent: who });
  const body = Object.assign(document.createElement("p"), { className: style, textContent: text });
  log.append(name, body);
  log.scrollTop = log.scrollHeight;
  return body;
}

function addTo(body, text) {
  const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  if (body.firstChild) body.firstChild.appendData(text);
  else body.textContent = text;
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}

// `tokens` is null where the server has not counted them yet: then the pieces stand for them.
function showSpeed(asked, first, last, pieces, tokens, ending) {
  const made = tokens ?? pieces;
  const parts = [`first token ${milliseconds(first - asked)} ms`];
  if (made > 1 && last > first) parts.push(`${rate(((made - 1) * 1000) / (last - first))} tokens/s`);
  parts.push(`${made} tokens`);
  if (ending) parts.push(ending);
  speed.textContent = parts.join(" · ");
}

// Calls paint soon, and once for all that asked meanwhile: pieces come faster than a page can be laid out, and a page that is laid
// out for each of them shows none until the last has come.
function painter(paint) {
  let timer = 0;
  const now = () => {
    clearTimeout(timer);
    timer = 0;
    paint();
  };
  const soon = () => {
    timer ||= setTimeout(now, PAINT_MS);
  };
  return { soon, now };
}

async function answer(signal, body) {
  const asked = performance.now();
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers() },
    signal,
    body: JSON.stringify({
      model: await model(signal),
      messages: conversation,
      stream: true,
      stream_options: { include_usage: true },
      max_tokens: element("max-tokens").valueAsNumber || 256,
      temperature: Number.isNaN(element("temperature").valueAsNumber) ? 0.7 : element("temperature").valueAsNumber,
      service_tier: element("tier").value,
    }),
  });
  if (!response.ok) throw await failure(response);
  const seen = { asked, first: null, last: null, pieces: 0, tokens: null };
  let held = "";
  const picture = painter(() => {
    if (!held) return;
    addTo(body, held);
    held = "";
    showSpeed(asked, seen.first, seen.last, seen.pieces, null, "");
  });
  try {
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) seen.tokens = event.usage.completion_tokens;
      const text = event.choices?.[0]?.delta?.content;
      if (!text) continue;
      seen.last = performance.now();
      seen.first ??= seen.last;
      seen.pieces += 1;
      held += text;
      picture.soon();
    }
  } finally {
    picture.now();
    const ending = signal.aborted ? "stopped" : "";
    if (seen.first !== null) showSpeed(asked, seen.first, seen.last, seen.pieces, seen.tokens, ending);
    else if (ending) speed.textContent = ending;
  }
}

function busy(isBusy) {
  stop.hidden = !isBusy;
  send.hidden = isBusy;
  clear.hidden = isBusy || conversation.length === 0;
  log.setAttribute("aria-busy", String(isBusy)); // read out when it is whole, not word by word
}

async function ask(text) {
  running = new AbortController();
  const { signal } = running;
  conversation.push({ role: "user", content: text });
  entry("You", text);
  const body = entry("Model", "");
  prompt.value = "";
  speed.textContent = "waiting for the first token";
  const hadFocus = document.activeElement === send;
  busy(true);
  if (hadFocus) stop.focus();
  try {
    await answer(signal, body);
  } catch (error) {
    if (!signal.aborted) {
      speed.textContent = "";
      entry("Error", error.message, "error");
    }
  }
  // What was said counts as the answer, also where it was stopped; where nothing was, the question is taken back.
  if (body.textContent) {
    conversation.push({ role: "assistant", content: body.textContent });
  } else {
    conversation.pop();
    prompt.value ||= text;
    body.previousSibling.remove();
    body.remove();
  }
  const stopHadFocus = document.activeElement === stop;
  running = null;
  busy(false);
  if (stopHadFocus) prompt.focus();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = prompt.value.trim();
  if (running === null && text) ask(text);
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});
stop.addEventListener("click", () => running?.abort());
clear.addEventListener("click", () => {
  conversation = [];
  log.replaceChildren();
  speed.textContent = "";
  clear.hidden = true;
  prompt.focus();
});
