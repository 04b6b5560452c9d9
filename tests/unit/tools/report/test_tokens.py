"""Tokens of the examples have the weight that the loss of RASFT gives them."""

import base64
import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rasft.tools.report.records import read_run
from megatron_rasft.tools.report.rollouts import Sample, pick_examples, read_statistics
from megatron_rasft.tools.report.tokens import MAX_TOKENS, TokenView, read_tokens, tokens_of
from megatron_rasft.training.reference import LogprobCache, initial_fingerprint, logprobs_fingerprint
from megatron_rasft.types import TrainingSample
from tests.tiny_policy import write_model
from tests.unit.tools.report.synthetic import write_run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Path:
    """A run with config.json, whose tokens are in the model's vocabulary."""
    folder = write_run(tmp_path / "run", max_tokens=15)
    configure(folder, model)
    return folder


def configure(folder: Path, model: Path, **objective: Any) -> None:
    sections = {"objective": {"objective": "rasft", **objective}, "run": {"hf_model": str(model)}}
    (folder / "config.json").write_text(
        json.dumps({"rasft": sections, "megatron": {"params_dtype": "torch.float32", "fp8": "None"}})
    )


def tokens_and_samples(run: Path, reference: Path | None = None) -> tuple[TokenView, list[Sample]]:
    records, store = read_run(run), run / "rollouts.jsonl"
    examples = pick_examples(store, read_statistics(store).histories(), 3)
    samples = [sample for example in examples for sample in example.samples]
    return read_tokens(records, examples, None, reference), samples


def store_reference(run: Path, model: Path, logprob: float) -> None:
    """Writes the run's cache of reference log-probabilities, with one value for all tokens."""
    fingerprint = logprobs_fingerprint(
        initial_fingerprint(model, None), torch.float32, None, None, is_scaled=False
    )
    lines = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    samples = [
        TrainingSample(
            problem_id="", kind="rollout", prompt_ids=r["prompt_ids"], response_ids=r["response_ids"], weight=1.0
        )
        for r in lines
    ]  # fmt: skip
    cache = LogprobCache(run / "ref_logprobs.sqlite", fingerprint)
    cache.add(samples, [[logprob] * len(sample.response_ids) for sample in samples])


def test_stored_log_probabilities_give_ratio_times_weight_times_p(run: Path, model: Path) -> None:
    store_reference(run, model, -0.7)
    view, samples = tokens_and_samples(run)
    assert view.formula == "ratio × weight × p" and view.notes == []
    assert any(sample.weight for sample in samples)
    for sample in samples:
        tokens = view.tokens[id(sample)]
        assert len(tokens) == len(sample.response_ids)
        expected = math.exp(-0.7 + 0.5) * sample.weight * math.exp(-0.5)
        assert [token.weight for token in tokens] == pytest.approx([expected] * len(tokens), rel=1e-5)
    assert view.largest == pytest.approx(math.exp(-0.7) * 0.1, rel=1e-5)


def test_reference_model_gives_the_ratios_that_are_not_stored(run: Path, model: Path) -> None:
    configure(run, model, objective_ratio_clip_low=0.0)
    view, samples = tokens_and_samples(run, model)
    assert view.formula == "ratio × weight × p" and view.notes == []
    scorer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    for sample in filter(lambda sample: sample.weight, samples):
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        with torch.no_grad():
            logprobs = scorer(ids).logits[0].log_softmax(-1)
        place = len(sample.prompt_ids) - 1
        mean = sum(float(logprobs[place + i, t]) for i, t in enumerate(sample.response_ids)) / len(
            sample.response_ids
        )
        expected = math.exp(mean + 0.5) * sample.weight * math.exp(-0.5)
        assert view.tokens[id(sample)][0].weight == pytest.approx(expected, rel=1e-4)


def test_page_says_which_factors_are_unknown(run: Path, model: Path) -> None:
    view, samples = tokens_and_samples(run)
    assert view.formula == "weight × p" and "--reference-model" in view.notes[0]
    for sample in samples:
        expected = sample.weight * math.exp(-0.5)
        assert [t.weight for t in view.tokens[id(sample)]] == pytest.approx(
            [expected] * len(sample.response_ids), rel=1e-5
        )
    configure(run, run / "gone")
    view, _ = tokens_and_samples(run)
    assert view.tokens == {} and "--tokenizer" in view.notes[0]


def test_objective_without_a_ratio_needs_no_reference(run: Path, model: Path) -> None:
    configure(run, model, objective_ratio="off")
    view, _ = tokens_and_samples(run)
    assert view.formula == "weight × p" and view.notes == []


@pytest.mark.parametrize("flag", ["tokenizer", "reference"])
def test_unusable_folder_is_named_with_its_flag(run: Path, tmp_path: Path, flag: str) -> None:
    store = run / "rollouts.jsonl"
    examples = pick_examples(store, read_statistics(store).histories(), 3)
    folders = {"tokenizer": None, "reference": None} | {flag: tmp_path}
    with pytest.raises(ValueError, match=rf"--{flag}.*{tmp_path.name}"):
        read_tokens(read_run(run), examples, **folders)


def test_tokens_that_share_a_character_are_one() -> None:
    written = [b"a", b" ", "é".encode()[:1], "é".encode()[1:], b"b"]

    def decode(ids: Sequence[int]) -> str:
        return b"".join(written[i] for i in ids).decode(errors="replace")

    sample = Sample(
        0, 0, "correct", "", "stop", "", 1.0, 0, 5, "a éb", response_ids=range(5), logprobs=[0.0] * 5
    )
    tokens = list(tokens_of(sample, [1.0, 2.0, 3.0, 4.0, 5.0], decode))
    assert [(token.text, token.weight) for token in tokens] == [("a", 1), (" ", 2), ("é", 4), ("b", 5)]
    long = Sample(
        0, 0, "correct", "", "stop", "", 1.0, 0, 9, "", response_ids=[0] * 9999, logprobs=[0.0] * 9999
    )
    assert len(list(tokens_of(long, [1.0] * 9999, decode))) == MAX_TOKENS


def test_packed_tokens_are_text_p_and_weight(run: Path, model: Path) -> None:
    view, samples = tokens_and_samples(run)
    rows = json.loads(zlib.decompress(base64.b64decode(view.packed(samples[0]) or "")))
    assert [row[0] for row in rows] == [token.text for token in view.tokens[id(samples[0])]]
    assert {row[1] for row in rows} == {0.6065}
