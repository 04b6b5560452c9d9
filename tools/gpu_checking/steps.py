"""The steps of a check in order: the program of each, its deadline, and the figures that it must produce.

The order is that of the audit's list, except that tests/gpu comes last: it takes longest and keeps its results if it is
interrupted.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tools.gpu_checking.processes import Command
from tools.gpu_checking.report import Figure, flattened

FIGURES_FILE = "figures.json"
"""Name of the file in a step's folder that a benchmark writes with --json."""

OUTPUT_FILE = "output.log"
"""Name of the file in a step's folder with the output of its processes."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The amount of work of each step."""

    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    max_new_tokens: int
    """Maximum number of new tokens of a rollout in the training runs."""
    packed_length: int
    """Tokens of a micro-batch in the benchmark of a training step."""
    num_samples: int
    """Sequences of a global batch in the benchmark of a training step."""
    mean_tokens: int
    rows: int
    """Sequences that the generation benchmark decodes at once."""
    generated_tokens: int
    """Maximum number of new tokens of a response in the generation benchmark."""
    mean_generated_tokens: int
    logprobs: tuple[str, ...] = ()
    """Flags of benchmarks/logprobs.py, which has its own shapes."""


SIZES = {
    "tiny": Sizes(
        seq_length=512,
        micro_batch_size=1,
        global_batch_size=2,
        max_new_tokens=8,
        packed_length=128,
        num_samples=2,
        mean_tokens=32,
        rows=4,
        generated_tokens=8,
        mean_generated_tokens=6,
        logprobs=("--shapes", "tiny", "--tokens", "24", "--repeats", "1"),
    ),
    "qwen2.5-1.5b": Sizes(
        seq_length=2048,
        micro_batch_size=2,
        global_batch_size=32,
        max_new_tokens=128,
        packed_length=8192,
        num_samples=128,
        mean_tokens=1000,
        rows=256,
        generated_tokens=256,
        mean_generated_tokens=200,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The machine, model and folders that a step uses."""

    shape: str
    model: Path
    """Hugging Face folder of the random model, or of the user's --hf-model."""
    data: Path
    material: Path
    folder: Path
    """The step's own folder, removed after the step."""
    num_gpus: int
    sglang_python: Path | None = None

    @property
    def sizes(self) -> Sizes:
        """The amounts of work for the shape."""
        return SIZES[self.shape]

    @property
    def figures_file(self) -> Path:
        """The file to which a program writes its figures."""
        return self.folder / FIGURES_FILE


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step, which runs in its own processes."""

    name: str
    number: int
    """Number in the audit's list; 0 for other steps."""
    title: str
    deadline_s: float
    command: Callable[[Setting], Command]
    after: str = "material"
    """Step that must have passed before this step; "" if none."""
    obstacle: Callable[[Setting], str] = lambda setting: ""
    """The reason why the step cannot run on this machine; "" if it can."""
    figures: Callable[[Path], Mapping[str, Figure]] = lambda folder: {}
    """Reads the figures from the step's folder."""
    wants: tuple[str, ...] = ()
    """Names of figures that must exist for the step to pass."""
    bounds: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Figure -> smallest and largest value with which the step passes."""
    covers: Mapping[str, str] = field(default_factory=dict)
    """Gap in tests/emulated_gpu/not_shown.toml -> how the step closes it: names of tests, or a description."""


def benchmark_figures(folder: Path) -> dict[str, Figure]:
    """Reads the file that a benchmark wrote with --json."""
    return flattened(json.loads((folder / FIGURES_FILE).read_text(encoding="utf-8")))


def run_figures(folder: Path) -> dict[str, Figure]:
    """Reads ratio, loss and time of each step, times of the refreshes, and the attention kernels that Transformer Engine logs."""
    figures: dict[str, Figure] = {}
    num_refreshes = 0
    log = (folder / OUTPUT_FILE).read_text(encoding="utf-8", errors="replace")
    figures["attention"] = ", ".join(sorted(set(re.findall(r"Running with (\w+ backend(?: \(.*?\))?)", log))))
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["event"] == "step":
            figures[f"step {record['step']} ratio_mean"] = record.get("objective/ratio_mean")
            figures[f"step {record['step']} loss"] = record["objective/loss"]
            figures[f"step {record['step']} s"] = record["training/step_s"]
            figures["last step tokens/s"] = record["training/tokens_per_s"]
            figures["num_steps"] = record["step"]
        elif record["event"] == "refresh":
            num_refreshes += 1
            shown = {
                k: v for k, v in record.items() if k.endswith("_s") or k.startswith(("sync/", "rollout/"))
            }
            figures |= {f"refresh {num_refreshes} {key}": value for key, value in shown.items()}
    return figures | {"num_refreshes": num_refreshes}


def few_gpus(num: int) -> Callable[[Setting], str]:
    """The reason why a step for several GPUs cannot run; "" if it can."""

    def obstacle(setting: Setting) -> str:
        return "" if setting.num_gpus >= num else f"needs {num} GPUs, this machine has {setting.num_gpus}"

    return obstacle


def _filled(words: Iterable[str], setting: Setting) -> list[str]:
    """Replaces {names} in flags by the setting's values."""
    values = asdict(setting.sizes) | asdict(setting) | {"figures_file": setting.figures_file}
    return [word.format(**values) for word in words]


README_FLAGS = """
    --hf-model {model} --train-data {data} --objective rasft --rollout-engine embedded
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --bf16
    --seq-length {seq_length} --micro-batch-size {micro_batch_size} --global-batch-size {global_batch_size}
    --lr 1e-5 --lr-decay-style cosine --rasft-metrics {folder}/metrics.jsonl
    --train-iters 3 --rasft-refresh-interval 3 --rollout-max-new-tokens {max_new_tokens}
""".split()
"""Flags of README's command for one node, with a smaller batch and only three steps.

Only the first run saves, because a save takes a minute.
"""


def training(num_processes: int, more: str = "") -> Callable[[Setting], Command]:
    """Builds README's command for one node with ``num_processes`` GPUs, with the flags ``more``."""
    return lambda setting: Command(
        program=["pretrain_rasft.py", *_filled([*README_FLAGS, *more.split()], setting)],
        num_processes=num_processes,
        variables={
            "NVTE_DEBUG": "1",
            "NVTE_DEBUG_LEVEL": "1",
        },  # makes Transformer Engine log the attention kernels, once per choice
    )


def benchmark(program: str, flags: str) -> Callable[[Setting], Command]:
    """Builds the command of a file of benchmarks/ on one GPU."""
    return lambda setting: Command(
        program=[f"benchmarks/{program}", *_filled([*flags.split(), "--json", "{figures_file}"], setting)],
        num_processes=1,
    )


def _versions(setting: Setting) -> Command:
    return Command(program=["tools/gpu_checking/machine.py", "--json", str(setting.figures_file)])


def _material(setting: Setting) -> Command:
    shape, output = setting.shape, str(setting.material)
    return Command(program=["tools/gpu_checking/material.py", "--shape", shape, "--output", output])


def _gpu_tests(setting: Setting) -> Command:
    return Command(program=["-m", "pytest", "-m", "gpu", "tests/gpu", "-v", "-p", "no:cacheprovider"])


def _test_results(folder: Path) -> dict[str, Figure]:
    """Reads each test's result from pytest's output, which also has the results of the tests before one that hung."""
    log = (folder / OUTPUT_FILE).read_text(encoding="utf-8", errors="replace")
    results = dict(re.findall(r"^(\S+::\S+) (PASSED|FAILED|ERROR|SKIPPED)", log, re.MULTILINE))
    counts = Counter(results.values())
    return {"num_passed": counts["PASSED"], "num_skipped": counts["SKIPPED"], **results}


def _logprobs(setting: Setting) -> Command:
    return Command(
        program=[
            "benchmarks/logprobs.py",
            *_filled([*setting.sizes.logprobs, "--json", "{figures_file}"], setting),
        ]
    )


def _logprob_figures(folder: Path) -> dict[str, Figure]:
    """Reads the bar and the times. The counts are the same on every machine, so they are left out."""
    figures = benchmark_figures(folder)
    shown = {name: value for name, value in figures.items() if not name.startswith("counted")}
    return {"num_timed": sum(name.endswith(" ms") for name in figures), **shown}


def _colocated(setting: Setting) -> Command:
    program = ["tools/gpu_checking/colocated.py", "--sglang-python", "{sglang_python}", "--model", "{model}"]
    trainer = training(
        1, "--rollout-engine sglang --sync-method tensor --train-iters 4 --rasft-refresh-interval 2"
    )
    return Command(
        program=[*_filled([*program, "--folder", "{folder}", "--"], setting), *trainer(setting).line]
    )


def _no_server(setting: Setting) -> str:
    return "" if setting.sglang_python else "no --sglang-python was given"


_RATIO = {"step 1 ratio_mean": (0.99, 1.01)}
"""At the first step the policy and the reference have the same weights, so their ratio must be 1."""

_AMOUNT = """
    --bf16 --seq-length {packed_length} --micro-batch-size 1 --num-samples {num_samples} --mean-tokens {mean_tokens}
"""
_STEP_FLAGS = f"--shape {{shape}} --steps 3 --use-distributed-optimizer {_AMOUNT}"
_TRAINER_FLAGS = f"--hf-model {{model}} --use-distributed-optimizer {_AMOUNT}"

_STEP_FIGURES = tuple(
    f"measured {kind} {layout} {figure}"
    for kind in ("megatron sft", "sft", "rasft")
    for layout in ("packed", "padded")
    for figure in ("tokens_per_s", "peak_memory_gib")
)

_GENERATION_FLAGS = """
    --shape {shape} --bf16 --rows {rows} --rounds 4 --new-tokens {generated_tokens} --mean-tokens {mean_generated_tokens}
"""
"""Flags of the generation benchmark. With four samples of each prompt and four rounds there are as many prompts as rows."""

STEPS = [
    Step(
        name="versions",
        number=1,
        title="Transformer Engine and versions",
        deadline_s=120,
        command=_versions,
        after="",
        figures=benchmark_figures,
        wants=("num_gpus",),
    ),
    Step(
        name="material",
        number=0,
        title="a random model and demonstrations",
        deadline_s=180,
        command=_material,
        after="",
    ),
    Step(
        name="first_run",
        number=2,
        title="README's command for one node, on one GPU",
        deadline_s=300,
        command=training(1, "--save {folder}/save --export-hf {folder}/hf"),
        figures=run_figures,
        bounds=_RATIO | {"num_steps": (3, 3)},
        covers={
            "bf16_kernels": "ratio 1 at the first step",
            "attention_backends": "packed: the kernels and the time of each step",
            "compiled_kernels": "a run with torch.compile, Triton and the decode step's CUDA graph",
        },
    ),
    Step(
        name="first_run_tp2",
        number=2,
        title="README's command for one node, on two GPUs, tensor-parallel",
        deadline_s=300,
        command=training(2, "--tensor-model-parallel-size 2 --sequence-parallel"),
        obstacle=few_gpus(2),
        figures=run_figures,
        bounds=_RATIO | {"num_steps": (3, 3)},
        covers={"nccl": "a run over two GPUs"},
    ),
    Step(
        name="train_step",
        number=4,
        title="training step, BF16",
        deadline_s=240,
        command=benchmark("train_step.py", _STEP_FLAGS),
        figures=benchmark_figures,
        wants=_STEP_FIGURES,
        covers={"speed": "tokens per second of a step", "streams_and_memory": "peak memory of a step"},
    ),
    Step(
        name="train_step_plain",
        number=4,
        title="training step, BF16, log-probabilities without fused kernels",
        deadline_s=240,
        command=benchmark(
            "train_step.py",
            f"{_STEP_FLAGS} --objective-logprob-kernels plain --objective-logprob-chunk-tokens 1024",
        ),
        figures=benchmark_figures,
        wants=_STEP_FIGURES,
    ),
    Step(
        name="train_step_fp8",
        number=4,
        title="training step, FP8 tensorwise",
        deadline_s=240,
        command=benchmark("train_step.py", f"{_STEP_FLAGS} --fp8-format hybrid --fp8-recipe tensorwise"),
        figures=benchmark_figures,
        wants=_STEP_FIGURES,
        covers={"fp8": "a step's speed with tensorwise scaling"},
    ),
    Step(
        name="logprobs",
        number=4,
        title="log-probabilities alone",
        deadline_s=180,
        command=_logprobs,
        after="",
        figures=_logprob_figures,
        bounds={"num_timed": (1, math.inf), "max_bytes_per_logit": (0, 12)},
        covers={"compiled_kernels": "Triton's kernels of the log-probabilities"},
    ),
    Step(
        name="generation",
        number=5,
        title="embedded generation",
        deadline_s=240,
        command=benchmark("generation.py", _GENERATION_FLAGS),
        figures=benchmark_figures,
        wants=("measured tokens_per_s", "measured host_gib_before", "measured host_gib_after"),
        covers={
            "speed": "tokens per second of generation",
            "streams_and_memory": "peak memory of generation",
        },
    ),
    Step(
        name="padded_run",
        number=0,
        title="a run with padded batches",
        deadline_s=180,
        command=training(1, "--rasft-batch-layout padded --curriculum-mode off"),
        figures=run_figures,
        bounds=_RATIO | {"num_steps": (3, 3)},
        covers={"attention_backends": "padded: the kernels and the time of each step"},
    ),
    Step(
        name="fp8_delayed",
        number=6,
        title="a run in FP8 with delayed scaling",
        deadline_s=240,
        command=training(1, "--fp8-format hybrid --fp8-recipe delayed"),
        figures=run_figures,
        bounds={f"step {step} ratio_mean": (0.95, 1.05) for step in (1, 2, 3)} | {"num_steps": (3, 3)},
        covers={"fp8": "ratio of the first three steps"},
    ),
    Step(
        name="swap_and_save",
        number=7,
        title="swap of the reference, and a save",
        deadline_s=240,
        command=benchmark("swap_and_save.py", f"{_TRAINER_FLAGS} --save {{folder}}/save"),
        figures=benchmark_figures,
        wants=("first_swap_s", "swap_s", "save blocked_s", "save until_written_s", "peak_memory_gib"),
        covers={"speed": "seconds of a swap and a save"},
    ),
    Step(
        name="async_save",
        number=7,
        title="a save in the background",
        deadline_s=240,
        command=benchmark("swap_and_save.py", f"{_TRAINER_FLAGS} --save {{folder}}/save --async-save"),
        figures=benchmark_figures,
        wants=(
            "step_s",
            "save blocked_s",
            "save until_written_s",
            "save steps_meanwhile",
            "save step_s_meanwhile",
        ),
    ),
    Step(
        name="colocated",
        number=8,
        title="a rollout server on the trainer's GPU through two refreshes",
        deadline_s=420,
        command=_colocated,
        obstacle=_no_server,
        figures=run_figures,
        bounds=_RATIO | {"num_refreshes": (2, 2)},
        covers={
            "cuda_ipc": "two refreshes",
            "speed": "seconds of a sync",
            "streams_and_memory": "peak memory of a sync",
        },
    ),
    Step(
        # few micro-batches, because reading a profile takes longer than the step
        name="profile",
        number=9,
        title="profile of one step",
        deadline_s=150,
        command=benchmark("step_profile.py", f"{_TRAINER_FLAGS} --num-samples 16"),
        figures=benchmark_figures,
        wants=("first_kernel_after_ms", "idle_frac", "num_kernels"),
    ),
    Step(
        name="generation_cudnn",
        number=5,
        title="embedded generation with cuDNN's attention",
        deadline_s=240,
        command=benchmark("generation.py", f"{_GENERATION_FLAGS} --cudnn-attention"),
        figures=benchmark_figures,
        wants=("measured tokens_per_s", "measured host_gib_before", "measured host_gib_after"),
    ),
    Step(
        name="gpu_tests",
        number=3,
        title="tests/gpu",
        deadline_s=540,
        command=_gpu_tests,
        after="",
        figures=_test_results,
        bounds={"num_passed": (1, math.inf)},
        covers={
            "fp8": "test_fp8_trains_with_every_recipe",
            "bf16_kernels": "test_bf16_trains_as_the_cpu_does",
            "thd_context_parallel": "test_two_gpus_train_as_the_cpu_does[context]",
            "grouped_gemm": "test_mixture_with_grouped_gemm_trains_as_the_cpu_does",
            "nccl": "test_two_gpus_train_as_the_cpu_does",
            "cuda_ipc": "test_another_process_reads_a_bucket_over_cuda_ipc",
            "streams_and_memory": "test_losses_are_the_same_with_blocking_launches",
            "compiled_kernels": "test_sampled_logprobs_equal_those_of_training, "
            "test_logprobs_kl_and_gradients_equal_the_formula",
            "optimizer_variants": "test_precision_aware_optimizer_trains_and_resumes",
        },
    ),
]
