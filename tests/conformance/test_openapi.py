"""Requests made from the OpenAPI document, as it allows and as it forbids, to every operation of a running service."""

import random
import secrets
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from jsonschema import Draft202012Validator
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from tests.conformance.conftest import MODEL, Administrator

CHECKS: list[Any] = [
    not_a_server_error,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.status_code_conformance,
]
TOKEN_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


def things_that_exist(administrator: Administrator) -> dict[str, Any]:
    """Values by the names that paths and bodies have for them: a tenant that may be suspended, a key that may be
    revoked; no worker, which would be drained."""
    tenant = "fuzzed-" + secrets.token_hex(4)
    administrator.post("/api/admin/tenants", id=tenant)
    key = administrator.post("/api/admin/keys", tenant_id=tenant, name="fuzzed")
    user = administrator.post(f"/api/admin/tenants/{tenant}/users", name="fuzzed")
    answer = administrator.post("/v1/completions", model=MODEL, prompt="a", max_tokens=1)
    return {
        "tenant_id": tenant,
        "key_id": key["id"],
        "user_id": user["id"],
        "request_id": answer["id"].replace("cmpl-", "req_"),
        "model_id": MODEL,
        "model": MODEL,
        "name": "fuzzed",
        "messages": [{"role": "user", "content": "hello"}],
        "input": "hello",
    }


class Sender:
    """Leads cases past the first refusal: to what exists here, with less that contradicts itself, to a soon end."""

    def __init__(self, administrator: Administrator, known: dict[str, Any], draw: random.Random) -> None:
        self._headers = {"authorization": f"Bearer {administrator.key}"}
        self._base_url, self._known, self._draw = administrator.url, known, draw

    def send(self, case: Case) -> Any:
        """The answer to the case."""
        self._lead(case.path_parameters)
        if isinstance(case.body, dict):
            if case.meta is not None and case.meta.generation.mode is GenerationMode.POSITIVE:
                required = case.operation.body[0].optimized_schema.get("required", [])
                self._drop_some(case.body, [name for name in case.body if name not in required])
                self._lead(case.body)
            if {"messages", "prompt", "input"} & set(case.body):
                end_soon(case.body)
        return case.call(base_url=self._base_url, headers=self._headers, timeout=30)

    def _lead(self, values: dict[str, Any]) -> None:
        for name in sorted(values.keys() & self._known.keys()):
            if self._draw.random() < 0.75:
                values[name] = self._known[name]

    def _drop_some(self, body: dict[str, Any], names: list[str]) -> None:
        for name in self._draw.sample(names, max(0, len(names) - self._draw.randint(0, 3))):
            del body[name]


def end_soon(body: dict[str, Any]) -> None:
    """A few tokens are enough."""
    for name in TOKEN_LIMITS:
        if type(body.get(name)) is int:
            body[name] = min(body[name], 3)
    if all(body.get(name) is None for name in TOKEN_LIMITS):
        body["max_output_tokens" if "input" in body else "max_tokens"] = 3


def without_keys(document: dict[str, Any]) -> dict[str, Any]:
    """The document as if no key were needed: the sender gives it, and keys have tests of their own."""
    del document["components"]["securitySchemes"]
    for operations in document["paths"].values():
        for operation in operations.values():
            operation.pop("security", None)
    return document


def body_validator(document: dict[str, Any], operation: Any) -> Draft202012Validator | None:
    """What says whether a body is as the document wants it, independent of who decodes it."""
    described = document["paths"][operation.path][operation.method].get("requestBody")
    if described is None:
        return None
    schema = described["content"]["application/json"]["schema"]
    return Draft202012Validator({**schema, "components": document["components"]})


def check(sender: Sender, validator: Draft202012Validator | None, statuses: Counter[int], case: Case) -> None:
    """Send the case; its answer must be as the document says, and no success when its body is not."""
    answer = sender.send(case)
    case.validate_response(answer, checks=CHECKS)
    if validator is not None and not validator.is_valid(case.body):
        assert answer.status_code >= 400, (case.body, answer.text)
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    statuses[answer.status_code] += 1


def try_all(strategy: Any, examine: Callable[[Case], None], *, num_examples: int, seed: int) -> None:
    """Examine that many cases of the strategy."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=num_examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(case=strategy)
    def run(case: Case) -> None:
        examine(case)

    run()


def fuzz(administrator: Administrator, *, num_examples: int, seed: int) -> dict[str, Counter[int]]:
    """Statuses by operation. Raises the first failed check, shrunk, with a command to repeat it."""
    document = without_keys(httpx.get(administrator.url + "/openapi.json", trust_env=False).json())
    known = things_that_exist(administrator)
    answers: dict[str, Counter[int]] = {}
    for result in schemathesis.openapi.from_dict(document).get_all_operations():
        operation = result.ok()
        validator = body_validator(document, operation)
        statuses = answers[operation.label] = Counter()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query):
                continue  # in a path any text is as good as another
            sender = Sender(administrator, known, random.Random(seed))
            examine = partial(check, sender, validator, statuses)
            try_all(operation.as_strategy(mode), examine, num_examples=num_examples, seed=seed)
    return answers


def report(answers: dict[str, Counter[int]]) -> None:
    total = sum(answers.values(), Counter())
    sys.stdout.write(f"{len(answers)} operations, {total.total()} requests: {dict(sorted(total.items()))}\n")
    for label, statuses in answers.items():
        sys.stdout.write(f"  {label}: {dict(sorted(statuses.items()))}\n")


def test_no_request_is_the_servers_fault(administrator: Administrator) -> None:
    answers = fuzz(administrator, num_examples=4, seed=1)
    report(answers)
    document = httpx.get(administrator.url + "/openapi.json", trust_env=False).json()
    assert sum(map(len, document["paths"].values())) == len(answers)
    assert {200, 201, 400, 404} <= set(sum(answers.values(), Counter()))


@pytest.mark.slow
def test_nor_are_many_requests(administrator: Administrator) -> None:
    report(fuzz(administrator, num_examples=60, seed=2))
    assert httpx.get(administrator.url + "/readyz", trust_env=False).status_code == 200
