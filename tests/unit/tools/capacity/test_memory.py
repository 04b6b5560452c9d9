"""Compares bytes on a GPU with independent arithmetic and with the code that allocates them."""

from dataclasses import replace

import pytest
import torch

from megatron_rasft.sync.buckets import MemoryPlan
from megatron_rasft.sync.wire_format import WireFormat
from megatron_rasft.tools.capacity.config import AssumptionConfig, CapacityConfig
from megatron_rasft.tools.capacity.layouts import Layout, Model
from megatron_rasft.tools.capacity.memory import (
    GIB,
    activation_bytes,
    estimate_memory,
    logprob_chunk,
    sync_bytes,
)
from megatron_rasft.weights.families import NameTable
from megatron_rasft.weights.gathering import TensorPlan

TP8_PP4 = Layout(tp=8, pp=4, cp=1, dp=2, expert_tp=8)


def test_70b_over_64_gpus_is_six_bytes_a_parameter_and_twelve_shared(
    llama_70b: Model, assumed: AssumptionConfig
) -> None:
    memory = estimate_memory(llama_70b, TP8_PP4, CapacityConfig(num_gpus=64), assumed, num_microbatches=16)
    layer = 8192 * (8192 + 2 * 1024) + 8192 * 8192 + 3 * 8192 * 28672
    elements = (20 * layer + 129024 * 8192) / 8 + 2 * 20 * 8192
    assert memory.stage == 0
    assert memory.weights == pytest.approx(2 * elements, rel=1e-6)
    assert memory.gradients == pytest.approx(4 * elements, rel=1e-6)
    assert memory.optimizer == pytest.approx(12 * elements / 2, rel=1e-6)
    step = memory.activations + memory.logits
    assert memory.total == memory.steady + max(step, memory.sync)


def test_1f1b_keeps_a_micro_batch_for_each_stage_ahead(llama_70b: Model) -> None:
    def kept(stage: int, num: int, layout: Layout = TP8_PP4) -> float:
        return activation_bytes(llama_70b, layout, stage, 8192, num)

    one_layer = 2 * 8192 / 8 * (4 * 8192 + (8192 + 2048) + 8192 + 128 + 3 * 28672)
    assert kept(0, 16) - kept(1, 16) == pytest.approx(20 * one_layer)
    assert kept(0, 1) == kept(3, 16)
    interleaved = replace(TP8_PP4, chunks=2)
    # 3 * 2 + 4 + 1 chunks of ten layers
    assert kept(0, 16, interleaved) - kept(3, 16) == pytest.approx((110 - 20) * one_layer)


def test_recomputation_keeps_less(llama_70b: Model) -> None:
    none, selective, full = (
        activation_bytes(llama_70b, replace(TP8_PP4, recompute=kind), 0, 8192, 16)
        for kind in ("none", "selective", "full")
    )
    assert none > 2 * selective > 2 * full


def test_kl_objective_holds_the_references_output_layer_and_hidden_states(
    llama_70b: Model, assumed: AssumptionConfig
) -> None:
    config = CapacityConfig(num_gpus=64, objective="sft_kl")
    memory = estimate_memory(
        llama_70b, replace(TP8_PP4, pp=1, dp=8), config, assumed, num_microbatches=3, samples=False
    )
    assert memory.reference == 2 * (129024 * 8192 / 8 + 3 * 8192 * 8192 / 8)
    assert memory.sync == memory.kv_cache == 0 and memory.host > 0


def test_embedded_engine_caches_keys_and_values(llama_70b: Model, assumed: AssumptionConfig) -> None:
    config = CapacityConfig(num_gpus=64, rollout_batch_size=32)
    memory = estimate_memory(llama_70b, TP8_PP4, config, assumed, num_microbatches=1, uses_servers=False)
    length, logits = 256 + 4096, 32 * 128256 * 48
    # each rank has one of 8 groups
    assert memory.stage == 3
    assert memory.kv_cache == 2 * 2 * 128 * 20 * length * 32 + logits
    assert memory.sync == 0


@pytest.mark.parametrize("tp", [1, 8])
@pytest.mark.parametrize("bucket_mib", [64, 512, 4096])
def test_sync_takes_what_its_memory_plan_says(llama_70b: Model, tp: int, bucket_mib: int) -> None:
    table = NameTable(llama_70b.family, replace(llama_70b.stored, num_layers=16))
    tensors = [TensorPlan(name, size, torch.bfloat16) for name, size in table.hf_shapes.items()]
    plan = MemoryPlan.make(tensors, WireFormat(torch.bfloat16), bucket_mib * 2**20, copies=int(tp > 1))
    planned = sync_bytes(llama_70b, Layout(tp=tp, pp=1, cp=1, dp=1, expert_tp=tp), 0, bucket_mib * 2**20)
    assert (
        plan.peak_bytes <= planned <= plan.peak_bytes + GIB
    )  # a bucket ends where the next layer does not fit


def test_fp8_keeps_two_more_bytes_of_each_linear_weight(llama_70b: Model, assumed: AssumptionConfig) -> None:
    def weights(is_fp8: bool) -> float:
        return estimate_memory(
            llama_70b, TP8_PP4, CapacityConfig(num_gpus=64), assumed, num_microbatches=1, is_fp8=is_fp8
        ).weights

    layer = 8192 * (8192 + 2 * 1024) + 8192 * 8192 + 3 * 8192 * 28672
    assert weights(True) - weights(False) == 2 * 20 * layer / 8


def test_fp8_keeps_inputs_of_linear_layers_in_one_byte(llama_70b: Model) -> None:
    bf16, fp8 = (
        activation_bytes(llama_70b, replace(TP8_PP4, pp=1), 0, 8192, 1, is_fp8=is_fp8)
        for is_fp8 in (False, True)
    )
    layers = 80 * (2 * 8192 + 28672) / 2
    working = (8192 + 28672) / 2
    assert bf16 - fp8 == pytest.approx(2 * 8192 / 8 * (layers + working))


def test_logits_are_kept_in_bf16_up_to_three_gib(llama_70b: Model) -> None:
    one_gpu = replace(TP8_PP4, tp=1)
    config = CapacityConfig(num_gpus=64)
    assert logprob_chunk(llama_70b, one_gpu, config, 8192) == 8192
    # With 128,256 logits of two bytes per token, 12,557 tokens fit. So 20,000 tokens are divided into two equal parts
    assert logprob_chunk(llama_70b, one_gpu, config, 20000) == 10000
    assert logprob_chunk(llama_70b, TP8_PP4, config, 20000) == 20000
    assert logprob_chunk(llama_70b, TP8_PP4, replace(config, logprob_chunk_tokens=1024), 20000) == 1024
