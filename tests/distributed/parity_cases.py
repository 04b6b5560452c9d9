"""The cases of test_training_parity.py, and the batches that they train on. This module does not import Megatron."""

import random
from dataclasses import dataclass

from megatron_rasft.types import TrainingSample

VOCAB_SIZE = 101
NUM_STEPS = 3
LEARNING_RATE = 0.1
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.01

EPSILON = {"rasft": 1e-3, "dft": 1e-3, "sft_kl": 1e-1, "sdft": 1e-1}
"""Adam's eps for each objective, larger than the gradients. The first update, lr * g / (|g| + eps), is then smooth in the
gradient g, so equal weights imply equal gradients."""

CLIP = {"rasft": 1e-3, "dft": 1e-3, "sft_kl": 0.3, "sdft": 0.3}
"""Gradient clipping below the gradients' norm, so that the norm over all ranks affects every weight."""

COMMON = (
    "--seq-length 64 --micro-batch-size 1 --global-batch-size 8 --lr-decay-style constant --lr-warmup-iters 0 "
    f"--lr {LEARNING_RATE} --weight-decay {WEIGHT_DECAY} --adam-beta1 {BETAS[0]} --adam-beta2 {BETAS[1]}"
)

LAYOUTS: dict[int, dict[str, str]] = {
    1: {
        "packed": "",
        "packed, micro-batch 4": "--micro-batch-size 4",
        "padded": "--rasft-batch-layout padded",
        "padded, micro-batch 4": "--rasft-batch-layout padded --micro-batch-size 4",
        "recomputed": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        "chunks of 16 tokens": "--objective-logprob-chunk-tokens 16",
        "packed, query groups added": "--rasft-query-groups 3",
        "packed, coarse widths": "",
        "padded, coarse widths": "--rasft-batch-layout padded --micro-batch-size 4",
        "fused kernels": "--objective-logprob-kernels fused",
        "fused kernels in chunks of 16 tokens with gradient fusion": "--objective-logprob-kernels fused "
        "--objective-logprob-chunk-tokens 16",
        "chunks of 16 tokens, gradient fusion": "--objective-logprob-chunk-tokens 16",
    },
    2: {
        "dp2": "",
        "dp2, plain optimizer, overlapped": "--overlap-grad-reduce",
        # Small buckets, so that the forward pass waits for the weights one after the other, as in a large model.
        "dp2, overlapped": "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 100",
        "dp2, padded": "--rasft-batch-layout padded --micro-batch-size 2",
        "tp2": "--tensor-model-parallel-size 2",
        "tp2, chunks of 16 tokens": "--tensor-model-parallel-size 2 --objective-logprob-chunk-tokens 16",
        "tp2 sp": "--tensor-model-parallel-size 2 --sequence-parallel",
        "tp2 sp, recomputed": "--tensor-model-parallel-size 2 --sequence-parallel --recompute-granularity full "
        "--recompute-method uniform --recompute-num-layers 1",
        "tp2 sp, padded": "--tensor-model-parallel-size 2 --sequence-parallel --rasft-batch-layout padded",
        "tp2, query groups added": "--tensor-model-parallel-size 2 --rasft-query-groups 4",
        "pp2": "--pipeline-model-parallel-size 2",
        "pp2, padded": "--pipeline-model-parallel-size 2 --rasft-batch-layout padded --micro-batch-size 2",
        "pp2 vpp2": "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
        "dp2 overlapped, fused kernels with gradient fusion": "--overlap-grad-reduce --overlap-param-gather "
        "--ddp-bucket-size 100 --objective-logprob-kernels fused",
        "tp2, fused kernels in chunks of 16 tokens": "--tensor-model-parallel-size 2 --objective-logprob-kernels fused "
        "--objective-logprob-chunk-tokens 16",
        "tp2 sp fused kernels with gradient fusion": "--tensor-model-parallel-size 2 --sequence-parallel "
        "--objective-logprob-kernels fused",
        "pp2 fused kernels with gradient fusion": "--pipeline-model-parallel-size 2 --objective-logprob-kernels fused",
        "cp2": "--context-parallel-size 2",
        "cp2, coarse widths": "--context-parallel-size 2",
        "cp2, padded": "--context-parallel-size 2 --rasft-batch-layout padded --micro-batch-size 2",
    },
    4: {
        "tp2 sp pp2 vpp2": "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 "
        "--num-layers-per-virtual-pipeline-stage 1",
        "tp2 sp cp2": "--tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 2",
        "tp4, query groups added": "--tensor-model-parallel-size 4 --rasft-query-groups 4",
        "pp2 cp2": "--pipeline-model-parallel-size 2 --context-parallel-size 2",
        "dp2 cp2": "--context-parallel-size 2",
        "dp2 tp2": "--tensor-model-parallel-size 2",
        "dp2 pp2": "--pipeline-model-parallel-size 2",
    },
}
"""World size -> name of the layout -> its flags."""

MODELS = {"untied": "llama", "tied": "qwen2_tied"}


@dataclass(frozen=True)
class Case:
    """One training run of NUM_STEPS steps."""

    world_size: int
    layout: str
    objective: str
    model: str

    @property
    def key(self) -> str:
        return f"{self.world_size}|{self.layout}|{self.objective}|{self.model}"

    @property
    def has_distributed_optimizer(self) -> bool:
        return "plain optimizer" not in self.layout

    @property
    def has_gradient_fusion(self) -> bool:
        return "gradient fusion" in self.layout

    @property
    def width_slack(self) -> float:
        """``BatchLayout.width_slack``; 0.03 on a GPU."""
        return 0.9 if "coarse widths" in self.layout else 0.0

    @property
    def flags(self) -> list[str]:
        adam = f"--adam-eps {EPSILON[self.objective]} --clip-grad {CLIP[self.objective]}"
        return f"{COMMON} {adam} --objective {self.objective} {LAYOUTS[self.world_size][self.layout]}".split()


MORE = {
    "packed": ["dft", "sft_kl", "sdft"],
    "padded": ["sft_kl"],
    "fused kernels in chunks of 16 tokens with gradient fusion": ["sft_kl"],
    "dp2": ["dft"],
    "tp2": ["sft_kl"],
    "tp2 sp": ["dft"],
    "pp2": ["dft"],
    "pp2 vpp2": ["sft_kl"],
    "tp2 sp fused kernels with gradient fusion": ["sft_kl"],
    "pp2 fused kernels with gradient fusion": ["dft"],
    "cp2": ["sft_kl"],
    "dp2 cp2": ["sdft"],
    "tp2 sp pp2 vpp2": ["sft_kl", "sdft"],
}
"""Layout -> the objectives that it trains besides rasft, with tied embeddings: sft_kl where the loss over the whole vocabulary is
divided or computed in another way, dft where only the tied weights are, sdft where a sample's log-probabilities travel differently."""


def cases(world_size: int) -> list[Case]:
    """All layouts train rasft, and those in ``MORE`` further objectives."""
    chosen = []
    for layout in LAYOUTS[world_size]:
        pairs = [("rasft", "untied"), *((objective, "tied") for objective in MORE.get(layout, []))]
        chosen += [Case(world_size, layout, objective, model) for objective, model in pairs]
    return chosen


def batches(objective: str) -> list[list[TrainingSample]]:
    """Global batches of 6, 4 and 1 samples with different lengths and weights. The last one leaves replicas idle.

    Those of rasft have one more sample, which is not computed.
    """
    draw = random.Random(11)
    out = []
    for size in (6, 4, 1):
        batch = []
        for index in range(size):
            # Under --weighting-normalization problem the tokens of rollouts are not in the denominator.
            is_counted = objective != "rasft" or index % 3 != 1
            prompt = [draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(1, 12))]
            response = [draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(1, 40))]
            batch.append(
                TrainingSample(
                    problem_id=str(index),
                    kind="demonstration" if is_counted else "rollout",
                    is_counted=is_counted,
                    prompt_ids=prompt,
                    response_ids=response,
                    # A wrong rollout has a weight below zero (--weighting-wrong-total).
                    weight=draw.uniform(0.2, 2.0) * (-1 if objective == "rasft" and index == 4 else 1),
                    ref_logprobs=[draw.uniform(-5.6, -3.8) for _ in response]
                    if objective == "rasft"
                    else None,
                    teacher_logprobs=[draw.uniform(-5.6, -3.8) for _ in response]
                    if objective == "sdft"
                    else None,
                )
            )
        if objective == "rasft":
            # A demonstration of weight 0 (--rollout-guided-samples): its 17 tokens count in the denominator and nowhere else.
            batch.append(
                TrainingSample(
                    problem_id="uncomputed",
                    kind="demonstration",
                    is_computed=False,
                    prompt_ids=[1, 2],
                    response_ids=[3] * 17,
                    weight=0.0,
                )
            )
        out.append(batch)
    return out
