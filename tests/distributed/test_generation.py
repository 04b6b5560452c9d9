"""Sampling from the trainer's weights: equal to transformers, equal in every layout, and without effect on training."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import forking
from tests.distributed.generation_worker import (
    LAYOUTS,
    LENGTH,
    MODES,
    NEW_TOKENS,
    NUM_SAMPLES,
    PROMPTS,
    STOP_IDS,
    modes_of,
)
from tests.distributed.parity_cases import VOCAB_SIZE
from tests.distributed.ranks_harness import run_ranks
from tests.recorded_graphs import FREE_BYTES
from tests.tiny_models import hf_model, write_folder

NEAR_TIE = 1e-5
"""Greedy choices may differ from transformers' if the two best logits (after the penalty) are closer than this."""

LAYOUT_NAMES = [layout for layouts in LAYOUTS.values() for layout in layouts]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("generation")
    write_folder("llama", root / "llama")
    found: dict[str, dict[str, Any]] = {}
    for world_size in LAYOUTS:
        run_ranks(Path(__file__).with_name("generation_worker.py"), world_size, root)
        found |= torch.load(root / f"generation{world_size}.pt")
    return found


@pytest.mark.parametrize(
    ("layout", "mode"), [(layout, mode) for layout in LAYOUT_NAMES for mode in modes_of(layout)]
)
def test_every_layout_samples_the_same(results: dict[str, dict[str, Any]], layout: str, mode: str) -> None:
    as_plain = mode in ("small batches", "rare looks", "as on a GPU")
    expected = results["one"]["plain" if as_plain else mode]
    for mine, theirs in zip(results[layout][mode], expected, strict=True):
        assert [r[0] for r in mine] == [r[0] for r in theirs]
        assert [r[2] for r in mine] == [r[2] for r in theirs]
        for response, other in zip(mine, theirs, strict=True):
            assert response[1] == pytest.approx(other[1], abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_a_replica_without_a_request_waits_for_the_others(
    results: dict[str, dict[str, Any]], layout: str
) -> None:
    (group,) = results[layout]["lone request"]
    assert [r[0] for r in group] == [r[0] for r in results["one"]["greedy"][0]]


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_decode_steps_are_captured_unless_there_is_a_pipeline(
    results: dict[str, dict[str, Any]], layout: str
) -> None:
    num_captured, num_replayed = results[layout]["graphs"]
    if layout.startswith("pp2"):
        assert num_captured == num_replayed == 0
    else:
        assert 0 < num_captured < num_replayed


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_the_cache_is_freed_before_training_continues(
    results: dict[str, dict[str, Any]], layout: str
) -> None:
    assert results[layout]["caches left"] == 0


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_the_number_of_rows_follows_from_the_memory_of_the_fullest_rank(
    results: dict[str, dict[str, Any]], layout: str
) -> None:
    config = hf_model("llama").config
    tp = 2 if layout.startswith("tp2") else 1
    layers = config.num_hidden_layers // (2 if layout.startswith("pp2") else 1)
    groups = (4 if "groups added" in layout else config.num_key_value_heads) // tp
    dim = config.hidden_size // config.num_attention_heads
    # fp32 keys and values, and 48 bytes for each entry of a row's logits
    row_bytes = 2 * 4 * layers * groups * dim * LENGTH + 48 * VOCAB_SIZE
    num = results[layout]["rows from memory"]
    assert num == 2 ** int(math.log2(0.8 * FREE_BYTES / row_bytes)) > 1


def test_every_layout_stops_if_one_rank_gets_the_stop_request(results: dict[str, dict[str, Any]]) -> None:
    assert set(results) == set(LAYOUT_NAMES)
    assert all(result["stopped"] == [True, True] for result in results.values())


@pytest.mark.parametrize("mode", ["greedy", "penalised"])
def test_greedy_sampling_returns_the_tokens_of_transformers(
    results: dict[str, dict[str, Any]], mode: str
) -> None:
    model, penalty = hf_model("llama"), MODES[mode].repetition_penalty
    for prompt, group in zip(PROMPTS, results["one"][mode], strict=True):
        (found, logprobs, is_finished) = group[0]
        assert len(found) == NEW_TOKENS and not is_finished
        with torch.no_grad():
            made = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                eos_token_id=None,
                pad_token_id=0,
                repetition_penalty=penalty,
            )[0, len(prompt) :].tolist()
        if found != made:
            place = next(i for i, (a, b) in enumerate(zip(found, made, strict=True)) if a != b)
            logits = next_logits(model, prompt + found[:place], penalty)
            assert abs(float(logits[found[place]] - logits[made[place]])) < NEAR_TIE, (
                f"token {place} of {prompt}"
            )
        for place in (0, 1, NEW_TOKENS - 1):
            logits = next_logits(model, prompt + found[:place], penalty)
            expected = float(torch.log_softmax(logits, -1)[found[place]])
            assert logprobs[place] == pytest.approx(expected, abs=1e-5)


def next_logits(model: Any, ids: list[int], penalty: float) -> torch.Tensor:
    """[v] logits of transformers' model after ``ids``, with the repetition penalty for tokens that occur in ``ids``."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1].clone()
    for token in set(ids):
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    return logits


def test_responses_end_at_the_first_stop_id(results: dict[str, dict[str, Any]]) -> None:
    groups = results["one"]["plain"]
    assert [len(group) for group in groups] == [NUM_SAMPLES] * len(PROMPTS)
    responses = [response for group in groups for response in group]
    for tokens, logprobs, is_finished in responses:
        assert len(tokens) == len(logprobs)
        assert not STOP_IDS & set(tokens[:-1])
        assert is_finished == (tokens[-1] in STOP_IDS)
        assert is_finished or len(tokens) == NEW_TOKENS
        assert max(tokens) < VOCAB_SIZE
    assert len({len(tokens) for tokens, _, _ in responses}) > 3, "the rows must end at different steps"
    assert len({tuple(tokens) for tokens, _, _ in responses}) > len(PROMPTS), (
        "different seeds must give different responses"
    )


def test_each_prompt_has_its_own_limit(results: dict[str, dict[str, Any]]) -> None:
    """A long prompt must not shorten the responses to shorter prompts of the same batch."""
    limit = MODES["little room"].max_total_tokens
    assert limit is not None
    for prompt, cut, whole in zip(
        PROMPTS, results["one"]["little room"], results["one"]["plain"], strict=True
    ):
        num_left = limit - len(prompt)
        assert [r[0] for r in cut] == [r[0][:num_left] for r in whole]
        assert [r[2] for r in cut] == [r[2] and len(r[0]) <= num_left for r in whole]


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_returned_logprobs_equal_those_of_scoring(results: dict[str, dict[str, Any]], layout: str) -> None:
    given = [response[1] for group in results[layout]["plain"] for response in group]
    for mine, scored in zip(given, results[layout]["scores"], strict=True):
        assert mine == pytest.approx(scored, abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_scores_do_not_depend_on_the_number_of_samples_scored_at_once(
    results: dict[str, dict[str, Any]], layout: str
) -> None:
    found, expected = results[layout]["scores in parts"], results[layout]["scores"]
    assert len(found) > 8
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_every_layout_refreshes_the_same(results: dict[str, dict[str, Any]], layout: str) -> None:
    expected = results["one"]["refresh"]
    assert len(expected) > len(PROMPTS)
    for (ids, weight, ref, old), theirs in zip(results[layout]["refresh"], expected, strict=True):
        assert (ids, weight) == theirs[:2]
        assert ref == old == pytest.approx(theirs[3], abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_a_step_after_generation_is_the_step_without(results: dict[str, dict[str, Any]], layout: str) -> None:
    assert results[layout]["step"] == results[layout]["step without generation"]


def test_kernels_and_traffic_of_a_decode_step_allow_the_required_speed(tmp_path: Path) -> None:
    """Counts do not depend on the machine. The speed estimated from them must exceed the requirement by half, because the
    estimate omits some costs."""
    figures = tmp_path / "figures.json"
    program = forking.REPOSITORY / "benchmarks" / "generation.py"
    flags = ["--shape", "qwen2.5-1.5b", "--rows", "256", "--bf16", "--json", str(figures)]
    rank = forking.Rank(program=program, arguments=flags, log=tmp_path / "log", variables={})
    outcome = forking.run([rank], timeout_s=900)
    assert outcome.codes == [0], outcome.output
    counted = json.loads(figures.read_text())["counted"]
    assert counted["host_reads_per_token_of_all_rows"] <= 1 / 8
    # Weights, and keys and values of 768 tokens per row, are read once. Activations are small in comparison.
    least_gb = (2 * 1.54e9 + 256 * 768 * 28 * 2 * 2 * 2 * 128) / 1e9
    assert least_gb < counted["gb_of_the_model"] < 1.6 * least_gb
    assert counted["ESTIMATE_h100_tokens_per_s"] > 1.5 * counted["bar_h100_tokens_per_s"]
