"use strict";
// Who serves, who waits, how fairly, and what the autoscaler does about it. All of it measured.

import { at, attempt, button, bytes, call, count, get, instant, make, row, say, table, unknown } from "./common.js";

const ROLES = ["prefill", "decode", "both"];

function roleOf(worker) {
  const select = make("select");
  select.setAttribute("aria-label", `role of ${worker.id}`);
  for (const role of ROLES) select.append(make("option", role));
  select.value = worker.role;
  select.addEventListener("change", () => attempt(async () => {
    await call("POST", `/api/workers/${encodeURIComponent(worker.id)}/role`, { role: select.value });
    say(`${worker.id}: ${select.value}`);
  }, select));
  return select;
}

async function drain(worker) {
  if (!window.confirm(`Drain ${worker.id}? It takes no new work and ends when it has finished.`)) return;
  await call("POST", `/api/workers/${encodeURIComponent(worker.id)}/drain`);
  say(`${worker.id} drains`);
}

function showWorkers(workers) {
  if (at("workers").contains(document.activeElement)) return;  // a choice is being made there
  at("workers").replaceChildren(table(
    ["worker", "role", "state", "place on the supernode", { number: "running" }, { number: "waiting" },
      { number: "KV blocks" }, ""],
    workers.map((worker) => row([
      worker.id, roleOf(worker), worker.connected ? worker.state : "not connected",
      `node ${worker.location.node} · NPU ${worker.location.npu} · die ${worker.location.die}`,
      { number: count(worker.running) }, { number: count(worker.waiting) },
      { number: `${count(worker.kv_blocks_used)} / ${count(worker.kv_blocks_total)}` },
      button("Drain", () => drain(worker)),
    ])), "no worker is alive"));
}

function showAdmission(view) {
  const index = view.fairness_index;
  at("queue").textContent = `${count(view.queued)} waiting, ${count(view.sequences_released)} with the workers; fairness index `
    + (index === null ? `${unknown} (no two tenants competed in the last minute)` : `${index.toFixed(3)} (1: every tenant got its share)`);
  at("shares").replaceChildren(table(
    ["tenant", { number: "waiting" }, { number: "virtual tokens served" }],
    view.tenants.map((one) => row([one.tenant, { number: count(one.queued) }, { number: count(one.service_tokens) }])),
    "nobody was served yet"));
}

function showAutoscaler(view) {
  const side = (value) => (value === null ? unknown : value.toFixed(2));
  at("autoscaler").textContent = (view.enabled ? "on" : "off (CLOUDMATRIX_AUTOSCALE=true turns it on)")
    + `; targets ${view.ttft_target_s} s to the first token, ${view.tpot_target_s} s a token; pressure on prefill `
    + `${side(view.prefill_pressure)}, on decode ${side(view.decode_pressure)} (1: the target is just met)`;
  at("changes").replaceChildren(table(
    ["when (UTC)", "worker", "turned to", "because"],
    view.changes.map((one) => row([instant(one.at), one.worker, one.role, one.error || one.reason])), "no worker was turned"));
}

function showPool(pool) {
  const share = pool.queries ? `${(100 * pool.hits / pool.queries).toFixed(1)} % of ${count(pool.queries)} block queries` : unknown;
  const spaces = Object.entries(pool.namespaces || {});
  at("pool").replaceChildren(
    table(["pool", { number: "blocks" }, { number: "bytes" }, { number: "fetched" }, { number: "published" }, { number: "evictions" }],
      [row(["all", { number: count(pool.blocks) }, { number: bytes(pool.bytes) }, { number: count(pool.fetched) },
        { number: count(pool.published) }, { number: count(pool.evictions) }]),
      ...spaces.map(([name, one]) => row([name, { number: count(one.blocks) }, { number: bytes(one.used_bytes) },
        { number: count(one.fetched) }, { number: count(one.published) }, { number: count(one.evictions) }]))], "empty"),
    make("p", `hits: ${share}`, "muted"));
}

export async function show() {
  const [workers, admission, autoscaler, pool] = await Promise.all(
    [get("/api/workers"), get("/api/admission"), get("/api/autoscaler"), get("/api/pool")]);
  showWorkers(workers.workers);
  showAdmission(admission);
  showAutoscaler(autoscaler);
  showPool(pool);
}
