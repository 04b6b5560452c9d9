"""Checks the answers of SGLang's /generate: an answer is used only if it is completely consistent with the request."""

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from megatron_rasft.errors import ServerError
from megatron_rasft.servers.client import ServerClient
from megatron_rasft.types import FinishReason

_NUM_CHECK_TOKENS = 8
_LARGEST_LOGPROB = 1e-3
"""Largest accepted log-probability, nats. Rounding can make that of an almost certain token slightly positive."""


class Fault(Exception):
    """One request for a sample failed.

    Args:
        reason: a sentence without its subject, which is the server's address.
        is_grave: whether the server is quarantined at once.
        is_refusal: whether a healthy server refuses this request.
        backoff_s: set if the server was full: seconds until it should get the next request.
    """

    def __init__(
        self, reason: str, *, is_grave: bool = False, is_refusal: bool = False, backoff_s: float | None = None
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.is_grave = is_grave
        self.is_refusal = is_refusal
        self.backoff_s = backoff_s


class Part(NamedTuple):
    """The tokens of one answer: a complete response, or a part of a response whose request was aborted."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason


def parse_answer(
    content: bytes, *, prompt_len: int, max_new_tokens: int, vocab_size: int | None, label: str
) -> Part:
    """Returns the tokens of an answer of /generate after checking all of it.

    Args:
        prompt_len: number of tokens that were sent.
        label: the weight label that the server must report.

    Raises:
        Fault: a grave one if the answer contains something impossible, because then no answer of the server can be trusted.
    """
    answer = json_object(content)
    if answer is None:
        raise Fault(f"answered with {len(content)} bytes that are not a JSON object", is_grave=True)
    try:
        meta = answer["meta_info"]
        reason = meta["finish_reason"]["type"]
        if reason == "abort" and not answer.get("output_ids"):
            return Part([], [], "abort")
        tokens = answer["output_ids"]
        entries = meta["output_token_logprobs"]
        prompt_tokens = meta["prompt_tokens"]
        # Newer servers report which weights produced which tokens. All of these spans are checked.
        spans = [str(span["version"]) for span in meta.get("weight_versions") or []]
    except (KeyError, TypeError, ValueError) as error:
        raise Fault(f"answered without a requested field ({error!r})", is_grave=True) from error
    if reason not in ("stop", "length", "abort"):
        raise Fault(f"returned the finish reason {reason!r}", is_grave=True)
    if prompt_tokens != prompt_len:
        raise Fault(f"counted {prompt_tokens} prompt tokens, but {prompt_len} were sent", is_grave=True)
    _check_tokens(tokens, max_new_tokens, vocab_size)
    logprobs = _checked_logprobs(tokens, entries)
    for version in spans or [str(meta.get("weight_version", label))]:
        if version != label:
            raise Fault(other_weights(version, label), is_grave=True)
    return Part(tokens, logprobs, reason)


def _check_tokens(tokens: Any, max_new_tokens: int, vocab_size: int | None) -> None:
    if not isinstance(tokens, list) or not 0 < len(tokens) <= max_new_tokens:
        raise Fault(f"did not return a list of 1 to {max_new_tokens} tokens", is_grave=True)
    for token in tokens:
        if type(token) is not int or token < 0 or (vocab_size is not None and token >= vocab_size):
            raise Fault(f"returned token {token!r}, outside the vocabulary of {vocab_size}", is_grave=True)


def _checked_logprobs(tokens: list[int], entries: Any) -> list[float]:
    """Returns the log-probability of each token from SGLang's [log-probability, token, text] entries."""
    if not isinstance(entries, list) or len(entries) != len(tokens):
        raise Fault("returned different numbers of tokens and log-probabilities", is_grave=True)
    logprobs = []
    for token, entry in zip(tokens, entries, strict=True):
        if not isinstance(entry, list) or len(entry) < 2 or entry[1] != token:
            raise Fault(f"returned the log-probability of another token than {token}", is_grave=True)
        value = entry[0]
        # larger integers would lose digits, or overflow, as a float
        is_number = isinstance(value, float) or (type(value) is int and abs(value) < 2**53)
        if not is_number or not math.isfinite(value) or value > _LARGEST_LOGPROB:
            raise Fault(f"returned {value!r} as the log-probability of token {token}", is_grave=True)
        logprobs.append(min(0.0, float(value)))
    return logprobs


def other_weights(label: str, wanted: str) -> str:
    """Returns the reason of a fault: the server's weights are not those that it was sent."""
    return f"has the weights {label!r}, not those of step {wanted} (was it restarted?)"


def json_object(content: bytes) -> dict[str, Any] | None:
    """Returns a JSON object; None if the content is anything else."""
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):  # RecursionError: too many nested brackets
        return None
    return answer if isinstance(answer, dict) else None


def quoted_error(content: bytes) -> str:
    """Returns the error message of an answer, or its beginning if there is no such message, in one line."""
    error = (json_object(content) or {}).get("error")
    message = error.get("message") if isinstance(error, dict) else None
    text = message or content.decode("utf-8", errors="replace") or "nothing"
    return " ".join(str(text).split())[:300]


def check_generation(client: ServerClient, vocab_size: int) -> int:
    """Makes a server generate a few tokens, and checks the answer like a rollout's.

    Returns:
        The number of tokens.

    Raises:
        ServerError: the answer cannot be used; the message says why.
    """
    label = client.weight_label()
    prompt: Sequence[int] = [0]
    body = {
        "input_ids": prompt,
        "sampling_params": {"max_new_tokens": _NUM_CHECK_TOKENS, "temperature": 1.0},
        "return_logprob": True,
    }
    answer = client.generate(body)
    try:
        part = parse_answer(
            json.dumps(answer).encode(),
            prompt_len=len(prompt),
            max_new_tokens=_NUM_CHECK_TOKENS,
            vocab_size=vocab_size,
            label=label,
        )
    except Fault as fault:
        raise ServerError(client.url, fault.reason) from fault
    if part.finish_reason == "abort":
        raise ServerError(client.url, "aborted a generation: does another run use it?")
    return len(part.token_ids)
