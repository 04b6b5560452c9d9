"""The model's card, and a run's settings beside the defaults and other runs'."""

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

from megatron_rasft.config import RasftConfig
from megatron_rasft.tools.report.markup import Content, tag
from megatron_rasft.tools.report.records import RunRecords
from megatron_rasft.tools.report.views import RunView, table


def configuration(views: Sequence[RunView]) -> Content:
    """Cards, what differs between runs, what differs from the defaults, and everything."""
    cards = [
        [
            tag("h3", f"Model card of {view.name}" if len(views) > 1 else "Model card"),
            table(list(map(list, view.records.card.items())), class_="facts"),
        ]
        for view in views
        if view.records.card
    ]
    configured = [view for view in views if view.records.config]
    if not configured:
        return [cards, tag("p", "No config.json: the settings of the run are not known.", class_="missing")]
    ours = [_settings(view.records) for view in configured]
    hosts = [{k: str(v) for k, v in view.records.config["megatron"].items()} for view in configured]
    own = {flag.removeprefix("--").replace("-", "_") for one in ours for flag in one}
    hosts = [{f"--{k.replace('_', '-')}": v for k, v in host.items() if k not in own} for host in hosts]
    defaults = _defaults()
    names = list(dict.fromkeys(name for one in ours for name in one))
    changed = [n for n in names if any(one.get(n) != defaults.get(n) for one in ours)]
    head = ["flag", "default", *(view.name if len(configured) > 1 else "value" for view in configured)]
    parts: list[Content] = [cards]
    if len(configured) > 1:
        all_names = list(dict.fromkeys([*names, *(name for host in hosts for name in host)]))
        both = [one | host for one, host in zip(ours, hosts)]
        differing = [n for n in all_names if len({one.get(n) for one in both}) > 1]
        rows = [[tag("code", n), defaults.get(n, "–"), *(one.get(n, "–") for one in both)] for n in differing]
        parts += [tag("h3", "What differs between the runs"), table(rows, head, class_="settings")]
    rows = [[tag("code", n), defaults.get(n, "–"), *(one.get(n, "–") for one in ours)] for n in changed]
    parts += [tag("h3", "Set otherwise than the default"), table(rows, head, class_="settings")]
    rows = [[tag("code", n), defaults.get(n, "–"), *(one.get(n, "–") for one in ours)] for n in names]
    parts.append(
        tag(
            "details",
            tag("summary", f"All {len(names)} settings of megatron_rasft"),
            table(rows, head, class_="settings"),
        )
    )
    host_names = [
        n
        for n in dict.fromkeys(n for host in hosts for n in host)
        if any(h.get(n, "None") != "None" for h in hosts)
    ]
    rows = [[tag("code", n), *(host.get(n, "–") for host in hosts)] for n in host_names]
    host_head = [head[0], *head[2:]]
    parts.append(
        tag(
            "details",
            tag("summary", f"{len(host_names)} arguments of Megatron"),
            table(rows, host_head, class_="settings"),
        )
    )
    return parts


def _settings(records: RunRecords) -> dict[str, str]:
    return {
        f"--{name.replace('_', '-')}": _shown(value)
        for room in records.config["rasft"].values()
        for name, value in room.items()
    }


def _defaults() -> dict[str, str]:
    found = {}
    for room in RasftConfig.rooms().values():
        for one in fields(room):
            value = one.default if one.default_factory is MISSING else one.default_factory()
            found[f"--{one.name.replace('_', '-')}"] = "–" if value is MISSING else _shown(value)
    return found


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return (
        {None: "none", True: "yes", False: "no"}.get(value, str(value))
        if value is None or isinstance(value, bool)
        else str(value)
    )
