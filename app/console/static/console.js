"use strict";

const at = (id) => document.getElementById(id);
const history = [];
let model = null;

function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) element.textContent = text;
  if (className) element.className = className;
  return element;
}

function headers() {
  const key = at("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function get(path) {
  const answer = await fetch(path, { headers: headers() });
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error ? body.error.message : `${path}: ${answer.status}`);
  return body;
}

const unknown = "–";
const count = (value) => (value === null || value === undefined ? unknown : value.toLocaleString("en"));

function bytes(value) {
  if (value === null || value === undefined) return unknown;
  const units = ["B", "kB", "MB", "GB", "TB"];
  let power = 0;
  while (value >= 1000 && power < units.length - 1) { value /= 1000; power += 1; }
  return `${value.toFixed(power ? 1 : 0)} ${units[power]}`;
}

function seconds(value) {
  if (value === null || value === undefined) return unknown;
  if (value >= 1) return `${value.toFixed(2)} s`;
  if (value >= 1e-3) return `${(value * 1e3).toFixed(2)} ms`;
  return `${(value * 1e6).toFixed(1)} µs`;
}

function row(cells, tag = "td") {
  const line = make("tr");
  for (const cell of cells) {
    const number = typeof cell === "object";
    line.append(make(tag, number ? cell.number : cell, number ? "number" : ""));
  }
  return line;
}

function showWorkers(workers) {
  at("workers").replaceChildren(...workers.map((worker) => {
    const place = worker.location;
    return row([
      worker.id, worker.role, worker.state, `node ${place.node} · NPU ${place.npu} · die ${place.die}`,
      { number: count(worker.running) }, { number: count(worker.waiting) },
      { number: `${count(worker.kv_blocks_used)} / ${count(worker.kv_blocks_total)}` },
    ]);
  }));
  if (!workers.length) at("workers").append(row(["no worker is alive"]));
}

function showPool(pool) {
  const share = pool.queries ? `${(100 * pool.hits / pool.queries).toFixed(1)} % of ${count(pool.queries)} block queries` : unknown;
  at("pool").replaceChildren(
    row(["blocks", { number: count(pool.blocks) }]),
    row(["size", { number: bytes(pool.bytes) }]),
    row(["hits", { number: share }]),
    row(["evictions", { number: count(pool.evictions) }]),
  );
}

async function refresh() {
  try {
    const ready = await fetch("/readyz", { headers: headers() });
    at("ready").textContent = ready.ok ? "ready" : "not ready";
    at("ready").className = ready.ok ? "pill good" : "pill bad";
    const [models, workers, pool] = await Promise.all([get("/v1/models"), get("/api/workers"), get("/api/pool")]);
    model = models.data.length ? models.data[0].id : null;
    at("model").textContent = model || "no model";
    showWorkers(workers.workers);
    showPool(pool);
  } catch (error) {
    at("ready").textContent = error.message;
    at("ready").className = "pill bad";
  } finally {
    setTimeout(refresh, 1000);
  }
}

function showTimeline(record) {
  const end = Math.max(...record.timeline.map((phase) => phase.start_s + phase.duration_s), 1e-9);
  const lanes = record.timeline.map((phase) => {
    const lane = make("div", null, "lane");
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    bar.setAttribute("x", `${(100 * phase.start_s) / end}%`);
    bar.setAttribute("width", `${Math.max(0.3, (100 * phase.duration_s) / end)}%`);
    bar.setAttribute("height", "100%");
    bar.setAttribute("class", phase.phase);
    svg.append(bar);
    lane.append(make("span", phase.phase), svg, make("span", seconds(phase.duration_s)));
    return lane;
  });
  at("timeline").replaceChildren(...lanes);
}

function showTransfers(record) {
  const kinds = new Map();
  for (const transfer of record.transfers) {
    const sum = kinds.get(transfer.kind) || { moves: 0, num_bytes: 0, measured_s: 0, ub_s: 0, roce_s: 0 };
    sum.moves += 1;
    for (const field of ["num_bytes", "measured_s", "ub_s", "roce_s"]) sum[field] += transfer[field] || 0;
    kinds.set(transfer.kind, sum);
  }
  const head = row(
    ["KV transfers", { number: "moves" }, { number: "bytes" }, { number: "measured here" }, { number: "modelled on UB" },
      { number: "modelled on RoCE" }, { number: "RoCE / UB" }], "th");
  const line = (name, sum) => row([
    name, { number: count(sum.moves) }, { number: bytes(sum.num_bytes) }, { number: seconds(sum.measured_s) },
    { number: seconds(sum.ub_s) }, { number: seconds(sum.roce_s) },
    { number: sum.ub_s ? `${(sum.roce_s / sum.ub_s).toFixed(1)} ×` : unknown },
  ]);
  const table = make("table");
  table.append(head, ...[...kinds].map(([kind, sum]) => line(kind, sum)));
  if (record.transfers.length) table.append(line("total", { moves: record.transfers.length, ...record.totals }));
  at("transfers").replaceChildren(table);
}

async function showRequest(id) {
  const record = await get(`/api/requests/${encodeURIComponent(id)}`);
  const route = record.route || {};
  at("request-id").textContent = record.request_id;
  at("route").textContent = `prefill on ${route.prefill_worker || unknown}, decode on ${route.decode_worker || unknown}; `
    + `${count(record.usage.prompt_tokens)} prompt tokens (${count(record.usage.cached_tokens)} cached, `
    + `${count(route.predicted_cached_tokens)} predicted), ${count(record.usage.completion_tokens)} produced`
    + (record.reuse || []).map((found) => `; ${found.where} fetched ${found.fetched_blocks} of `
      + `${found.found_blocks} pool blocks` + (found.miss_reason ? `, the next was ${found.miss_reason.replace("_", " ")}` : "")
    ).join("");
  showTimeline(record);
  showTransfers(record);
}

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
  if (requestId) await showRequest(requestId).catch((error) => { at("route").textContent = error.message; });
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
refresh();
