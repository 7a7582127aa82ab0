"use strict";
// Tenants, their users and what they may use.

import { at, button, call, choices, count, get, instant, onSubmit, row, say, table, unknown } from "./common.js";

const MEASURES = [["requests_per_minute", "requests / min"], ["tokens_per_minute", "tokens / min"],
  ["concurrent_requests", "at once"], ["monthly_budget", "budget a month"]];

const pathOf = (kind, id) => `/api/admin/${kind}/${encodeURIComponent(id)}`;

function turn(kind, one) {
  return button(one.is_active ? "Suspend" : "Resume", async () => {
    await call("POST", pathOf(kind, one.id), { is_active: !one.is_active });
    say(`${one.name} is ${one.is_active ? "suspended" : "active again"}`);
    await show();
  });
}

async function lift(limit) {
  await call("POST", "/api/admin/limits", { subject_kind: limit.subject_kind, subject_id: limit.subject_id, model: limit.model });
  say(`${limit.subject_kind} ${limit.subject_id} has no limit there any more`);
  await show();
}

export async function show() {
  const [{ tenants }, { limits }] = await Promise.all([get("/api/admin/tenants"), get("/api/admin/limits")]);
  const users = (await Promise.all(tenants.map((one) => get(`${pathOf("tenants", one.id)}/users`)))).flatMap((found) => found.users);
  at("tenants").replaceChildren(table(
    ["tenant", "name", "state", { number: "weight" }, { number: "tier" }, "since (UTC)", ""],
    tenants.map((one) => row([one.id, one.name, one.is_active ? "active" : "suspended", { number: one.weight },
      { number: one.tier }, instant(one.created_at), turn("tenants", one)])), "no tenant"));
  at("users").replaceChildren(table(
    ["user", "tenant", "name", "e-mail", "state", ""],
    users.map((one) => row([one.id, one.tenant_id, one.name, one.email || unknown, one.is_active ? "active" : "suspended",
      turn("users", one)])), "no user"));
  at("limits").replaceChildren(table(
    ["of", "id", "model", ...MEASURES.map(([, words]) => ({ number: words })), ""],
    limits.map((one) => row([one.subject_kind, one.subject_id, one.model || "all", ...MEASURES.map(([name]) => ({
      number: one[name] === null ? "no limit" : count(one[name]) })), button("Lift", () => lift(one))])),
    "no limits: everybody may use what there is"));
  for (const select of document.querySelectorAll("select[data-tenants]")) choices(select, tenants.map((one) => one.id));
}

onSubmit(at("new-tenant"), async (values) => {
  await call("POST", "/api/admin/tenants", values);
  say(`tenant ${values.id} exists`);
  await show();
});
onSubmit(at("new-user"), async ({ tenant, ...values }) => {
  const made = await call("POST", `${pathOf("tenants", tenant)}/users`, values);
  say(`user ${made.id} exists`);
  await show();
});
onSubmit(at("new-limit"), async (values) => {
  await call("POST", "/api/admin/limits", values);
  say(`limits of ${values.subject_kind} ${values.subject_id} are set`);
  await show();
});
