"use strict";
// One request: how it walked through the service, phase by phase, and what of its KV moved.

import { bytes, count, get, make, row, seconds, table, unknown } from "./common.js";

const HEAD = ["KV transfers", { number: "moves" }, { number: "bytes" }, { number: "measured here" },
  { number: "modelled on UB" }, { number: "modelled on RoCE" }, { number: "RoCE / UB, modelled" }];

function timeline(record) {
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
    lane.append(make("span", phase.phase), make("span", phase.where, "muted"), svg, make("span", seconds(phase.duration_s)));
    return lane;
  });
  const whole = make("div", null, "timeline");
  whole.append(...lanes);
  return whole;
}

function transfers(record) {
  const kinds = new Map();
  for (const transfer of record.transfers) {
    const sum = kinds.get(transfer.kind) || { moves: 0, num_bytes: 0, measured_s: 0, ub_s: 0, roce_s: 0 };
    sum.moves += 1;
    for (const field of ["num_bytes", "measured_s", "ub_s", "roce_s"]) sum[field] += transfer[field] || 0;
    kinds.set(transfer.kind, sum);
  }
  const line = (name, sum) => row([
    name, { number: count(sum.moves) }, { number: bytes(sum.num_bytes) }, { number: seconds(sum.measured_s) },
    { number: seconds(sum.ub_s) }, { number: seconds(sum.roce_s) },
    { number: sum.ub_s ? `${(sum.roce_s / sum.ub_s).toFixed(1)} ×` : unknown },
  ]);
  const lines = [...kinds].map(([kind, sum]) => line(kind.replaceAll("_", " "), sum));
  if (record.transfers.length) lines.push(line("total", { moves: record.transfers.length, ...record.totals }));
  if (record.as_if) {
    const model = record.as_if;
    lines.push(row([
      `at ${model.model}'s KV size`, { number: unknown }, { number: bytes(model.num_bytes) }, { number: "not measured" },
      { number: seconds(model.ub_s) }, { number: seconds(model.roce_s) },
      { number: model.ub_s ? `${(model.roce_s / model.ub_s).toFixed(1)} ×` : unknown },
    ]));
  }
  return table(HEAD, lines, "nothing was moved");
}

function summary(record) {
  const route = record.route || {};
  return `${record.status}${record.finish_reason ? ` (${record.finish_reason})` : ""}; `
    + `prefill on ${route.prefill_worker || unknown}, decode on ${route.decode_worker || unknown}; `
    + `${count(record.usage.prompt_tokens)} prompt tokens (${count(record.usage.cached_tokens)} cached, `
    + `${count(route.predicted_cached_tokens)} predicted), ${count(record.usage.completion_tokens)} produced`
    + (record.reuse || []).map((found) => `; ${found.where} fetched ${found.fetched_blocks} of `
      + `${found.found_blocks} pool blocks` + (found.miss_reason ? `, the next was ${found.miss_reason.replace("_", " ")}` : "")
    ).join("");
}

function scores(record) {
  const reason = record.route && record.route.reason;
  if (!reason) return make("p", "no worker was chosen", "muted");
  const lines = ["prefill", "decode"].flatMap((side) => reason[side].map((one) => row([
    side, one.worker, { number: one.score.toFixed(3) },
    Object.entries(one.scores).map(([name, value]) => `${name} ${value.toFixed(3)}`).join(" · "),
  ])));
  for (const [worker, why] of Object.entries(reason.excluded)) lines.push(row(["left out", worker, { number: unknown }, why]));
  return table(["why there", "worker", { number: "score" }, "of 0 (worst) to 1 (best)"], lines, "no candidates");
}

export async function showRecord(id, root) {
  const record = await get(`/api/requests/${encodeURIComponent(id)}`);
  root.replaceChildren(
    make("p", record.request_id, "muted"), make("p", summary(record), "muted"),
    make("h3", "Phases, measured"), timeline(record), transfers(record), scores(record),
  );
}
