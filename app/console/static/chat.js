"use strict";
// A conversation with the served model, and the walk of its last request.

import { at, count, headers, make, seconds, unknown } from "./common.js";
import { showRecord } from "./record.js";

const history = [];
let model = null;

export function use(served) { model = served; }

function* events(buffer) {
  // Yields complete `data:` payloads; the generator's return value is the unfinished rest.
  let rest = buffer;
  for (let cut = rest.indexOf("\n\n"); cut >= 0; cut = rest.indexOf("\n\n")) {
    for (const line of rest.slice(0, cut).split("\n")) if (line.startsWith("data:")) yield line.slice(5).trim();
    rest = rest.slice(cut + 2);
  }
  return rest;
}

async function ask(question) {
  history.push({ role: "user", content: question });
  at("chat").append(make("div", question, "said user"));
  const said = make("div", "", "said");
  at("chat").append(said);
  const begun = performance.now();
  let first = null, usage = null, text = "", requestId = null;
  try {
    const answer = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers() },
      body: JSON.stringify({
        model, messages: history, stream: true, stream_options: { include_usage: true },
        temperature: Number(at("temperature").value), max_tokens: Number(at("max-tokens").value),
      }),
    });
    requestId = answer.headers.get("x-request-id");
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let buffer = "";
    for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
      const parsed = events(buffer + piece.value);
      let step = parsed.next();
      for (; !step.done; step = parsed.next()) {
        if (step.value === "[DONE]") continue;
        const chunk = JSON.parse(step.value);
        if (chunk.error) throw new Error(chunk.error.message);
        usage = chunk.usage || usage;
        const content = chunk.choices.length ? chunk.choices[0].delta.content : "";
        if (content) { first = first || performance.now(); text += content; said.textContent = text; }
      }
      buffer = step.value;
      at("chat").scrollTop = at("chat").scrollHeight;
    }
    history.push({ role: "assistant", content: text });
    const took = (performance.now() - (first || begun)) / 1000;
    const cached = usage && usage.prompt_tokens_details ? usage.prompt_tokens_details.cached_tokens : null;
    const speed = usage && took > 0 ? `${((usage.completion_tokens - 1) / took).toFixed(0)} tokens/s` : unknown;
    said.append(make("span", `first token ${seconds(first ? (first - begun) / 1000 : null)} · ${speed} · `
      + `${count(usage && usage.prompt_tokens)} in (${count(cached)} cached), ${count(usage && usage.completion_tokens)} out`, "cost"));
  } catch (error) {
    history.pop();
    said.className = "said error";
    said.textContent = error.message;
  }
  if (requestId) await showRecord(requestId, at("last-request")).catch((error) => { at("last-request").textContent = error.message; });
}

at("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const question = at("question").value.trim();
  if (!question || at("send").disabled) return;
  at("question").value = "";
  at("send").disabled = true;
  try { await ask(question); } finally { at("send").disabled = false; }
});
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); at("ask").requestSubmit(); }
});
at("clear").addEventListener("click", () => { history.length = 0; at("chat").replaceChildren(); });
