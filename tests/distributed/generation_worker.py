"""One rank of test_generation.py: samples from a tiny model in every layout of its world size.

Usage: generation_worker.py RANK WORLD_SIZE ROOT, where ROOT contains the model folder "llama".
"""

import contextlib
import faulthandler
import gc
import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rasft.machine import cpu_backend

cpu_backend.enable()
cpu_backend.use_cpu_fused_adam()

from megatron_rasft.config import RasftConfig, RolloutConfig  # noqa: E402
from megatron_rasft.data.sample_arrays import SampleArrays  # noqa: E402
from megatron_rasft.generation.kv_cache import CachedAttention  # noqa: E402
from megatron_rasft.monitoring.stopping import Stopped, StopRequest  # noqa: E402
from megatron_rasft.objective.families.policy_ratio import Grpo  # noqa: E402
from megatron_rasft.ranks import gather_to_all  # noqa: E402
from megatron_rasft.training.reference import LogprobCache  # noqa: E402
from megatron_rasft.training.refresh import Refresh, sampling_params  # noqa: E402
from megatron_rasft.training.refresh_driver import RefreshDriver  # noqa: E402
from megatron_rasft.types import (  # noqa: E402
    Demonstration,
    Request,
    Response,
    Rollout,
    SamplingParams,
    TrainingSample,
)
from tests import recorded_graphs  # noqa: E402
from tests.distributed.parity_cases import batches  # noqa: E402
from tests.distributed.ranks_harness import trainer  # noqa: E402

LAYOUTS: dict[int, dict[str, str]] = {
    1: {"one": ""},
    2: {
        "dp2": "--overlap-grad-reduce --overlap-param-gather",
        "tp2": "--tensor-model-parallel-size 2",
        "tp2, query groups added": "--tensor-model-parallel-size 2 --rasft-query-groups 4",
        "tp2 sp": "--tensor-model-parallel-size 2 --sequence-parallel",
        "pp2": "--pipeline-model-parallel-size 2",
        "pp2 vpp2": "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
        "cp2": "--context-parallel-size 2",
        "cp2 padded": "--context-parallel-size 2 --rasft-batch-layout padded",
    },
}

SEQ_LENGTH = 64
LENGTH = 128
"""Length of a row, tokens, from which the number of rows that fit into memory is derived."""
COMMON = f"--seq-length {SEQ_LENGTH} --global-batch-size 8 --lr-decay-style constant --lr-warmup-iters 0 --lr 1e-3 --objective dft"

PROMPTS = [[5, 17, 99], [3], [88, 2, 45, 45, 7, 60, 31, 12], [100, 0, 41, 9, 9], [71, 70]]
NUM_SAMPLES = 3
NEW_TOKENS = 20
STOP_IDS = frozenset(range(0, 101, 6))
"""A sixth of the vocabulary, so that rows end at different steps and are often refilled and moved."""


def params(**changes: Any) -> SamplingParams:
    values: dict[str, Any] = {
        "num_samples": NUM_SAMPLES,
        "max_new_tokens": NEW_TOKENS,
        "temperature": 1.0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "stop_ids": STOP_IDS,
        "max_batch_size": 64,
    }
    return SamplingParams(**{**values, **changes})


MODES: dict[str, SamplingParams] = {
    "greedy": params(temperature=0.0, stop_ids=frozenset()),
    "plain": params(),
    "small batches": params(max_batch_size=4),
    "rare looks": params(max_batch_size=4),
    "as on a GPU": params(max_batch_size=8),
    # Longest prompt plus response is half a training row. With two context-parallel ranks, training and sampling then
    # ask Megatron's rotary embedding for the same number of positions, by which it caches its results.
    "half a training row": params(max_new_tokens=SEQ_LENGTH // 2 - 8),
    "little room": params(max_total_tokens=18, max_batch_size=9),
    "nucleus": params(temperature=0.9, top_p=0.8),
    "penalised": params(temperature=0.0, repetition_penalty=1.3, stop_ids=frozenset()),
}


SAMPLED_ALIKE = ("tp2, query groups added", "pp2 vpp2", "cp2 padded")
"""Layouts in which ranks choose tokens together exactly as in tp2, pp2 or cp2. Only their logits are computed in another way."""


def modes_of(layout: str) -> list[str]:
    """The modes that a layout samples in.

    Only one process samples in small batches that are looked at after every step: batches of the same size with rare looks are
    harder. The limit of a row's length is the same on every rank. Only context parallelism shares positions with training.
    """
    left_out = {"small batches", "little room"} | (
        set() if layout.startswith("cp2") else {"half a training row"}
    )
    if layout in SAMPLED_ALIKE:
        left_out |= {"nucleus", "penalised"}
    return [mode for mode in MODES if layout == "one" or mode not in left_out]


def requests(num_samples: int) -> list[Request]:
    return [
        Request(prompt_ids=p, seeds=[100 * i + k for k in range(num_samples)]) for i, p in enumerate(PROMPTS)
    ]


def main(rank: int, world_size: int, root: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{root}/generation{world_size}", rank=rank, world_size=world_size
    )
    results = {}
    for layout, flags in LAYOUTS[world_size].items():
        faulthandler.dump_traceback_later(400, exit=True)
        with contextlib.redirect_stdout(io.StringIO()):
            results[layout] = sample(f"{COMMON} {flags}".split(), root, modes_of(layout))
    if rank == 0:
        torch.save(results, root / f"generation{world_size}.pt")
    dist.destroy_process_group()


def sample(flags: list[str], root: Path, modes: list[str]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    with trainer(root / "llama", root / "none.jsonl", flags) as run:
        before = training_state(run.chunks)
        # Fewer requests than replicas. It comes first, when the distributed optimizer has not yet gathered parameters.
        result["lone request"] = responses(run.generate(requests(1)[:1], MODES["greedy"]))
        run.score([full_row()], with_reference=False)
        for mode in modes:
            chosen = MODES[mode]
            run.sampler.steps_per_read = 16 if mode == "rare looks" else 1
            if mode == "as on a GPU":
                with recorded_graphs.on_a_gpu(run.sampler) as used:
                    result["rows from memory"] = run.sampler.num_rows_that_fit(LENGTH)
                    result[mode] = responses(run.generate(requests(NUM_SAMPLES), chosen))
                result["graphs"] = (used.num_captured, used.num_replayed)
                continue
            asked = requests(1 if chosen.temperature == 0 else NUM_SAMPLES)
            groups = run.generate(asked, chosen)
            assert bool(groups) == (dist.get_rank() == 0), "only rank 0 gets the responses"
            result[mode] = responses(groups)
        result["caches left"] = caches_left(lambda: run.generate(requests(1), MODES["plain"]))
        stop, run.stop = run.stop, StopRequest(lambda: dist.get_rank() == dist.get_world_size() - 1)
        given = samples_of(result["plain"])
        result["stopped"] = [
            is_stopped(lambda: run.generate(requests(2), MODES["plain"])),
            is_stopped(lambda: run.score(given, with_reference=False)),
        ]
        run.stop = stop
        after = training_state(run.chunks)
        assert before == after, [name for name in before if before[name] != after.get(name)]
        result["scores"] = [v.tolist() for v in run.score(given, with_reference=False)]
        size, run.args.global_batch_size = run.args.global_batch_size, 1  # the decoder has four rows
        result["scores in parts"] = [v.tolist() for v in run.score(given, with_reference=False)]
        run.args.global_batch_size = size
        result["refresh"] = refresh(run)
        result["step"] = run.step(batches("dft")[0], 9).metrics["loss"]
    with trainer(root / "llama", root / "none.jsonl", flags) as run:
        result["step without generation"] = run.step(batches("dft")[0], 9).metrics["loss"]
    return result


class ParityVerifier:
    """A verifier that accepts responses whose token ids have an even sum."""

    def verify(self, rollouts: list[Rollout], checks: dict, *_: Any) -> None:
        for rollout in rollouts:
            rollout.verdict = "wrong" if sum(rollout.response_ids) % 2 else "correct"


def refresh(run: Any) -> list[tuple[list[int], float, list[float], list[float]]]:
    """Runs a grpo refresh and returns its samples on rank 0. Checks that no other rank receives rollouts or samples."""
    config = RasftConfig(
        objective=Grpo(),
        rollout=RolloutConfig(rollout_num_samples=NUM_SAMPLES, rollout_max_new_tokens=NEW_TOKENS),
    )
    demonstrations = [
        Demonstration(
            problem_id=str(i), problem="", response="", answer="", prompt_ids=ids, response_ids=[7, 9]
        )
        for i, ids in enumerate(PROMPTS)
    ]
    is_rank_zero = dist.get_rank() == 0
    sampling = sampling_params(config, STOP_IDS, SEQ_LENGTH)

    def refresh_of_rank_zero() -> Refresh:
        return Refresh(
            config,
            demonstrations,
            batch_size=len(PROMPTS),
            total_steps=1,
            sampling=sampling,
            decode=str,
            verifier=ParityVerifier(),
            cache=LogprobCache(None, ""),
        )

    driver = RefreshDriver(
        config,
        refresh_of_rank_zero() if is_rank_zero else None,
        policy=run,
        servers=None,
        sampling=sampling,
    )
    broadcast, messages = dist.broadcast_object_list, []

    def broadcast_recorded(box: list, *args: Any, **options: Any) -> None:
        broadcast(box, *args, **options)
        messages.append(pickle.dumps(box))

    dist.broadcast_object_list = broadcast_recorded
    try:
        driver.start(0)
        choice = driver.choose_problems()
        groups = driver.sample(choice)
        driver.verify(groups)
        samples = driver.weigh(choice, groups)
        driver.score_reference(samples)
        queue, report = driver.finish(samples)
    finally:
        dist.broadcast_object_list = broadcast
    assert report.num_rollouts == len(PROMPTS) * NUM_SAMPLES
    names = (Rollout.__name__, TrainingSample.__name__, SampleArrays.__name__)
    assert not any(name.encode() in message for message in messages for name in names)
    assert gather_to_all(queue.sizes) == [queue.sizes] * dist.get_world_size()
    batch = queue.batch(0)
    if not is_rank_zero:
        assert batch is None
        return []
    parts = [batch.samples.slice(i, i + 1) for i in range(len(batch.samples))]
    return [
        (
            s.tokens[int(s.prompt_lengths[0]) :].tolist(),
            float(s.weights[0]),
            *([] if values is None else values.tolist() for values in (s.ref_logprobs, s.old_logprobs)),
        )
        for s in parts
    ]


def caches_left(work: Callable[[], Any]) -> int:
    """The number of layers that still hold keys after ``work``, with garbage collection switched off."""
    gc.disable()
    try:
        work()
        layers = [x for x in gc.get_objects() if isinstance(x, CachedAttention)]
        return sum(layer.keys is not None for layer in layers)
    finally:
        gc.enable()


def is_stopped(work: Callable[[], Any]) -> bool:
    try:
        work()
    except Stopped:
        return True
    return False


def responses(groups: list[list[Response]]) -> list[list[tuple[list[int], list[float], bool]]]:
    return [[(r.token_ids, r.logprobs, r.finish_reason == "stop") for r in group] for group in groups]


def full_row() -> TrainingSample:
    return TrainingSample(
        problem_id="full",
        kind="rollout",
        prompt_ids=[1] * 4,
        response_ids=[2] * (SEQ_LENGTH - 4),
        weight=1.0,
    )


def samples_of(groups: list) -> list[TrainingSample]:
    return [
        TrainingSample(
            problem_id=str(i), kind="rollout", prompt_ids=PROMPTS[i], response_ids=tokens, weight=1.0
        )
        for i, group in enumerate(groups)
        for tokens, _, _ in group
    ]


def training_state(chunks: list) -> dict[str, Any]:
    """Name -> the state that generation changes temporarily."""
    state: dict[str, Any] = {}
    for number, chunk in enumerate(chunks):
        state[f"{number} config"] = (chunk.config.sequence_parallel, chunk.config.fp8, chunk.config.fp4)
        rotary = getattr(chunk, "rotary_pos_emb", None)
        state[f"{number} rotary"] = id(getattr(rotary, "cp_group", None))
        for name, module in chunk.named_modules():
            state[f"{number} {name}"] = (
                id(module),
                module.training,
                getattr(module, "sequence_parallel", None),
                getattr(module, "input_tensor", None) is None,
            )
        for name, parameter in chunk.named_parameters():
            state[f"{number} {name} parameter"] = (
                parameter.requires_grad,
                getattr(parameter, "sequence_parallel", None),
            )
    return state


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
