"""Compares a rollout server with the trainer after a weight sync: both compute the log-probabilities of a few demonstrations."""

import sys
from collections.abc import Sequence

from megatron_rasft.errors import ServerError
from megatron_rasft.servers.record import ServerRecord
from megatron_rasft.types import TrainingSample

_RESERVED_TOKENS = 8
"""Tokens of a server's context that a probe does not use. SGLang needs 6 of them (max_req_input_len in srt/managers)."""


def logprob_gap(
    server: ServerRecord, probes: Sequence[TrainingSample], expected: Sequence[Sequence[float]]
) -> float | str:
    """Returns the mean absolute difference between the server's and the trainer's log-probabilities, nats per token.

    Both compute them at temperature 1: SGLang divides the logits of sampled tokens by the temperature, but not those of a
    prompt, and a probe's response is sent as a part of the prompt. If the server's context is too short for a response, its
    beginning is compared.

    Args:
        expected: the trainer's log-probabilities of each probe's response, nats.

    Returns:
        The difference (0 without probes), or the reason why the server cannot be compared.
    """
    total, count = 0.0, 0
    context = _context_tokens(server)
    for probe, logprobs in zip(probes, expected, strict=True):
        num = max(0, min(len(logprobs), context - _RESERVED_TOKENS - len(probe.prompt_ids)))
        if not num:
            continue
        found = _server_logprobs(server, probe, num)
        if isinstance(found, str):
            return found
        total += sum(abs(a - b) for a, b in zip(found, logprobs[:num], strict=True))
        count += num
    if probes and not count:
        return f"has a context of {context} tokens, too short for {len(probes)} demonstrations"
    return total / max(1, count)


def _server_logprobs(server: ServerRecord, probe: TrainingSample, num: int) -> list[float] | str:
    """Returns the server's log-probabilities of a response's first ``num`` tokens, or the reason why it gave none."""
    response_ids = list(probe.response_ids[:num])
    body = {
        "input_ids": [*probe.prompt_ids, *response_ids],
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    try:
        entries = server.client.generate(body)["meta_info"]["input_token_logprobs"]
        entries = entries[len(entries) - num :]
        logprobs = [float(entry[0]) for entry in entries]
        ids = [int(entry[1]) for entry in entries]
    except ServerError as error:
        return error.reason
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        return f"returned no log-probabilities of a probe ({error!r})"
    return (
        logprobs
        if ids == response_ids
        else "returned log-probabilities of tokens that differ from the probe's"
    )


def _context_tokens(server: ServerRecord) -> int:
    """Returns the longest prompt plus response that a server takes: the smaller of its context and its KV cache, if known."""
    info = server.known_info
    of_model = info.context_length or (info.model_config or {}).get("max_position_embeddings")
    return min(limit for limit in (of_model, info.max_total_tokens, sys.maxsize) if limit)
