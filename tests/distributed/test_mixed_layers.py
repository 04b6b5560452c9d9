"""Models whose layers differ train and sample the same in every layout, packed or not, over gloo.

qwen3_5 has gated delta nets. gemma3 has windows, two rotary bases, and norms behind attention and MLP. gpt_oss has windows, attention
sinks, and experts with biases.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.mixed_layers_worker import LAYOUTS, MODES, NEW_TOKENS, PROMPTS
from tests.distributed.ranks_harness import run_ranks
from tests.tiny_models import hf_model, write_folder

NEAR_TIE = 1e-5


RUNS = [(case, layout) for case, layouts in LAYOUTS.items() for layout in layouts]

Results = Callable[[str], dict[str, dict[str, Any]]]
"""Case -> layout -> name -> result."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    @cache
    def run(case: str) -> dict[str, dict[str, Any]]:
        root = tmp_path_factory.mktemp("mixed_layers") / case
        write_folder(case, root / "model")
        run_ranks(Path(__file__).with_name("mixed_layers_worker.py"), 2, root)
        made: dict[str, dict[str, Any]] = torch.load(root / "results.pt")
        return made

    return run


@pytest.mark.parametrize(("case", "layout"), RUNS)
def test_every_layout_trains_the_same(results: Results, case: str, layout: str) -> None:
    """The step shows every gradient, also those of norms whose heads are split over ranks."""
    found, expected = results(case)[layout], results(case)["dp2"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    for name, tensor in expected["weights"].items():
        gap = (found["weights"][name] - tensor).abs().max().item()
        assert gap < 2e-5, f"{name} differs by {gap}"


@pytest.mark.parametrize(("case", "layout"), RUNS)
@pytest.mark.parametrize("mode", MODES)
def test_every_layout_samples_the_same(results: Results, case: str, layout: str, mode: str) -> None:
    expected = results(case)["dp2"]["nucleus" if mode == "few rows" else mode]
    for mine, theirs in zip(results(case)[layout][mode], expected, strict=True):
        assert [ids for ids, _ in mine] == [ids for ids, _ in theirs]
        for (_, logprobs), (_, others) in zip(mine, theirs, strict=True):
            assert logprobs == pytest.approx(others, abs=1e-4)


@pytest.mark.parametrize(("case", "layout"), RUNS)
def test_scoring_of_packed_samples_gives_the_logprobs_of_sampling(
    results: Results, case: str, layout: str
) -> None:
    """Sampling has one sequence per row, so a state that leaks between packed sequences shows here."""
    sampled = [logprobs for group in results(case)[layout]["few rows"] for _, logprobs in group]
    for mine, scored in zip(sampled, results(case)[layout]["scores"], strict=True):
        assert mine == pytest.approx(scored, abs=1e-4)


@pytest.mark.parametrize("case", LAYOUTS)
def test_greedy_sampling_returns_the_tokens_of_transformers(results: Results, case: str) -> None:
    model = hf_model(case)
    for prompt, ((found, logprobs),) in zip(PROMPTS, results(case)["dp2"]["greedy"], strict=True):
        assert len(found) == NEW_TOKENS
        with torch.no_grad():
            logits = model(torch.tensor([prompt + found])).logits[0, len(prompt) - 1 : -1]
        gaps = logits.amax(-1) - logits[torch.arange(NEW_TOKENS), found]
        assert (gaps < NEAR_TIE).all(), f"a token of {prompt} is not the most likely one"
        expected = logits.log_softmax(-1)[torch.arange(NEW_TOKENS), found]
        assert logprobs == pytest.approx(expected.tolist(), abs=1e-4)
