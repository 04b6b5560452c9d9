"""The cache returns the stored log-probabilities; the reference leaves the policy's weights unchanged."""

import contextlib
import math
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rasft.errors import RasftError
from megatron_rasft.training import reference
from megatron_rasft.training.reference import FrozenReference, LogprobCache
from megatron_rasft.types import TrainingSample
from megatron_rasft.weights.folder import checkpoint_fingerprint, weights_fingerprint


def a_sample(prompt: list[int], response: list[int], weight: float = 1.0) -> TrainingSample:
    return TrainingSample(
        problem_id="p", kind="demonstration", prompt_ids=prompt, response_ids=response, weight=weight
    )


def test_cache_returns_exact_values_also_after_reopening(tmp_path: Path) -> None:
    values = [float(np.float32(v)) for v in (-math.pi, -1e-40, -0.1, -0.0, -math.inf)]
    cache = LogprobCache(tmp_path / "deep" / "cache.sqlite", "model")
    sample = a_sample([1, 2], [3, 4, 5, 6, 7])
    assert cache.fill([sample]) == [sample]
    cache.add([sample], [values])
    assert sample.ref_logprobs is None, "add stores, fill sets"
    again = a_sample([1, 2], [3, 4, 5, 6, 7], weight=0.25)
    assert LogprobCache(tmp_path / "deep" / "cache.sqlite", "model").fill([again]) == []
    assert again.ref_logprobs is not None
    assert [v.hex() for v in again.ref_logprobs] == [v.hex() for v in values]


def test_the_cache_distinguishes_samples_and_models(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    cache = LogprobCache(path, "model")
    cache.add([a_sample([1, 2], [3])], [[-1.0]])
    others = [a_sample([1], [2, 3]), a_sample([1, 2], [3, 0]), a_sample([2, 1], [3])]
    assert cache.fill(others) == others
    assert all(sample.ref_logprobs is None for sample in others)
    same = a_sample([1, 2], [3])
    assert LogprobCache(path, "another model").fill([same]) == [same]
    assert cache.fill([same]) == []


def test_an_array_is_found_by_the_list_it_equals() -> None:
    cache = LogprobCache(None, "model")
    cache.add([a_sample([1, 2], [3])], [[-0.5]])
    ids = memoryview(np.array([1, 2, 3], np.int32))
    assert cache.fill([a_sample(ids[:2], ids[2:])]) == []  # type: ignore[arg-type]


def test_samples_with_the_same_tokens_are_missing_once() -> None:
    cache = LogprobCache(None, "model")
    twins = [a_sample([1], [2]), a_sample([1], [2]), a_sample([1], [3])]
    asked = cache.fill(twins)
    assert [s.response_ids for s in asked] == [[2], [3]]
    cache.add(asked, [[-0.5], [-0.25]])
    assert cache.fill(twins) == []
    assert [list(s.ref_logprobs or ()) for s in twins] == [[-0.5], [-0.5], [-0.25]]


def test_a_file_that_is_not_a_database_is_named_with_its_flag(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    path.write_text("not a database, but long enough to be looked at" * 100)
    with pytest.raises(RasftError, match=r"cache\.sqlite.*--rasft-ref-cache"):
        LogprobCache(path, "model")


def test_a_cache_that_another_run_locks_is_an_error_after_a_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reference.LOCK_TIMEOUT_S >= 60
    monkeypatch.setattr(reference, "LOCK_TIMEOUT_S", 0.05)
    path = tmp_path / "cache.sqlite"
    cache = LogprobCache(path, "model")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(RasftError, match=r"cache\.sqlite.*locked.*--rasft-ref-cache"):
            cache.add([a_sample([1], [2])], [[-0.5]])
        other.execute("COMMIT")
    cache.add([a_sample([1], [2])], [[-0.5]])
    assert cache.fill([a_sample([1], [2])]) == []


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    torch.manual_seed(0)
    return [torch.nn.Linear(3, 4), torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.LayerNorm(2))]


def bits(chunks: list[torch.nn.Module]) -> list[torch.Tensor]:
    return [p.detach().view(torch.int32).clone() for c in chunks for _, p in sorted(c.named_parameters())]


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("fails", [False, True])
def test_the_policys_weights_come_back_bit_for_bit(chunks: list[torch.nn.Module], fails: bool) -> None:
    initial = bits(chunks)
    reference = FrozenReference(chunks)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.mul_(1.1).add_(0.3)
        chunks[0].bias[0] = float("nan")  # type: ignore[index,operator]
    policy = bits(chunks)
    assert not equal(policy, initial)
    storages = [p.data_ptr() for c in chunks for p in c.parameters()]
    try:
        with reference.in_place():
            assert equal(bits(chunks), initial)
            if fails:
                raise RuntimeError("scoring failed")
    except RuntimeError:
        assert fails
    assert equal(bits(chunks), policy)
    assert [p.data_ptr() for c in chunks for p in c.parameters()] == storages
    with reference.in_place():
        assert equal(bits(chunks), initial)


@pytest.mark.parametrize("is_tied", [False, True])
def test_the_output_weight_is_that_of_the_output_projection(
    is_tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    class Chunk(torch.nn.Module):
        """A stage with both embeddings, with GPTModel's names. As in Megatron, the shared weight is always the input embedding."""

        def __init__(self) -> None:
            super().__init__()
            self.share_embeddings_and_output_weights = is_tied
            self.embedding = torch.nn.Linear(3, 5, bias=False)
            self.output_layer = torch.nn.Linear(3, 5, bias=False)

        def shared_embedding_or_output_weight(self) -> torch.Tensor:
            return self.embedding.weight

    chunk = Chunk()
    weight = (chunk.embedding if is_tied else chunk.output_layer).weight
    expected = weight.detach().clone()
    reference = FrozenReference([chunk])
    with torch.no_grad():
        weight.add_(1.0)
    assert torch.equal(reference.output_weight(chunk), expected)


def test_fingerprint_changes_with_weights_config_and_precision(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(100000))
    first = weights_fingerprint(tmp_path, "fp32")
    assert weights_fingerprint(tmp_path, "fp32") == first
    assert weights_fingerprint(tmp_path, "bf16") != first
    (tmp_path / "model.safetensors").write_bytes(bytes(50000) + b"x" + bytes(49999))
    second = weights_fingerprint(tmp_path, "fp32")
    assert second != first
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert weights_fingerprint(tmp_path, "fp32") != second


def test_fingerprint_changes_with_a_checkpoints_weights(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"index")
    (tmp_path / "__0_0.distcp").write_bytes(bytes(100))
    first = checkpoint_fingerprint(tmp_path)
    (tmp_path / "__0_0.distcp").write_bytes(bytes(99) + b"x")
    assert checkpoint_fingerprint(tmp_path) != first
