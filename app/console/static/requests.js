"use strict";
// The newest requests, and one of them in full.

import { at, button, bytes, count, get, instant, row, seconds, table } from "./common.js";
import { showRecord } from "./record.js";

export async function show() {
  const { requests } = await get("/api/requests?limit=50");
  const lines = requests.map((one) => row([
    button(one.request_id.slice(4, 14), () => look(one.request_id)),
    instant(one.created), one.endpoint, one.finish_reason ? `${one.status}: ${one.finish_reason}` : one.status,
    { number: count(one.usage.prompt_tokens) }, { number: count(one.usage.cached_tokens) },
    { number: count(one.usage.completion_tokens) },
    { number: seconds(one.ttft_s) }, { number: seconds(one.e2e_s) }, { number: bytes(one.totals.num_bytes) },
    { number: seconds(one.totals.measured_s) }, { number: seconds(one.totals.ub_s) }, { number: seconds(one.totals.roce_s) },
  ]));
  const before = at("requests").firstChild;
  const place = before ? before.scrollTop : 0;
  at("requests").replaceChildren(table(
    ["request", "began (UTC)", "endpoint", "status", { number: "prompt" }, { number: "cached" }, { number: "produced" },
      { number: "first token" }, { number: "whole" }, { number: "KV moved" }, { number: "measured here" },
      { number: "modelled UB" }, { number: "modelled RoCE" }],
    lines, "no request yet"));
  at("requests").firstChild.scrollTop = place;
}

async function look(id) {
  await showRecord(id, at("record"));
  at("record").scrollIntoView({ behavior: "smooth", block: "nearest" });
}
