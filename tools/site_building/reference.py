"""The generated pages: every flag of a run, from ``config/``, the flags of tools, and every metric, from ``metrics.py``."""

import ast
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from megatron_rasft import metrics
from megatron_rasft.config import RasftConfig
from megatron_rasft.flags import FlagSection, flag_name
from megatron_rasft.tools.capacity.config import AssumptionConfig, CapacityConfig
from megatron_rasft.tools.evaluation.config import EvaluationConfig

_FLAGS_START = """\
# Flags

The flags that this project adds to Megatron's. Their fields are in [config](../../megatron_rasft/config/__init__.py), and
`pretrain_rasft.py --help=WORD` prints the same texts. Every Megatron flag either works under its own name or is refused with an error
that names it; `--help=megatron` lists them. A switch has the form `--flag` or `--no-flag`. `--config FILE.toml` reads flags from a file,
in which they have the same names.
"""
_TOOL_FLAGS_START = """\
# Flags of tools

The flags of `tools/plan.py` and `tools/evaluate.py` that are fields of a class, with their ranges. The other flags of these tools, and those of other
tools, are in the output of `--help`.
"""
_METRICS_START = """\
# Metrics

A name consists of the package that computes the metric, the quantity, and its unit unless it is a count or a share. A mean is computed
once, from sum and count over the global batch. `metrics.jsonl` in `--save` has one line for each step, each refresh and each
measurement of the held-out solve rate. Their names are in [metrics.py](../../megatron_rasft/metrics.py).
"""

TOOL_SECTIONS: dict[str, type[FlagSection]] = {
    "tools/plan.py: the run": CapacityConfig,
    "tools/plan.py: assumptions": AssumptionConfig,
    "tools/evaluate.py": EvaluationConfig,
}
"""Title of each group of a tool's flags -> its dataclass."""

FURTHER_METRICS = {
    "objective/weight_mean": "Mean factor of -log p over the response tokens.",
    "objective/p_mean": "Mean probability of the response tokens.",
    "objective/ref_logprob_gap_nats": "Mean difference of the policy's and the reference's log-probabilities.",
    "objective/kl_nats": "Mean KL between policy and reference; objectives with a KL.",
    "objective/teacher_kl_nats": "Mean of log p minus the teacher's on rollouts, an estimate of the KL from policy to teacher; sdft.",
    "objective/policy_ratio_mean": "Mean ratio of the policy to the policy at the last refresh; psft and grpo.",
    "objective/clip_frac": "Share of tokens whose ratio the clip changed; psft and grpo.",
    "objective/dual_clip_frac": "Share of tokens that --objective-grpo-dual-clip limited.",
    "objective/kept_frac": "Share of response tokens above --objective-profit-threshold.",
    "objective/full_gradient_frac": "Share of tokens of gft with the full gradient.",
    "verify/VERDICT_frac": "Share of rollouts with each verdict: correct, wrong, unverifiable, timeout.",
    "rollout/requested": "Samples that the servers were asked for.",
    "rollout/failed": "Samples that no server returned.",
    "rollout/retried": "Requests that were sent a second time.",
    "rollout/resumed": "Responses that were continued after another client had aborted them.",
    "rollout/turned_away": "Requests that a server refused because its queue was full.",
    "rollout/servers": "Servers that returned samples.",
    "rollout/quarantined_servers": "Servers that were left out during the refresh.",
    "rollout/tokens_per_s": "Tokens per second of all servers.",
    "sync/PHASE_s": "Time of each phase of the weight sync: connect, pause, gather, hash, export, send, wait, transfer, release.",
}
"""Metrics whose names are put together while a run goes on."""


def flags_page() -> str:
    """One section for each group of flags, with one table row for each flag."""
    return _page(_FLAGS_START, RasftConfig.sections())


def tool_flags_page() -> str:
    """The same for the tools whose flags are fields."""
    return _page(_TOOL_FLAGS_START, TOOL_SECTIONS)


def _page(start: str, sections: Mapping[str, type[FlagSection]]) -> str:
    parts = [start]
    for title, section in sections.items():
        parts += [f"## {title[:1].upper()}{title[1:]}", " ".join((section.__doc__ or "").split())]
        parts.append(
            "\n".join(["| flag | default | values | meaning |", "| --- | --- | --- | --- |", *_rows(section)])
        )
    return "\n\n".join(parts) + "\n"


def _rows(section: type[FlagSection]) -> Iterator[str]:
    docs, rules = section.docs(), section.rules()
    for name, default in section.flag_fields().items():
        values = str(rules.get(name, "")) or _type_name(section.types()[name])
        meaning = docs[name] + " " + getattr(rules.get(name), "meanings", "")
        yield f"| `{flag_name(name)}` | {_cell(_shown(default))} | {_cell(values)} | {_cell(meaning)} |"


def _shown(default: Any) -> str:
    if default is None or default in ("", []):
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    return " ".join(map(str, default)) if isinstance(default, (list, tuple)) else f"{default}"


def _type_name(kind: Any) -> str:
    return {bool: "switch", int: "integer", float: "number", str: "text"}.get(kind, "")


def _cell(text: str) -> str:
    """Text in a Markdown table: nothing in it is Markdown or HTML."""
    marks = str.maketrans({mark: "\\" + mark for mark in "\\`*_[]|"})
    return escape(" ".join(text.split()), quote=False).translate(marks)


def metrics_page() -> str:
    """One table for each package."""
    packages: dict[str, list[str]] = {}
    for name, meaning in metric_meanings().items():
        packages.setdefault(name.partition("/")[0], []).append(f"| `{name}` | {_cell(meaning)} |")
    tables = [
        "\n".join([f"## {package}\n", "| metric | meaning |", "| --- | --- |", *rows])
        for package, rows in packages.items()
    ]
    return "\n\n".join([_METRICS_START, *tables]) + "\n"


def metric_meanings() -> dict[str, str]:
    """Name of each metric -> its meaning: the string below its constant in ``metrics.py``, or "" without one."""
    with open(metrics.__file__, encoding="utf-8") as file:
        body = ast.parse(file.read()).body
    found: dict[str, str] = {}
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            has_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            found[str(node.value.value)] = str(following.value.value) if has_text else ""  # type: ignore[union-attr]
    return found | FURTHER_METRICS
