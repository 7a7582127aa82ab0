"use strict";
// The ledger, summed up, and the prices it was kept at.

import { at, attempt, button, call, count, get, make, onSubmit, row, say, table, unknown } from "./common.js";

const NUMBERS = ["requests", "prompt_tokens", "cached_tokens", "completion_tokens", "cost"];
let shown = { columns: [], usage: [] };

async function drop(model) {
  await call("DELETE", `/api/admin/prices/${encodeURIComponent(model)}`);
  say(`requests to ${model} cost nothing from now on`);
  await show();
}

export async function show() {
  const form = at("usage-form").elements;
  const query = new URLSearchParams({ group_by: form.group_by.value });
  for (const end of ["first_day", "last_day"]) if (form[end].value) query.set(end, form[end].value);
  const [{ usage }, { prices }] = await Promise.all([get(`/api/admin/usage?${query}`), get("/api/admin/prices")]);
  const groups = form.group_by.value.split(",");
  shown = { columns: [...groups, ...NUMBERS], usage };
  const cell = (one, name) => (NUMBERS.includes(name)
    ? { number: name === "cost" ? one.cost : count(one[name]) } : one[name] || unknown);
  at("usage").replaceChildren(table(
    shown.columns.map((name) => (NUMBERS.includes(name) ? { number: name.replace("_", " ") } : name)),
    usage.map((one) => row(shown.columns.map((name) => cell(one, name)))), "nothing was used in those days"));
  at("prices").replaceChildren(table(
    ["model", { number: "input" }, { number: "cached input" }, { number: "output" }, ""],
    Object.entries(prices).map(([model, price]) => row([model, { number: price.input }, { number: price.cached_input },
      { number: price.output }, button("Delete", () => drop(model))])), "no prices: everything costs nothing"));
}

function csv() {
  const quoted = (value) => (/[",\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
  const lines = [shown.columns, ...shown.usage.map((one) => shown.columns.map((name) => quoted(String(one[name] ?? ""))))];
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([lines.map((line) => line.join(",")).join("\n") + "\n"], { type: "text/csv" }));
  link.download = "usage.csv";
  link.click();
  URL.revokeObjectURL(link.href);
}

at("usage-form").addEventListener("change", () => attempt(show));
at("usage-form").addEventListener("submit", (event) => event.preventDefault());
at("usage-csv").addEventListener("click", csv);
onSubmit(at("new-price"), async ({ model, ...price }) => {
  await call("POST", `/api/admin/prices/${encodeURIComponent(model)}`, price);
  say(`prices of ${model} are set`);
  await show();
});
