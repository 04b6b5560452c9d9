"""The examples of docs/extending.md work as they stand there."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_rasft.config import RasftConfig, RolloutConfig, RunConfig
from megatron_rasft.config.verify import VerifyConfig
from megatron_rasft.machine import cpu_backend
from megatron_rasft.objective.families import OBJECTIVES
from megatron_rasft.objective.token_losses import PackedTokens, token_loss_sums
from megatron_rasft.training.refresh import sampling_params
from megatron_rasft.training.refresh_driver import RefreshDriver
from megatron_rasft.types import ProblemRow, Response, Rollout
from megatron_rasft.verify.pool import VerifierPool

cpu_backend.enable()

from megatron_rasft.weights import families  # noqa: E402
from megatron_rasft.weights.folder import HfFolder  # noqa: E402
from megatron_rasft.weights.loading import load_into  # noqa: E402
from tests import tiny_models  # noqa: E402
from tests.unit.training.stand_ins import STOP_IDS, PolicyOfNotes, refresh_of, response  # noqa: E402

PAGE = (Path(__file__).resolve().parents[2] / "docs/extending.md").read_text(encoding="utf-8")


def example(heading: str) -> str:
    """The Python code of a section."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return code


def test_objective_has_its_formula_and_its_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "focal.py"  # help texts are read from the source
    file.write_text(example("An objective"))
    monkeypatch.syspath_prepend(tmp_path)
    kind = __import__("focal").Focal
    monkeypatch.setitem(OBJECTIVES, kind.name, kind)
    assert RasftConfig.sections()["objective focal"].flag_fields() == {"objective_focal_power": 2.0}
    assert kind.docs()["objective_focal_power"]
    tokens = PackedTokens(
        logprobs=torch.tensor([-0.5, -1.0, -2.0, -9.0], dtype=torch.float64, requires_grad=True),
        loss_mask=torch.tensor([1, 1, 1, 0]),
        segment_ids=torch.tensor([0, 0, 1, 1]),
        num_segments=2,
        weights=torch.tensor([1.0, 0.5], dtype=torch.float64),
    )
    ours = token_loss_sums(tokens, kind(objective_focal_power=3.0))
    p = tokens.logprobs.detach().exp()
    expected = (torch.tensor([1.0, 1.0, 0.5]) * (1 - p[:3]) ** 3 * -tokens.logprobs.detach()[:3]).sum()
    assert ours.loss_sum.item() == pytest.approx(expected.item()) and ours.denominator == 3
    identity = [
        token_loss_sums(tokens, o).loss_sum for o in (kind(objective_focal_power=0.0), OBJECTIVES["sft"]())
    ]
    assert torch.equal(*identity)


def test_verifier_gives_partial_credit(tmp_path: Path) -> None:
    file = tmp_path / "fields.py"
    file.write_text(example("A verifier"))
    row: ProblemRow = {"problem": "p", "response": "r", "expected": {"a": 1, "b": 2}}
    texts = ['So {"a": 1, "b": 2}.', '{"a": 1, "b": 3}', "no object"]
    rollouts = [Rollout.of_text("p", text) for text in texts]
    with VerifierPool(VerifyConfig(verify_function=f"{file}:grade", verify_num_workers=1)) as pool:
        pool.verify(rollouts, {"p": row})
    assert [r.verdict for r in rollouts] == ["correct", "wrong", "unverifiable"]


@pytest.mark.usefixtures("one_process")
def test_family_computes_the_logits_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2 has these layers, so a Qwen2 folder with another name is a folder of the example's family."""
    space: dict[str, Any] = {}
    exec(example("A model family"), space)
    monkeypatch.setitem(families.FAMILIES, "AcmeForCausalLM", space["ACME"])
    path = tiny_models.write_folder("qwen2_one_group", tmp_path / "acme")
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    config["architectures"] = ["AcmeForCausalLM"]
    (path / "config.json").write_text(json.dumps(config))
    folder = HfFolder.open(path)
    chunks, offsets = tiny_models.build_chunks(folder, padded_vocab_size=128)
    load_into(chunks, folder, tp_rank=0, tp_size=1, layer_offsets=offsets)
    tokens = tiny_models.some_tokens()
    with torch.no_grad():
        expected = transformers.Qwen2ForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits
        got = chunks[0](tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
    assert (got[..., : expected.shape[-1]] - expected).abs().max() < 1e-5


def test_engine_serves_a_refresh() -> None:
    space: dict[str, Any] = {}
    exec(example("A rollout engine"), space)

    def respond(prompt_ids: list[int], seed: int) -> Response | None:
        return None if prompt_ids[1] == 0 else response(5, seed % 7, 9)

    rollout = RolloutConfig(rollout_engine="sglang", rollout_urls=["http://a:1"], rollout_num_samples=2)
    config = RasftConfig(run=RunConfig(rasft_refresh_interval=2), rollout=rollout)
    driver = RefreshDriver(
        config,
        refresh_of(config, total_steps=6),
        policy=PolicyOfNotes(),  # type: ignore[arg-type]
        servers=space["FunctionEngine"](respond),
        sampling=sampling_params(config, STOP_IDS, 64),
    )
    driver.start(0)
    choice = driver.choose_problems()
    driver.sync_weights(choice)
    groups = driver.sample(choice)
    driver.sample_ahead(choice)
    assert choice.sampled_ids and groups.keys() == set(choice.sampled_ids) - {"p0"}
    assert all(len(group.rollouts) == 2 for group in groups.values())
