"""The pre-registered rules of PREREGISTRATION.md, applied to the results that exist."""

import statistics
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from examples.proving_ground.kept import Result, Scores
from examples.proving_ground.worlds import KINDS, RETAINED
from megatron_rasft.tools.evaluation.statistics import paired_interval

CANDIDATES = {
    "rasft": "",
    "guided_full_rate": "",
    "guided_short": "",
    "guided_failures": "",
    "rasft_advantage": "advantage_placebo",
}
"""Candidate -> its control; "" for none."""
RIVALS = ("dft", "raft", "sft_grpo")
PLAIN = "unguided_full_rate"
"""The rule whose retained skills a candidate must reach."""

LOWEST_DIFFERENCE = -1.0
"""In each world the interval of the difference from the best rival is above this, in points."""
SMALLEST_GAIN = 3.0
"""The mean over the worlds is this much above each rival, in points."""

BySeed = Mapping[int, Result]


def lines(results: Sequence[Result], worlds: Sequence[str]) -> list[str]:
    """Returns a line for each candidate and rule, with its numbers. Each comparison uses the seeds that both methods have.

    None for a candidate without a world in which it and all rivals have a seed in common.
    """
    found = []
    for candidate, control in CANDIDATES.items():
        complete = [world for world in worlds if _shared(results, world, (candidate, *RIVALS))]
        if complete:
            rules = [
                *(_rule_1(results, candidate, world) for world in complete),
                *(_rule_2(results, candidate, complete, rival) for rival in RIVALS),
                *_rule_3(results, candidate, complete),
                *(_control_rule(results, candidate, control, complete) if control else []),
            ]
            found += [f"{candidate}: {rule}" for rule in rules]
    return found


def by_seed(results: Iterable[Result], world: str, method: str) -> dict[int, Result]:
    """Returns the results of a method in a world."""
    return {r.seed: r for r in results if r.world == world and r.method == method}


def _shared(results: Sequence[Result], world: str, methods: Sequence[str]) -> list[int]:
    """Seeds that all methods have in a world."""
    return sorted(set.intersection(*(set(by_seed(results, world, method)) for method in methods)))


def _scores(
    results: Sequence[Result], world: str, method: str, seeds: Sequence[int], kinds: Sequence[str]
) -> Scores:
    found = by_seed(results, world, method)
    return np.stack([found[seed].scores(kinds) for seed in seeds])


def _rule_1(results: Sequence[Result], candidate: str, world: str) -> str:
    seeds = _shared(results, world, (candidate, *RIVALS))
    scores = {method: _scores(results, world, method, seeds, KINDS) for method in (candidate, *RIVALS)}
    best = max(RIVALS, key=lambda rival: scores[rival].mean())
    low, high = paired_interval(scores[candidate], scores[best], pairs_seeds=True)
    mean = 100 * float(scores[candidate].mean() - scores[best].mean())
    return (
        f"1. {world}: {mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] from the best, {best}, with {_seeds(seeds)}. "
        f"{_verdict(100 * low > LOWEST_DIFFERENCE)}: the lower end must be above {LOWEST_DIFFERENCE:g}."
    )


def _rule_2(results: Sequence[Result], candidate: str, worlds: Sequence[str], rival: str) -> str:
    mean = 100 * _mean_difference(results, worlds, candidate, rival, KINDS)
    return (
        f"2. Mean over {_worlds(worlds)}: {mean:+.1f} from {rival}. {_verdict(mean >= SMALLEST_GAIN)}: "
        f"it must be at least {SMALLEST_GAIN:+g}."
    )


def _rule_3(results: Sequence[Result], candidate: str, worlds: Sequence[str]) -> list[str]:
    found = [world for world in worlds if _shared(results, world, (candidate, PLAIN))]
    if not found:
        return []
    mean = 100 * _mean_difference(results, found, candidate, PLAIN, RETAINED)
    return [
        f"3. Retained skills, mean over {_worlds(found)}: {mean:+.1f} from {PLAIN}. {_verdict(mean >= 0)}: "
        "it must not be below 0."
    ]


def _control_rule(
    results: Sequence[Result], candidate: str, control: str, worlds: Sequence[str]
) -> list[str]:
    found = [world for world in worlds if _shared(results, world, (candidate, control))]
    shared = [set(_shared(results, world, (candidate, control))) for world in found]
    seeds = sorted(set.intersection(*shared)) if shared else []
    if not seeds:
        return []
    of_control, of_candidate = (
        np.concatenate([_scores(results, world, method, seeds, KINDS) for world in found], axis=1)
        for method in (control, candidate)
    )
    low, high = paired_interval(of_control, of_candidate, pairs_seeds=True)
    mean = 100 * (of_control.mean() - of_candidate.mean())
    return [
        f"{control}, over {_worlds(found)}: {mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] from {candidate}, with "
        f"{_seeds(seeds)}. {_verdict(high < 0)}: the interval must be below 0."
    ]


def _mean_difference(
    results: Sequence[Result], worlds: Sequence[str], ours: str, theirs: str, kinds: Sequence[str]
) -> float:
    """Mean over the worlds of the difference of two methods."""
    differences = []
    for world in worlds:
        seeds = _shared(results, world, (ours, theirs))
        means = [float(_scores(results, world, name, seeds, kinds).mean()) for name in (ours, theirs)]
        differences.append(means[0] - means[1])
    return statistics.fmean(differences)


def _verdict(is_met: bool) -> str:
    return "Met" if is_met else "Not met"


def _seeds(seeds: Sequence[int]) -> str:
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"


def _worlds(worlds: Sequence[str]) -> str:
    return f"{len(worlds)} {'world' if len(worlds) == 1 else 'worlds'}"
