"""Writes random metrics and rollouts in the format of a run."""

import json
import math
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_rasft.types import Rollout

REASONS = {"correct": "same text", "wrong": "not equal", "unverifiable": "answer is prose", "timeout": ""}


def write_run(
    folder: Path,
    *,
    num_steps: int = 12,
    interval: int = 3,
    num_problems: int = 8,
    num_samples: int = 4,
    max_tokens: int = 40,
    seed: int = 0,
    lag: int = 0,
) -> Path:
    """Writes metrics.jsonl and rollouts.jsonl. Refreshes sample the even and the odd problems in turn."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    time = 1_700_000_000.0
    with (
        (folder / "metrics.jsonl").open("w", encoding="utf-8") as metrics,
        (folder / "rollouts.jsonl").open("w", encoding="utf-8") as store,
    ):

        def record(event: str, step: int, **values: float) -> None:
            named = {k.replace("__", "/"): v for k, v in values.items()}
            metrics.write(json.dumps({"event": event, "step": step, "time": time, **named}) + "\n")

        record("refresh", 0, heldout__solve_rate=0.125, heldout__truncated_frac=0.5)
        for step in range(num_steps):
            if step % interval == 0:
                progress = step / num_steps
                rollouts = []
                for number in range(step // interval % 2, num_problems, 2):
                    ease = draw.betavariate(0.7, 0.9) * (0.4 + progress)
                    for index in range(num_samples):
                        rollouts.append(_rollout(draw, f"p{number}", index, step, ease, max_tokens, lag))
                store.writelines(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in rollouts)
                time += 40 + 10 * draw.random()
                record("refresh", step, **_refresh_values(rollouts, draw))
            time += 2
            loss = 0.5 * math.exp(-2 * step / num_steps) + 0.05 * draw.random()
            record(
                "step",
                step + 1,
                objective__loss=loss,
                objective__ce_nats=3 * loss,
                objective__ratio_mean=1 - 0.4 * step / num_steps,
                objective__ratio_clip_frac=0.2 * draw.random(),
                objective__demonstration_weight_mean=1.4 - step / num_steps,
                objective__rollout_weight_mean=0.1 + 0.1 * draw.random(),
                training__grad_norm=math.exp(draw.gauss(0, 1)),
                training__learning_rate=1e-5 * (1 - step / num_steps),
                training__num_samples=20,
                training__num_tokens=1000 + step,
                training__step_s=2.0,
                training__tokens_per_s=(1000 + step) / 2,
            )
        time += 5
        record("refresh", num_steps, heldout__solve_rate=0.4375, heldout__truncated_frac=0.0625)
    return folder


def _rollout(
    draw: random.Random, problem_id: str, index: int, step: int, ease: float, max_tokens: int, lag: int
) -> Rollout:
    length = min(max_tokens, 1 + int(draw.lognormvariate(math.log(max_tokens) - 0.7, 0.6)))
    is_cut = length == max_tokens
    verdict: Any = "correct" if draw.random() < ease and not is_cut else "wrong"
    if verdict == "wrong" and draw.random() < 0.05:
        verdict = draw.choice(("unverifiable", "timeout"))
    age = min(step, lag)
    return Rollout(
        problem_id=problem_id,
        sample_index=index,
        weight_version=step - age,
        prompt_ids=[1, 2, 3],
        response_ids=list(range(length)),
        response_logprobs=[-0.5] * length,
        finish_reason="length" if is_cut else "stop",
        text=f"the answer of {problem_id} is \\boxed{{{index}}}",
        verdict=verdict,
        verdict_reason="truncated" if is_cut else REASONS[verdict],
        weight=0.1 if verdict == "correct" else 0.0,
        policy_age=age,
    )


def _refresh_values(rollouts: list[Rollout], draw: random.Random) -> dict[str, float]:
    shares = {}
    for verdict in REASONS:
        count = sum(r.verdict == verdict for r in rollouts)
        if count:
            shares[f"verify__{verdict}_frac"] = count / len(rollouts)
    return {
        "verify__solve_rate": sum(r.verdict == "correct" for r in rollouts) / len(rollouts),
        "verify__solved_problems_frac": len({r.problem_id for r in rollouts if r.verdict == "correct"})
        / len({r.problem_id for r in rollouts}),
        "rollout__num_rollouts": len(rollouts),
        "rollout__response_tokens_mean": sum(len(r.response_ids) for r in rollouts) / len(rollouts),
        "rollout__generate_s": 30.0,
        "rollout__logprob_gap_nats": 0.01 * draw.random(),
        "sync__total_s": 4.0,
        "sync__gb_per_s": 10 + draw.random(),
        "verify__verify_s": 3.0,
        "training__reference_s": 5.0,
        "curriculum__score_s": 0.0,
        **shares,
    }
