// What an unmodified `openai` package of npm must get from a running service; the cases of cases.py, by the same names.
// `node cases.mjs ACCESS.json` prints one JSON line a case.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";

import OpenAI from "openai";
import { VERSION } from "openai/version";

const { url, model, keys } = JSON.parse(readFileSync(process.argv[2], "utf8"));
const CASES = {};
const ASK = [{ role: "user", content: "Describe Paris in a few words." }];
const CITY_SCHEMA = {
  type: "object",
  properties: {
    city: { type: "string", maxLength: 20 },
    population: { type: "integer", minimum: 0, maximum: 99999999 },
  },
  required: ["city", "population"],
  additionalProperties: false,
};
const WEATHER = {
  type: "function",
  function: {
    name: "get_weather",
    description: "The weather of a city.",
    strict: true,
    parameters: {
      type: "object",
      properties: { city: { type: "string", maxLength: 12 }, unit: { enum: ["celsius", "fahrenheit"] } },
      required: ["city", "unit"],
      additionalProperties: false,
    },
  },
};

const sdk = (key = "operator", more = {}) =>
  new OpenAI({ baseURL: url + "/v1", apiKey: keys[key], maxRetries: 0, timeout: 60_000, ...more });
const all = async (stream) => {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
};
const get = async (path) =>
  (await fetch(url + path, { headers: { authorization: `Bearer ${keys.operator}` } })).json();
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** The exception, which must be exactly of this class. */
async function raised(kind, promise) {
  const error = await promise.then(() => assert.fail(`no ${kind.name}`), (caught) => caught);
  assert.equal(error.constructor, kind, String(error));
  return error;
}

/** A request's record once it is over. */
async function ended(read) {
  for (const until = Date.now() + 5000; ; ) {
    const record = await read();
    if (!["queued", "running"].includes(record.status)) return record;
    assert.ok(Date.now() < until, JSON.stringify(record));
    await pause(20);
  }
}

CASES.chat = async () => {
  const { data: answer, request_id } = await sdk()
    .chat.completions.create({
      model,
      messages: [{ role: "user", content: "What is the capital of France?" }],
      temperature: 0,
    })
    .withResponse();
  const [choice] = answer.choices;
  assert.equal(answer.object, "chat.completion");
  assert.match(choice.message.content, /Paris/);
  assert.deepEqual([choice.finish_reason, choice.message.role], ["stop", "assistant"]);
  assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
  assert.equal(typeof answer.usage.prompt_tokens_details.cached_tokens, "number");
  assert.ok(request_id);
};

CASES.chat_stream_with_usage = async () => {
  const fields = { model, messages: ASK, temperature: 0.8, seed: 3 };
  const whole = await sdk().chat.completions.create(fields);
  const chunks = await all(
    await sdk().chat.completions.create({ ...fields, stream: true, stream_options: { include_usage: true } }),
  );
  const plain = await all(await sdk().chat.completions.create({ ...fields, stream: true }));
  const parts = chunks.slice(0, -1);
  const last = chunks.at(-1);
  assert.equal(new Set(chunks.map((c) => JSON.stringify([c.id, c.created, c.model, c.object]))).size, 1);
  assert.equal(parts[0].choices[0].delta.role, "assistant");
  assert.equal(parts.map((c) => c.choices[0].delta.content ?? "").join(""), whole.choices[0].message.content);
  assert.deepEqual(parts.map((c) => c.choices[0].finish_reason).filter(Boolean), ["stop"]);
  assert.ok(parts.every((c) => c.usage === null));
  assert.deepEqual(last.choices, []);
  assert.equal(last.usage.prompt_tokens, whole.usage.prompt_tokens);
  assert.equal(last.usage.completion_tokens, whole.usage.completion_tokens);
  assert.ok(plain.every((c) => c.usage === undefined && c.choices.length === 1));
};

CASES.chat_n_and_seed = async () => {
  const say = async (seed) => {
    const answer = await sdk().chat.completions.create({
      model, messages: ASK, n: 3, seed, temperature: 1.2, max_tokens: 12,
    });
    assert.deepEqual(answer.choices.map((c) => c.index), [0, 1, 2]);
    return answer.choices.map((c) => c.message.content);
  };
  const first = await say(5);
  assert.equal(new Set(first).size, 3);
  assert.deepEqual(await say(5), first);
  assert.notDeepEqual(await say(6), first);
};

CASES.stop_strings = async () => {
  const fields = { model, prompt: "1, 2, 3, 4, 5,", temperature: 0, max_tokens: 40 };
  const free = (await sdk().completions.create(fields)).choices[0].text;
  const stop = free.slice(9, 12);
  const held = (await sdk().completions.create({ ...fields, stop: ["never this", stop] })).choices[0];
  const chunks = await all(await sdk().completions.create({ ...fields, stop, stream: true }));
  assert.equal(held.finish_reason, "stop");
  assert.equal(held.text, free.slice(0, free.indexOf(stop)));
  assert.equal(chunks.map((c) => c.choices[0].text).join(""), held.text);
  assert.equal(chunks.at(-1).choices[0].finish_reason, "stop");
};

CASES.chat_logprobs = async () => {
  const answer = await sdk().chat.completions.create({
    model, messages: ASK, logprobs: true, top_logprobs: 3, temperature: 0, max_tokens: 6,
  });
  const { content } = answer.choices[0].logprobs;
  assert.equal(content.length, answer.usage.completion_tokens);
  assert.equal(content.map((entry) => entry.token).join(""), answer.choices[0].message.content);
  for (const entry of content) {
    const tops = entry.top_logprobs.map((top) => top.logprob);
    assert.equal(tops.length, 3);
    assert.deepEqual(tops, tops.toSorted((a, b) => b - a));
    assert.deepEqual([entry.token, entry.logprob], [entry.top_logprobs[0].token, tops[0]]);
    assert.equal(Buffer.from(entry.bytes).toString(), entry.token);
  }
};

CASES.logit_bias_and_penalties = async () => {
  const fields = { model, prompt: "the the the the", temperature: 0, max_tokens: 12 };
  const forced = (await sdk().completions.create({ ...fields, logit_bias: { 500: 100 } })).choices[0].text;
  const free = await sdk().completions.create({ ...fields, logprobs: 0 });
  const punished = await sdk().completions.create({
    ...fields, frequency_penalty: 2, presence_penalty: 2, logprobs: 0,
  });
  const [a, b] = [free, punished].map((answer) => new Set(answer.choices[0].logprobs.tokens).size);
  assert.ok(b > a);
  assert.equal(forced, forced.slice(0, forced.length / 12).repeat(12));
};

CASES.chat_json_object = async () => {
  const [choice] = (
    await sdk().chat.completions.create({
      model,
      messages: [{ role: "user", content: "Give me a small JSON object." }],
      response_format: { type: "json_object" },
      temperature: 0,
      max_tokens: 200,
    })
  ).choices;
  assert.ok(choice.message.content.startsWith("{"));
  assert.ok(choice.finish_reason === "length" || typeof JSON.parse(choice.message.content) === "object");
};

CASES.chat_json_schema = async () => {
  const answer = await sdk().chat.completions.create({
    model,
    messages: ASK,
    response_format: { type: "json_schema", json_schema: { name: "c", strict: true, schema: CITY_SCHEMA } },
    temperature: 1,
    seed: 1,
    max_tokens: 100,
  });
  const value = JSON.parse(answer.choices[0].message.content);
  assert.deepEqual(Object.keys(value).toSorted(), ["city", "population"]);
  assert.equal(typeof value.city, "string");
  assert.ok(value.population >= 0 && value.population <= 99999999);
};

CASES.chat_parse_into_a_model = async () => {
  const schema = {
    type: "object",
    properties: { is_city: { type: "boolean" }, size: { type: ["integer", "null"] } },
    required: ["is_city", "size"],
    additionalProperties: false,
  };
  const answer = await sdk().chat.completions.parse({
    model,
    messages: ASK,
    response_format: {
      type: "json_schema",
      json_schema: { name: "Answer", strict: true, schema },
      $brand: "auto-parseable-response-format",
      $parseRaw: JSON.parse,
    },
    temperature: 0,
    max_tokens: 100,
  });
  assert.equal(typeof answer.choices[0].message.parsed.is_city, "boolean");
};

CASES.chat_stream_helper = async () => {
  const fields = { model, messages: ASK, temperature: 0 };
  const whole = (await sdk().chat.completions.create(fields)).choices[0].message.content;
  let numDeltas = 0;
  const runner = sdk().chat.completions.stream(fields).on("content", () => (numDeltas += 1));
  assert.equal((await runner.finalChatCompletion()).choices[0].message.content, whole);
  assert.ok(numDeltas >= 8);
};

CASES.chat_tools_whole = async () => {
  const fields = { model, messages: ASK, tools: [WEATHER], temperature: 0, max_tokens: 120 };
  for (const tool_choice of ["required", { type: "function", function: { name: "get_weather" } }]) {
    const [choice] = (
      await sdk().chat.completions.create({ ...fields, tool_choice, parallel_tool_calls: false })
    ).choices;
    const [call] = choice.message.tool_calls;
    assert.equal(choice.finish_reason, "tool_calls");
    assert.deepEqual([call.type, call.function.name], ["function", "get_weather"]);
    assert.ok(["celsius", "fahrenheit"].includes(JSON.parse(call.function.arguments).unit));
  }
  const none = (await sdk().chat.completions.create({ ...fields, tool_choice: "none" })).choices[0];
  const auto = (await sdk().chat.completions.create({ ...fields, tool_choice: "auto" })).choices[0];
  assert.equal(none.message.tool_calls, undefined);
  assert.ok(none.message.content);
  assert.ok(auto.message.content || auto.message.tool_calls);
};

CASES.chat_tools_streamed = async () => {
  const fields = {
    model, messages: ASK, tools: [WEATHER], tool_choice: "required", parallel_tool_calls: false, temperature: 0,
    max_tokens: 120,
  };
  const [whole] = (await sdk().chat.completions.create(fields)).choices[0].message.tool_calls;
  const chunks = await all(await sdk().chat.completions.create({ ...fields, stream: true }));
  const runner = sdk().chat.completions.stream(fields);
  const [gathered] = (await runner.finalChatCompletion()).choices[0].message.tool_calls;
  const deltas = chunks.flatMap((c) => c.choices[0].delta.tool_calls ?? []);
  assert.deepEqual([...new Set(deltas.map((d) => d.index))], [0]);
  assert.deepEqual(deltas.map((d) => d.function.name).filter(Boolean), ["get_weather"]);
  assert.equal(deltas.filter((d) => d.id).length, 1);
  assert.equal(deltas.map((d) => d.function.arguments ?? "").join(""), whole.function.arguments);
  assert.equal(chunks.at(-1).choices[0].finish_reason, "tool_calls");
  assert.equal(gathered.function.arguments, whole.function.arguments);
  assert.deepEqual(gathered.function.parsed_arguments, JSON.parse(whole.function.arguments));
};

CASES.chat_tool_turn_back = async () => {
  const fields = { model, tools: [WEATHER], temperature: 0, max_tokens: 60 };
  const asked = (await sdk().chat.completions.create({ ...fields, messages: ASK, tool_choice: "required" }))
    .choices[0].message;
  const results = asked.tool_calls.map((call) => ({
    role: "tool", tool_call_id: call.id, content: '{"sky": "blue"}',
  }));
  const told = await sdk().chat.completions.create({
    ...fields, messages: [...ASK, asked, ...results], tool_choice: "none",
  });
  assert.ok(told.choices[0].message.content);
};

CASES.responses_whole = async () => {
  const answer = await sdk().responses.create({
    model, instructions: "Answer in one sentence.", input: "What is the capital of France?", temperature: 0,
  });
  const turns = [
    { role: "user", content: [{ type: "input_text", text: "Say a word." }] },
    { role: "assistant", content: [{ type: "output_text", text: "Word.", annotations: [] }] },
    { role: "user", content: "Another." },
  ];
  const cut = await sdk().responses.create({ model, input: turns, max_output_tokens: 1 });
  assert.deepEqual([answer.object, answer.status, answer.error], ["response", "completed", null]);
  assert.match(answer.output_text, /Paris/);
  assert.equal(answer.usage.total_tokens, answer.usage.input_tokens + answer.usage.output_tokens);
  assert.ok(answer.usage.input_tokens_details.cached_tokens >= 0);
  assert.equal(answer.usage.output_tokens_details.reasoning_tokens, 0);
  assert.deepEqual([cut.status, cut.incomplete_details.reason], ["incomplete", "max_output_tokens"]);
  assert.equal(cut.usage.output_tokens, 1);
};

CASES.responses_stream = async () => {
  const fields = { model, input: ASK, temperature: 0 };
  const whole = await sdk().responses.create(fields);
  const events = await all(await sdk().responses.create({ ...fields, stream: true }));
  const final = await sdk().responses.stream(fields).finalResponse();
  assert.deepEqual(events.map((event) => event.sequence_number), events.map((_, number) => number));
  const kinds = events.map((event) => event.type.replace("response.", ""));
  assert.deepEqual(kinds.slice(0, 4), ["created", "in_progress", "output_item.added", "content_part.added"]);
  assert.deepEqual(kinds.slice(-4), ["output_text.done", "content_part.done", "output_item.done", "completed"]);
  assert.deepEqual([...new Set(kinds.slice(4, -4))], ["output_text.delta"]);
  assert.equal(events.slice(4, -4).map((event) => event.delta).join(""), whole.output_text);
  assert.equal(final.output_text, whole.output_text);
  assert.equal(events.at(-1).response.usage.output_tokens, whole.usage.output_tokens);
};

CASES.responses_parse_into_a_model = async () => {
  const schema = {
    type: "object",
    properties: { is_city: { type: "boolean" }, size: { type: ["integer", "null"] } },
    required: ["is_city", "size"],
    additionalProperties: false,
  };
  const answer = await sdk().responses.parse({
    model, input: ASK, text: { format: { type: "json_schema", name: "answer", strict: true, schema } }, temperature: 0,
    max_output_tokens: 100,
  });
  assert.equal(typeof JSON.parse(answer.output_text).is_city, "boolean");
  assert.deepEqual(Object.keys(JSON.parse(answer.output_text)).sort(), ["is_city", "size"]);
};

CASES.responses_tool_round_trip = async () => {
  const tool = { type: "function", ...WEATHER.function };
  const fields = { model, tools: [tool], temperature: 0, max_output_tokens: 120 };
  const must = { tool_choice: "required", parallel_tool_calls: false, input: ASK };
  const asked = await sdk().responses.create({ ...fields, ...must });
  const events = await all(await sdk().responses.create({ ...fields, ...must, stream: true }));
  assert.equal(asked.output.length, 1);
  const [call] = asked.output;
  const result = { type: "function_call_output", call_id: call.call_id, output: '{"sky": "blue"}' };
  const told = await sdk().responses.create({ ...fields, input: [...ASK, call, result], tool_choice: "none" });
  assert.deepEqual([call.type, call.name, call.status], ["function_call", "get_weather", "completed"]);
  assert.ok(["celsius", "fahrenheit"].includes(JSON.parse(call.arguments).unit));
  const deltas = events.filter((event) => event.type === "response.function_call_arguments.delta");
  assert.equal(deltas.map((event) => event.delta).join(""), call.arguments);
  const [done] = events.filter((event) => event.type === "response.function_call_arguments.done");
  assert.equal(done.arguments, call.arguments);
  assert.equal(events.at(-1).response.output[0].name, "get_weather");
  assert.ok(told.output_text);
};

CASES.responses_refuse_by_name = async () => {
  for (const [more, param] of [
    [{ previous_response_id: "resp_1" }, "previous_response_id"],
    [{ store: true }, "store"],
    [{ tools: [{ type: "web_search" }] }, "tools[0].type"],
    [{ background: true, stream: true }, "background"],
  ]) {
    const error = await raised(OpenAI.BadRequestError, sdk().responses.create({ model, input: "a", ...more }));
    assert.deepEqual([error.code, error.param], ["unsupported_parameter", param]);
  }
};

CASES.completions_whole = async () => {
  const answer = await sdk().completions.create({
    model, prompt: ["Once upon", "In the beginning"], n: 2, seed: 1, max_tokens: 5, logprobs: 2,
  });
  const ids = await sdk().completions.create({ model, prompt: [100, 200, 300], max_tokens: 3 });
  assert.equal(answer.object, "text_completion");
  assert.deepEqual(answer.choices.map((c) => c.index), [0, 1, 2, 3]);
  for (const choice of answer.choices) {
    assert.equal(choice.logprobs.tokens.join(""), choice.text);
    assert.ok(choice.logprobs.top_logprobs.every((tops) => Object.keys(tops).length >= 2));
  }
  assert.equal(answer.usage.completion_tokens, 20);
  assert.equal(ids.usage.prompt_tokens, 3);
};

CASES.completions_stream = async () => {
  const fields = { model, prompt: "Once upon a time", seed: 2, max_tokens: 20 };
  const whole = await sdk().completions.create(fields);
  const chunks = await all(
    await sdk().completions.create({ ...fields, stream: true, stream_options: { include_usage: true } }),
  );
  const text = chunks.filter((c) => c.choices.length).map((c) => c.choices[0].text).join("");
  assert.equal(text, whole.choices[0].text);
  assert.equal(chunks.at(-1).usage.completion_tokens, 20);
};

CASES.one_token = async () => {
  for (const limit of [{ max_tokens: 1 }, { max_completion_tokens: 1 }]) {
    const fields = { model, messages: ASK, ...limit };
    const answer = await sdk().chat.completions.create(fields);
    const chunks = await all(
      await sdk().chat.completions.create({ ...fields, stream: true, stream_options: { include_usage: true } }),
    );
    assert.equal(answer.choices[0].finish_reason, "length");
    assert.equal(answer.usage.completion_tokens, 1);
    assert.equal(chunks.at(-1).usage.completion_tokens, 1);
  }
};

CASES.prompt_logprobs_leave_the_service_up = async () => {
  const fields = { model, prompt: "One two three", max_tokens: 3 };
  const [first, ...others] = (await sdk().completions.create({ ...fields, prompt_logprobs: 2 })).choices[0].prompt_logprobs;
  assert.equal(first, null);
  assert.equal(others.length, 2);
  for (const place of others) {
    const ranks = Object.values(place).map((entry) => entry.rank);
    assert.ok(ranks.includes(1) && ranks.includes(2));
    assert.ok(Object.values(place).every((entry) => entry.logprob <= 0));
  }
  assert.equal((await sdk().completions.create(fields)).usage.completion_tokens, 3);
};

CASES.completions_echo = async () => {
  const fields = { model, prompt: "One two three", temperature: 0, logprobs: 2, echo: true };
  const alone = await sdk().completions.create({ ...fields, max_tokens: 0 });
  const whole = (await sdk().completions.create({ ...fields, max_tokens: 4 })).choices[0];
  const chunks = await all(await sdk().completions.create({ ...fields, max_tokens: 4, stream: true }));
  const again = (await sdk().completions.create({ ...fields, prompt: whole.text, max_tokens: 0 })).choices[0];
  const choice = alone.choices[0];
  assert.deepEqual([choice.text, choice.finish_reason], ["One two three", "length"]);
  assert.deepEqual([alone.usage.prompt_tokens, alone.usage.completion_tokens], [3, 0]);
  assert.deepEqual(choice.logprobs.tokens, ["One", " two", " three"]);
  assert.deepEqual(choice.logprobs.text_offset, [0, 3, 7]);
  assert.deepEqual([choice.logprobs.token_logprobs[0], choice.logprobs.top_logprobs[0]], [null, null]);
  assert.equal(whole.logprobs.tokens.join(""), whole.text);
  assert.deepEqual(again.logprobs.token_logprobs, whole.logprobs.token_logprobs);
  assert.equal(chunks.map((chunk) => chunk.choices[0].text).join(""), whole.text);
  const streamed = chunks.flatMap((chunk) => chunk.choices[0].logprobs?.token_logprobs ?? []);
  assert.deepEqual(streamed, whole.logprobs.token_logprobs);
};

CASES.models = async () => {
  const ids = (await all(sdk().models.list())).map((served) => served.id);
  assert.ok(ids.includes(model));
  const served = await sdk().models.retrieve(model);
  assert.deepEqual([served.object, served.max_model_len], ["model", 8192]);
  assert.equal((await raised(OpenAI.NotFoundError, sdk().models.retrieve("nothing"))).code, "model_not_found");
};

CASES.embeddings_say_what_to_do = async () => {
  for (const call of [
    () => sdk().embeddings.create({ model, input: "text" }),
    () => sdk().moderations.create({ input: "text" }),
    () => sdk().files.list(),
    () => sdk().responses.retrieve("resp_1"),
  ]) {
    const error = await raised(OpenAI.NotFoundError, call());
    assert.equal(error.code, "unsupported_endpoint");
    assert.match(error.message, /\/v1\/chat\/completions/);
  }
};

CASES.errors_400_name_the_field = async () => {
  const wrong = {
    temperature: { temperature: 9 },
    max_tokens: { max_tokens: 0 },
    top_logprobs: { top_logprobs: 2 },
    messages: { messages: [] },
    functions: { functions: [{ name: "f" }] },
    audio: { audio: { voice: "alloy", format: "wav" } },
  };
  for (const [param, fields] of Object.entries(wrong)) {
    const error = await raised(
      OpenAI.BadRequestError, sdk().chat.completions.create({ model, messages: ASK, ...fields }),
    );
    assert.deepEqual([error.param, error.type], [param, "invalid_request_error"]);
    assert.equal(typeof error.code, "string");
    assert.ok(error.requestID);
  }
  const suffix = await raised(
    OpenAI.BadRequestError, sdk().completions.create({ model, prompt: "a", suffix: "b" }),
  );
  assert.equal(suffix.param, "suffix");
  const long = await raised(
    OpenAI.BadRequestError, sdk().completions.create({ model, prompt: "word ".repeat(9000) }),
  );
  assert.equal(long.code, "context_length_exceeded");
};

CASES.errors_401_403_404 = async () => {
  const fields = { model, messages: ASK, max_tokens: 1 };
  const wrong = sdk("operator", { apiKey: "sk-wrong" });
  const unknown = await raised(OpenAI.AuthenticationError, wrong.chat.completions.create(fields));
  assert.equal(unknown.code, "invalid_api_key");
  await raised(OpenAI.PermissionDeniedError, sdk("narrow").chat.completions.create(fields));
  const error = await raised(
    OpenAI.NotFoundError, sdk().chat.completions.create({ ...fields, model: "nothing" }),
  );
  assert.deepEqual([error.code, error.param], ["model_not_found", "model"]);
};

CASES.error_429_says_when = async () => {
  const fields = { model, prompt: "a", max_tokens: 1 };
  const { response } = await sdk("limited").completions.create(fields).withResponse();
  assert.equal(response.headers.get("x-ratelimit-limit-requests"), "1");
  assert.equal(response.headers.get("x-ratelimit-remaining-requests"), "0");
  const error = await raised(OpenAI.RateLimitError, sdk("limited").completions.create(fields));
  assert.equal(error.code, "rate_limit_exceeded");
  const waitMs = Number(error.headers.get("retry-after-ms"));
  assert.ok(waitMs >= 1 && waitMs <= 61_000);
};

CASES.retries_wait_as_told = async () => {
  const fields = { model, prompt: "a", max_tokens: 400, ignore_eos: true };
  const client = sdk("single", { maxRetries: 30 });
  const running = await client.completions.create({ ...fields, stream: true });
  const began = performance.now();
  await client.completions.create({ ...fields, max_tokens: 1 });
  const tookMs = performance.now() - began;
  running.controller.abort();
  // One request at a time: the second is told to wait a second. The SDK's own first pause would be at most 0.5 s.
  assert.ok(tookMs >= 900, `${tookMs}`);
};

CASES.a_timeout_drops_the_work = async () => {
  await raised(
    OpenAI.APIConnectionTimeoutError,
    sdk("operator", { timeout: 700 }).completions.create({
      model, prompt: "dropped", max_tokens: 4000, ignore_eos: true,
    }),
  );
  const record = await ended(async () => (await get("/api/requests?limit=1")).requests[0]);
  assert.equal(record.status, "cancelled");
  assert.ok(record.usage.completion_tokens < 4000);
};

CASES.error_504_is_a_server_error = async () => {
  const error = await raised(
    OpenAI.InternalServerError,
    sdk().completions.create(
      { model, prompt: "late", max_tokens: 4 }, { headers: { "x-request-timeout": "0.0001" } },
    ),
  );
  assert.deepEqual([error.status, error.code], [504, "deadline_exceeded"]);
};

CASES.raw_answers_have_headers = async () => {
  const { data, response } = await sdk()
    .chat.completions.create({ model, messages: ASK, max_tokens: 1 })
    .withResponse();
  const streamed = await sdk()
    .chat.completions.create({ model, messages: ASK, max_tokens: 2, stream: true })
    .asResponse();
  assert.equal(response.headers.get("x-request-id"), data._request_id);
  assert.equal(response.headers.get("content-type"), "application/json");
  assert.match(streamed.headers.get("content-type"), /^text\/event-stream/);
  assert.ok((await streamed.text()).endsWith("data: [DONE]\n\n"));
};

CASES.a_stream_may_be_left = async () => {
  const { data: stream, request_id } = await sdk()
    .chat.completions.create({ model, messages: ASK, max_tokens: 2000, stream: true, ignore_eos: true })
    .withResponse();
  for await (const _chunk of stream) break;
  const record = await ended(() => get(`/api/requests/${request_id}`));
  assert.equal(record.status, "cancelled");
};

CASES.fifty_asynchronous_streams = async () => {
  const client = sdk();
  const one = async (number) => {
    const fields = { model, prompt: `${number} is`, seed: number, max_tokens: 12 };
    const chunks = await all(await client.completions.create({ ...fields, stream: true }));
    assert.ok(["stop", "length"].includes(chunks.at(-1).choices[0].finish_reason));
    return chunks.map((chunk) => chunk.choices[0].text).join("");
  };
  const together = await Promise.all(Array.from({ length: 50 }, (_, number) => one(number)));
  for (const number of [0, 17, 49]) assert.equal(await one(number), together[number]);
};

for (const [name, run] of Object.entries(CASES)) {
  const error = await run().then(() => null, (failure) => String(failure.stack).slice(0, 1000));
  console.log(JSON.stringify({ case: name, package: `npm ${VERSION}`, error }));
}
process.exit(0);
