"""Times are counted work divided by assumed speeds, and agree with measurements."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_rasft.data.row_report import DataReport
from megatron_rasft.data.tokenized_rows import write_rows
from megatron_rasft.objective.declaration import SampledProblem
from megatron_rasft.objective.families import OBJECTIVES
from megatron_rasft.objective.groups import distinct_texts
from megatron_rasft.objective.weighting import WeightingConfig
from megatron_rasft.tools.capacity import speed
from megatron_rasft.tools.capacity.choosing import disk_bytes
from megatron_rasft.tools.capacity.config import AssumptionConfig, CapacityConfig
from megatron_rasft.tools.capacity.layouts import Layout, Model
from megatron_rasft.training.reference import LogprobCache
from megatron_rasft.types import Demonstration, Rollout, TrainingSample
from tests.unit.objective.sampled_groups import counted_group

ONE_GPU = Layout(tp=1, pp=1, cp=1, dp=1, expert_tp=1)
TP8_PP2 = Layout(tp=8, pp=2, cp=1, dp=2, expert_tp=8)
QWEN2_5 = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(("precision", "measured"), [("bf16", 47_000), ("fp8", 54_000)])
def test_one_gpu_is_as_fast_as_was_measured(tmp_path: Path, precision: str, measured: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_5))
    model = Model.read(tmp_path)
    config = CapacityConfig(
        num_gpus=1, objective="sft", seq_length=2048, max_new_tokens=1024, logprob_chunk_tokens=0
    )
    assumed = AssumptionConfig(demonstration_tokens=2048)
    step = speed.estimate_step(model, ONE_GPU, config, assumed, precision=precision)
    assert step.tokens / step.total_s == pytest.approx(measured, rel=0.05)


def test_flops_are_six_per_weight_and_token_with_causal_attention(llama_70b: Model) -> None:
    flops = speed.forward_flops(llama_70b, length=4096)
    total = 80 * (flops.attention + flops.mlp) + flops.output
    weights = (
        llama_70b.num_parameters - 128256 * 8192 - 161 * 8192
    )  # the embedding lookup and the norms are not counted
    assert total == pytest.approx(2 * weights + 80 * 4 * (4096 / 2) * 8192)


def test_a_window_limits_the_tokens_that_attention_counts(llama_70b: Model) -> None:
    length, window = 64, 10
    half = replace(llama_70b, windows=(window, None))
    seen = sum(min(place + 1, window) for place in range(length)) / length
    plain, windowed = (speed.forward_flops(model, length).attention for model in (llama_70b, half))
    assert plain - windowed == pytest.approx((length / 2 - seen) / 2 * 4 * 8192, rel=0.1)
    assert speed.forward_flops(half, window).attention == speed.forward_flops(llama_70b, window).attention


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_declares_the_samples_that_its_weights_train(
    name: str, assumed: AssumptionConfig
) -> None:
    config = CapacityConfig(num_gpus=8, objective=name, num_samples=4, global_batch_size=3)
    problem = SampledProblem(
        group=counted_group(2, 2),
        weighting=WeightingConfig(),
        remembered=None,
        deduplicate=distinct_texts,
        similarity=None,
    )
    weights = config.needs.weigh(problem)
    num_demonstrations = int(weights.demonstration is not None)
    assert speed.trained_rollouts(config, assumed) == len(weights.rollouts), "half of four are correct"
    assert speed.trained_demonstrations(config) == num_demonstrations
    a, b = assumed.demonstration_tokens, speed.rollout_tokens(config, assumed)
    lengths = [a] * num_demonstrations + [b] * len(weights.rollouts)
    assert speed.tokens_per_step(config, assumed) == 3 * sum(lengths)
    assert speed.mean_length(config, assumed) == pytest.approx(sum(n * n for n in lengths) / sum(lengths))


def test_a_step_without_a_correct_rollout_has_nothing_to_train(llama_70b: Model) -> None:
    config, assumed = CapacityConfig(num_gpus=64, objective="raft"), AssumptionConfig(solve_rate=0.0)
    step = speed.estimate_step(llama_70b, TP8_PP2, config, assumed)
    assert (step.tokens, step.mfu) == (0.0, 0.0)


def test_bubble_is_shared_by_the_chunks_of_a_stage(llama_70b: Model, assumed: AssumptionConfig) -> None:
    config = CapacityConfig(num_gpus=64)
    plain = speed.estimate_step(llama_70b, TP8_PP2, config, assumed)
    chunked = speed.estimate_step(llama_70b, replace(TP8_PP2, chunks=4), config, assumed)
    share = plain.bubble_s / (plain.compute_s + plain.tensor_s)
    assert share == pytest.approx(1 / plain.num_microbatches)
    assert chunked.bubble_s == pytest.approx(plain.bubble_s / 4, rel=0.05)


def test_recomputation_costs_a_forward_pass(llama_70b: Model, assumed: AssumptionConfig) -> None:
    config = CapacityConfig(num_gpus=64, logprob_chunk_tokens=0)
    none, full = (
        speed.estimate_step(llama_70b, replace(TP8_PP2, recompute=r), config, assumed)
        for r in ("none", "full")
    )
    assert 1.28 < full.compute_s / none.compute_s < 4 / 3
    assert full.mfu < none.mfu < 0.47


def test_rollouts_of_servers_scale_with_gpus_and_size(llama_70b: Model, assumed: AssumptionConfig) -> None:
    config = CapacityConfig(num_gpus=64)
    step = speed.estimate_step(llama_70b, TP8_PP2, config, assumed)
    few, many = (
        speed.estimate_refresh(llama_70b, TP8_PP2, config, assumed, step, rollout_gpus=n) for n in (16, 32)
    )
    longest_s = 4096 * 2 * llama_70b.num_parameters / 4 / (3350e9 * 0.6)
    assert few.rollouts_s - longest_s == pytest.approx(2 * (many.rollouts_s - longest_s))
    tokens = 32 * 256 * 4 * 2048
    assert many.rollouts_s - longest_s == pytest.approx(tokens / 32 / (40e3 * 1.54e9 / 70.55e9), rel=1e-3)
    assert 5 < many.sync_s < 15  # the same figure as benchmarks/weight_sync.py --cluster


def test_a_teacher_scores_longer_sequences_and_nothing_is_graded(
    llama_70b: Model, assumed: AssumptionConfig
) -> None:
    def refresh(name: str) -> speed.RefreshEstimate:
        config = CapacityConfig(num_gpus=64, objective=name, max_new_tokens=1024)
        step = speed.estimate_step(llama_70b, TP8_PP2, config, assumed)
        return speed.estimate_refresh(llama_70b, TP8_PP2, config, assumed, step, rollout_gpus=16)

    sdft, grpo = refresh("sdft"), refresh("grpo")
    assert sdft.rollouts_s == grpo.rollouts_s and sdft.verification_s == 0 < grpo.verification_s
    # grpo scores prompt and response (256 + 512) under two policies, sdft also the demonstration (1,024) under one
    assert sdft.scoring_s / grpo.scoring_s == pytest.approx((1 + 1024 / 768) / 2, rel=0.1)


@pytest.mark.parametrize(("pp", "layer_s"), [(1, 0.034e-3), (2, 0.5e-3)])
def test_the_embedded_engine_refills_its_rows(
    llama_70b: Model, assumed: AssumptionConfig, pp: int, layer_s: float
) -> None:
    """Without CUDA graphs, as in a pipeline, launching kernels takes most of the time."""
    config = CapacityConfig(num_gpus=64, num_samples=4, refresh_interval=1, max_new_tokens=1000)
    layout = replace(TP8_PP2, pp=pp, dp=8 // pp)
    step = speed.estimate_step(llama_70b, layout, config, assumed)
    refresh = speed.estimate_refresh(llama_70b, layout, config, assumed, step, rollout_gpus=0)
    samples = config.global_batch_size * 4 / layout.num_replicas
    positions = samples * 500 / config.rollout_batch_size + 1000
    read = 2 * llama_70b.num_parameters / 8 + config.rollout_batch_size * 756 * 2 * 2 * 128 * 80
    assert refresh.rollouts_s == pytest.approx(positions * (80 * layer_s + read / (3350e9 * 0.6)))


def test_lag_hides_the_shorter_of_rollouts_and_steps(llama_70b: Model, assumed: AssumptionConfig) -> None:
    config = CapacityConfig(num_gpus=64, rollout_gpus=32)
    step = speed.estimate_step(llama_70b, TP8_PP2, config, assumed)
    refresh = speed.estimate_refresh(llama_70b, TP8_PP2, config, assumed, step, rollout_gpus=32)
    waits, overlaps = (
        speed.estimate_run(replace(config, rollout_lag=n), step, refresh, checkpoint_bytes=0, assumed=assumed)
        for n in (0, 1)
    )
    hidden_s = min(waits.num_steps * step.total_s, waits.num_refreshes * refresh.rollouts_s)
    assert (waits.hours - overlaps.hours) * 3600 == pytest.approx(hidden_s)
    assert waits.num_steps == 391 and waits.gpu_hours == 64 * waits.hours


def test_sizes_on_disk_are_those_of_the_files(
    llama_70b: Model, assumed: AssumptionConfig, tmp_path: Path
) -> None:
    disk = disk_bytes(llama_70b, CapacityConfig(num_gpus=64, num_problems=1000, num_samples=1), assumed)
    ids = list(range(10_000, 10_000 + 2048))
    rollout = Rollout(
        problem_id="train.jsonl:123",
        sample_index=0,
        weight_version=32,
        prompt_ids=ids[:256],
        response_ids=ids,
        response_logprobs=[-0.123456789012345 * (1 + i / 1000) for i in range(2048)],
        finish_reason="stop",
        text="word" * 2048,
        verdict="correct",
        verdict_reason="equal",
    )
    assert disk.rollout_store == pytest.approx(1000 * len(json.dumps(asdict(rollout))), rel=0.1)
    rows = [
        Demonstration(
            problem_id=f"train.jsonl:{i}",
            problem="word" * 256,
            response="word" * 768,
            answer="12",
            prompt_ids=ids[:256],
            response_ids=ids[:768],
            source=f"/data/sets/of/some/length/train.jsonl:{i}",
        )
        for i in range(1000)
    ]
    write_rows(tmp_path, rows, DataReport())
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert disk.data_cache == pytest.approx(size, rel=0.02)
    cache = LogprobCache(tmp_path / "cache", "weights")
    trained = [  # half of the rollouts are correct
        TrainingSample(
            problem_id="", kind="demonstration", prompt_ids=[i], response_ids=ids[:num], weight=1.0
        )
        for i, num in enumerate([1024] * 1000 + [2048] * 500)
    ]
    cache.add(trained, [[0.0] * len(sample.response_ids) for sample in trained])
    assert disk.reference_cache == pytest.approx((tmp_path / "cache").stat().st_size, rel=0.15)
    # measured for Qwen2.5-1.5B: 21 GB
    assert disk.checkpoint / llama_70b.num_parameters == pytest.approx(21e9 / 1.54e9, rel=0.03)
