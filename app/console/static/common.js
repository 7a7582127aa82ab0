"use strict";
// What all pages use: elements, requests to the gateway, numbers for people.

export const at = (id) => document.getElementById(id);
export const unknown = "–";

export function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) element.textContent = text;
  if (className) element.className = className;
  return element;
}

export function headers() {
  const key = at("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

export async function call(method, path, body) {
  const options = { method, headers: headers() };
  if (body !== undefined) {
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const answer = await fetch(path, options);
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(found.error ? found.error.message : `${path}: ${answer.status}`);
  return found;
}

export const get = (path) => call("GET", path);
export const count = (value) => (value === null || value === undefined ? unknown : value.toLocaleString("en"));
export const instant = (seconds) => (seconds ? new Date(seconds * 1000).toISOString().slice(0, 16).replace("T", " ") : unknown);

export function bytes(value) {
  if (value === null || value === undefined) return unknown;
  const units = ["B", "kB", "MB", "GB", "TB"];
  let power = 0;
  while (value >= 1000 && power < units.length - 1) { value /= 1000; power += 1; }
  return `${value.toFixed(power ? 1 : 0)} ${units[power]}`;
}

export function seconds(value) {
  if (value === null || value === undefined) return unknown;
  if (value >= 1) return `${value.toFixed(2)} s`;
  if (value >= 1e-3) return `${(value * 1e3).toFixed(2)} ms`;
  return `${(value * 1e6).toFixed(1)} µs`;
}

// A cell is a text, an element, or {number} that stands at the right.
export function row(cells, tag = "td") {
  const line = make("tr");
  for (const cell of cells) {
    if (cell instanceof Node) { const box = make(tag); box.append(cell); line.append(box); continue; }
    const isNumber = cell !== null && typeof cell === "object";
    line.append(make(tag, isNumber ? cell.number : cell, isNumber ? "number" : ""));
  }
  return line;
}

export function table(head, rows, empty) {
  const whole = make("table"), top = make("thead"), body = make("tbody"), frame = make("div", null, "frame");
  top.append(row(head, "th"));
  body.append(...rows);
  if (!rows.length) {
    const line = row([empty]);
    line.firstChild.colSpan = head.length;
    line.firstChild.className = "muted";
    body.append(line);
  }
  whole.append(top, body);
  frame.append(whole);
  return frame;
}

export function button(text, act) {
  const element = make("button", text);
  element.type = "button";
  element.addEventListener("click", () => attempt(act, element));
  return element;
}

export function say(text, isBad) {
  at("notice").textContent = text;
  at("notice").className = isBad ? "bad" : "good";
  at("notice").hidden = !text;
}

export async function attempt(act, pressed) {
  if (pressed) pressed.disabled = true;
  try { await act(); } catch (error) { say(error.message, true); } finally { if (pressed) pressed.disabled = false; }
}

// Calls `act` with the form's filled-in fields, numbers as numbers; empties it when that went well.
export function onSubmit(form, act) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const values = {};
    for (const field of form.elements) {
      if (!field.name) continue;
      if (field.type === "checkbox") values[field.name] = field.checked;
      else if (field.value.trim() !== "") values[field.name] = field.type === "number" ? Number(field.value) : field.value.trim();
    }
    attempt(async () => { await act(values); form.reset(); }, form.querySelector("button[type=submit]"));
  });
}

export function choices(select, names, all) {
  const chosen = select.value;
  const given = names.map((name) => { const option = make("option", name); option.value = name; return option; });
  if (all !== undefined) { const option = make("option", all); option.value = ""; given.unshift(option); }
  select.replaceChildren(...given);
  if (names.includes(chosen)) select.value = chosen;
}
