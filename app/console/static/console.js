"use strict";
// The frame: which page is open, whether the service is ready, and when what is shown is read again.

import { at, get, headers, say } from "./common.js";
import * as chat from "./chat.js";
import * as keys from "./keys.js";
import * as load from "./load.js";
import * as requests from "./requests.js";
import * as tenants from "./tenants.js";
import * as usage from "./usage.js";

// Pages by name: what reads one, and whether it changes by itself.
const PAGES = {
  chat: { read: null },
  requests: { read: requests.show, lives: true },
  load: { read: load.show, lives: true },
  tenants: { read: tenants.show },
  keys: { read: keys.show },
  usage: { read: usage.show },
};
const PAUSE_MS = 2000;
let open = null;
let failure = null;

function fail(error) {
  failure = error.message;
  say(failure, true);
}

async function read() {
  const page = PAGES[open];
  if (!page.read) return;
  try {
    await page.read();
    if (failure !== null) { failure = null; say(""); }
  } catch (error) { fail(error); }
}

function turnTo() {
  const wanted = location.hash.slice(1);
  open = wanted in PAGES ? wanted : "chat";
  for (const name of Object.keys(PAGES)) {
    at(`page-${name}`).hidden = name !== open;
    document.querySelector(`nav a[href="#${name}"]`).setAttribute("aria-current", name === open ? "page" : "false");
  }
  failure = null;
  say("");
  read();
}

async function watch() {
  try {
    const ready = await fetch("/readyz", { headers: headers() });
    at("ready").textContent = ready.ok ? "ready" : "not ready";
    at("ready").className = ready.ok ? "pill good" : "pill bad";
    if (!ready.ok) at("ready").title = `no worker for: ${((await ready.json()).missing || []).join(", ")}`;
    if (!at("key").value && at("key").dataset.needed) return;
    const { data } = await get("/v1/models");
    const model = data.length ? data[0].id : null;
    at("model").textContent = model || "no model";
    chat.use(model);
    if (PAGES[open].lives) await read();
  } catch (error) {
    if (/key/i.test(error.message)) at("key").dataset.needed = "yes";
    at("model").textContent = error.message;
  } finally {
    setTimeout(watch, PAUSE_MS);
  }
}

at("key").addEventListener("change", () => { delete at("key").dataset.needed; read(); });
window.addEventListener("hashchange", turnTo);
turnTo();
watch();
