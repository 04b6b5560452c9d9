"""Records ten short runs, to show that a change does not alter their numbers.

    python -m tests.recorded_runs before.json            at the commit before the change
    python -m tests.recorded_runs after.json before.json after it: lists every run and value that differ

A recording has the loss, gradient norm and number of samples of each step, the tokens, log-probabilities, verdict and weight of each
rollout, and the exported weights. They are compared bit for bit, so both recordings must be made on the same machine.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from signal import SIGTERM
from typing import Any

from safetensors.torch import load_file

from tests.functional import launching
from tests.functional.conftest import Workshop, build_workshop
from tests.functional.launching import Interruption
from tests.servers.running import NEWEST, ServerPool


@dataclass(kw_only=True)
class Case:
    """One run: flags in addition to the workshop's, number of ranks, and the step after which it is stopped and resumed."""

    flags: tuple[str, ...] = ()
    world_size: int = 1
    stop_after: int | None = None
    uses_server: bool = False


CASES = {
    "rasft": Case(),
    "rasft_published_padded": Case(
        flags=(
            *("--rasft-weighting", "published", "--no-verify-filter-format"),
            *("--rasft-batch-layout", "padded", "--micro-batch-size", "2"),
        )
    ),
    "rasft_band_tp2_sp": Case(
        flags=("--curriculum-mode", "band", "--tensor-model-parallel-size", "2", "--sequence-parallel"),
        world_size=2,
    ),
    "asft_pp2": Case(
        flags=("--objective", "asft", "--pipeline-model-parallel-size", "2"),
        world_size=2,
    ),
    "grpo_cp2": Case(flags=("--objective", "grpo", "--context-parallel-size", "2"), world_size=2),
    "gft_dp2_resumed": Case(flags=("--objective", "gft"), world_size=2, stop_after=3),
    "sft_kl_resumed": Case(flags=("--objective", "sft_kl"), stop_after=2),
    "psft_bf16": Case(flags=("--objective", "psft", "--bf16")),
    "raft_recompute": Case(
        flags=(
            "--objective",
            "raft",
            "--recompute-granularity",
            "full",
            "--recompute-method",
            "uniform",
            "--recompute-num-layers",
            "1",
        )
    ),
    "rasft_sglang": Case(
        flags=("--rollout-engine", "sglang", "--rollout-temperature", "0"), uses_server=True
    ),
}
STEPS = 5


def record(case: Case, name: str, workshop: Workshop, pool: ServerPool) -> dict[str, Any]:
    """Runs one case, in two parts if it is stopped and resumed, and returns its record."""
    save = workshop.root / name
    exported = workshop.root / f"{name}-exported"
    flags = ["--save", str(save), "--train-iters", str(STEPS), "--export-hf", str(exported), *case.flags]
    if case.uses_server:
        flags += ["--rollout-urls", pool.get(NEWEST, workshop.policy, "--dtype", "float32").url]
    flags = workshop.flags(*flags)
    if case.stop_after is not None:
        outcome = launching.run(
            workshop.root / f"{name}-stopped-logs",
            flags,
            case.world_size,
            interruption=Interruption(step=case.stop_after, number=SIGTERM),
        )
        assert outcome.codes == [0] * case.world_size, outcome.output
    launching.succeed(workshop.root / f"{name}-logs", flags, case.world_size)
    weights = hashlib.sha256()
    tensors = {k: v for file in exported.glob("*.safetensors") for k, v in load_file(file).items()}
    for tensor_name, tensor in sorted(tensors.items()):
        weights.update(tensor_name.encode() + tensor.float().numpy().tobytes())
    steps = launching.steps(save)
    return {
        "loss": [steps[number]["objective/loss"] for number in sorted(steps)],
        "grad_norm": [steps[number]["training/grad_norm"] for number in sorted(steps)],
        "num_samples": [steps[number]["training/num_samples"] for number in sorted(steps)],
        "rollouts": rollouts_of(save, has_logprobs=not case.uses_server),
        "weights": weights.hexdigest(),
    }


def rollouts_of(save: Path, *, has_logprobs: bool) -> list[list[Any]]:
    """The rollouts of a run with their verdicts, in the order of the file.

    Log-probabilities of a rollout server are left out. Their last bits differ between runs, because the server's batches depend on the
    times at which requests arrive.
    """
    store = save / "rollouts.jsonl"
    if not store.exists():
        return []
    rows = [json.loads(line) for line in store.read_text().splitlines()]
    keys = [
        "problem_id",
        "sample_index",
        "weight_version",
        "response_ids",
        "verdict",
        "filtered_by",
        "weight",
    ]
    if has_logprobs:
        keys.append("response_logprobs")
    return [[row[key] for key in keys] for row in rows]


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Returns one line for each value of each run that differs."""
    lines = [f"{name}: recorded only once" for name in sorted(before.keys() ^ after.keys())]
    for name in sorted(before.keys() & after.keys()):
        lines += [
            f"{name}: {key} differs" for key, value in before[name].items() if after[name][key] != value
        ]
    return lines


def main(output: Path, before: Path | None) -> int:
    """Records every case. Returns exit code 1 if one differs from ``before``."""
    records = {}
    with tempfile.TemporaryDirectory() as folder:
        workshop = build_workshop(Path(folder))
        (Path(folder) / "servers").mkdir()
        pool = ServerPool(Path(folder) / "servers")
        try:
            for name, case in CASES.items():
                records[name] = record(case, name, workshop, pool)
                print(
                    f"{name}: losses {records[name]['loss']}, {len(records[name]['rollouts'])} rollouts",
                    flush=True,
                )
        finally:
            pool.close()
    output.write_text(json.dumps(records))
    if before is None:
        return 0
    lines = differences(json.loads(before.read_text()), records)
    print("\n".join(lines) or f"the {len(records)} runs are bit-equal to those of {before}")
    return int(bool(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="file for the recording")
    parser.add_argument("before", type=Path, nargs="?", help="an earlier recording, to compare with")
    flags = parser.parse_args()
    sys.exit(main(flags.output, flags.before))
