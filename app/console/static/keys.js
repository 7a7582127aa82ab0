"use strict";
// API keys: made, shown once, revoked.

import { at, button, call, choices, get, instant, make, onSubmit, row, say, table, unknown } from "./common.js";

const listed = (names) => (names === null ? "all" : names.join(", "));
const split = (text) => (text === undefined ? null : text.split(",").map((part) => part.trim()).filter(Boolean));

function stateOf(key) {
  if (key.revoked_at) return `revoked ${instant(key.revoked_at)}`;
  if (key.expires_at === null) return "valid";
  return key.expires_at * 1000 < Date.now() ? `expired ${instant(key.expires_at)}` : `until ${instant(key.expires_at)}`;
}

async function revoke(key) {
  if (!window.confirm(`Revoke ${key.name} (${key.shown})? That cannot be undone.`)) return;
  await call("POST", `/api/admin/keys/${encodeURIComponent(key.id)}/revoke`);
  say(`${key.name} is revoked`);
  await show();
}

export async function show() {
  const [{ keys }, { tenants }] = await Promise.all([get("/api/admin/keys"), get("/api/admin/tenants")]);
  at("keys").replaceChildren(table(
    ["key", "tenant", "user", "name", "rights", "models", "networks", "endpoints", "state", "last used (UTC)", ""],
    keys.map((one) => row([one.shown, one.tenant_id, one.user_id || unknown, one.name, one.is_admin ? "administrator" : "tenant",
      listed(one.models), listed(one.networks), listed(one.endpoints), stateOf(one), instant(one.last_used_at),
      one.revoked_at ? "" : button("Revoke", () => revoke(one))])),
    "no key: everybody who reaches the gateway may do everything"));
  choices(at("new-key").elements.tenant_id, tenants.map((one) => one.id));
}

onSubmit(at("new-key"), async ({ models, networks, endpoints, days, ...values }) => {
  const expires = days === undefined ? null : Math.floor(Date.now() / 1000 + days * 86400);
  const made = await call("POST", "/api/admin/keys",
    { ...values, models: split(models), networks: split(networks), endpoints: split(endpoints), expires_at: expires });
  at("issued").replaceChildren(make("strong", "Copy it now, it is not shown again: "), make("code", made.key),
    button("Done", () => { at("issued").hidden = true; at("issued").replaceChildren(); }));
  at("issued").hidden = false;
  // From the first key on everything needs one: go on with this one if it opens the rest.
  if (!at("key").value && made.is_admin) at("key").value = made.key;
  await show();
});
