"""Models whose layers differ train and sample the same in every layout, packed or not, over gloo.

qwen3_5 has gated delta nets. gemma3 has windows, two rotary bases, and norms behind attention and MLP.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.mixed_layers_worker import LAYOUTS, MODES, NEW_TOKENS, PROMPTS
from tests.distributed.ranks_harness import run_ranks
from tests.tiny_models import hf_model, write_folder

NEAR_TIE = 1e-5


@pytest.fixture(scope="module", params=["qwen3_5", "gemma3"])
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def results(case: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp(case)
    write_folder(case, root / "model")
    run_ranks(Path(__file__).with_name("mixed_layers_worker.py"), 2, root)
    return torch.load(root / "results.pt")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_the_same(results: dict[str, dict[str, Any]], layout: str) -> None:
    """The step shows every gradient, also those of norms whose heads are split over ranks."""
    found, expected = results[layout], results["dp2"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    for name, tensor in expected["weights"].items():
        gap = (found["weights"][name] - tensor).abs().max().item()
        assert gap < 2e-5, f"{name} differs by {gap}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_every_layout_samples_the_same(results: dict[str, dict[str, Any]], layout: str, mode: str) -> None:
    expected = results["dp2"]["nucleus" if mode == "few rows" else mode]
    for mine, theirs in zip(results[layout][mode], expected, strict=True):
        assert [ids for ids, _ in mine] == [ids for ids, _ in theirs]
        for (_, logprobs), (_, others) in zip(mine, theirs, strict=True):
            assert logprobs == pytest.approx(others, abs=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scoring_of_packed_samples_gives_the_logprobs_of_sampling(
    results: dict[str, dict[str, Any]], layout: str
) -> None:
    """Sampling has one sequence per row, so a state that leaks between packed sequences shows here."""
    sampled = [logprobs for group in results[layout]["few rows"] for _, logprobs in group]
    for mine, scored in zip(sampled, results[layout]["scores"], strict=True):
        assert mine == pytest.approx(scored, abs=1e-4)


def test_greedy_sampling_returns_the_tokens_of_transformers(
    case: str, results: dict[str, dict[str, Any]]
) -> None:
    model = hf_model(case)
    for prompt, ((found, logprobs),) in zip(PROMPTS, results["dp2"]["greedy"], strict=True):
        assert len(found) == NEW_TOKENS
        with torch.no_grad():
            logits = model(torch.tensor([prompt + found])).logits[0, len(prompt) - 1 : -1]
        gaps = logits.amax(-1) - logits[torch.arange(NEW_TOKENS), found]
        assert (gaps < NEAR_TIE).all(), f"a token of {prompt} is not the most likely one"
        expected = logits.log_softmax(-1)[torch.arange(NEW_TOKENS), found]
        assert logprobs == pytest.approx(expected.tolist(), abs=1e-4)
