"""What is said of paths that are not served: of OpenAI's other endpoints, why, and what there is instead (pure)."""

from app.errors import GatewayError, NotFoundError

TEXT_ENDPOINTS = "/v1/chat/completions, /v1/completions, /v1/responses and /v1/models"
_OTHER_OUTPUT = "the models here read and write text"
_NOTHING_KEPT = "nothing that a client sends is kept here"
_WHY = {
    "embeddings": "the models here write text and have no embeddings of it",
    "moderations": "there is no classifier here",
    "audio": _OTHER_OUTPUT,
    "images": _OTHER_OUTPUT,
    "videos": _OTHER_OUTPUT,
    "realtime": _OTHER_OUTPUT,
    "rerank": "there is no ranking model here",
    "score": "there is no ranking model here",
    "files": _NOTHING_KEPT,
    "uploads": _NOTHING_KEPT,
    "vector_stores": _NOTHING_KEPT,
    "containers": _NOTHING_KEPT,
    "batches": f"{_NOTHING_KEPT}; send the requests themselves, as many at once as you like",
    "fine_tuning": "models are served as they are",
    "assistants": f"{_NOTHING_KEPT}; send the whole conversation each time",
    "threads": f"{_NOTHING_KEPT}; send the whole conversation each time",
    "conversations": f"{_NOTHING_KEPT}; send the whole conversation each time",
    "evals": "there is no evaluation service here",
}
"""First part of a path under /v1, of OpenAI's API and its usual extensions, to why it is not served."""
KEPT_ANSWERS = ("/v1/responses/", "/v1/chat/completions/")


def not_served(method: str, path: str) -> GatewayError:
    """The error of a path that no route has."""
    first = path.removeprefix("/v1/").partition("/")[0] if path.startswith("/v1/") else ""
    why = _WHY.get(first)
    if path.startswith(KEPT_ANSWERS):
        why = "answers are not kept, so that none can be looked up, changed or deleted"
    if why is not None:
        return NotFoundError(
            f"{path} is not served: {why}. Served are {TEXT_ENDPOINTS}", code="unsupported_endpoint"
        )
    return NotFoundError(
        f"there is no {method} {path} here; GET /openapi.json has what there is", code="unknown_url"
    )
