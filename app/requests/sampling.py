"""From a client's sampling fields to what a worker gets."""

import secrets

from app.api.schemas import Sampling
from app.errors import InvalidRequestError
from app.requests.served import ServedModel
from engine.protocol import SamplingParams

MAX_STOPS = 4
_MASK = 2**64 - 1


def stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    """The stop strings. Raises InvalidRequestError for more than four, or an empty one."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MAX_STOPS:
        raise InvalidRequestError(f"stop: at most {MAX_STOPS} strings, got {len(stops)}", param="stop")
    if "" in stops:
        raise InvalidRequestError("stop: a stop string must not be empty", param="stop")
    return stops


def sampling_params(
    request: Sampling,
    model: ServedModel,
    *,
    max_tokens: int,
    logprobs: int | None,
    grammar: str | None = None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """Sampling of the first choice; a seed is drawn when none was given. Raises InvalidRequestError."""
    stop_token_ids = () if request.ignore_eos else model.entry.eos_token_ids
    logit_bias = request.logit_bias or {}
    outside = next((token for token in logit_bias if token >= model.entry.vocab_size), None)
    if outside is not None:
        raise InvalidRequestError(
            f"logit_bias: token id {outside} is outside the vocabulary of {model.entry.vocab_size}",
            param="logit_bias",
        )
    top_p = _or(request.top_p, 1.0)
    top_k = max(0, request.top_k or 0)
    if top_p == 0.0:  # an empty nucleus still holds the likeliest token
        top_p, top_k = 1.0, 1
    return SamplingParams(
        max_tokens=max_tokens,
        seed=secrets.randbits(63) if request.seed is None else request.seed & (2**63 - 1),
        temperature=_or(request.temperature, 1.0),
        top_p=top_p,
        top_k=top_k,
        min_p=_or(request.min_p, 0.0),
        presence_penalty=_or(request.presence_penalty, 0.0),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        logit_bias=logit_bias,
        stop_token_ids=(*stop_token_ids, *(request.stop_token_ids or ())),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=grammar,
    )


def choice_seed(seed: int, choice: int) -> int:
    """The seed of one of `n` choices: the request's own for the first, mixed (SplitMix64) for the others."""
    if choice == 0:
        return seed
    mixed = (seed + choice * 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return (mixed ^ (mixed >> 31)) >> 1


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
