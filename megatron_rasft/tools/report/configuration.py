"""Section "Configuration": the model card, and settings beside their defaults and those of other runs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from megatron_rasft.config import RasftConfig
from megatron_rasft.tools.report.views import RunView

Settings = dict[str, str]
"""Flag -> value as text."""
Row = tuple[str, list[str]]
"""A flag and its values: the default if known, then each run's."""


def configuration(views: Sequence[RunView]) -> dict[str, Any]:
    """Returns the model cards, and tables of settings of the runs that have a config.json."""
    configured = [view for view in views if view.records.config]
    ours = [_settings(view.records.config["rasft"]) for view in configured]
    hosts = [_host_settings(view.records.config["megatron"], one) for view, one in zip(configured, ours)]
    defaults = _defaults()
    names = _union(ours)
    host_names = [name for name in _union(hosts) if any(host.get(name, "None") != "None" for host in hosts)]
    both = [one | host for one, host in zip(ours, hosts)]
    differing = [name for name in _union(both) if len({one.get(name) for one in both}) > 1]
    changed = [name for name in names if any(one.get(name) != defaults.get(name) for one in ours)]
    return {
        "cards": [(view.name, list(view.records.card.items())) for view in views if view.records.card],
        "names": [view.name for view in configured],
        "differing": _rows(differing, [defaults, *both]),
        "changed": _rows(changed, [defaults, *ours]),
        "all": _rows(names, [defaults, *ours]),
        "host": _rows(host_names, hosts),
    }


def _rows(names: Iterable[str], columns: Sequence[Settings]) -> list[Row]:
    return [(name, [column.get(name, "–") for column in columns]) for name in names]


def _union(settings: Iterable[Settings]) -> list[str]:
    return list(dict.fromkeys(name for one in settings for name in one))


def _settings(packages: Mapping[str, Mapping[str, Any]]) -> Settings:
    return {_flag(name): _text(value) for package in packages.values() for name, value in package.items()}


def _host_settings(arguments: Mapping[str, Any], ours: Settings) -> Settings:
    """Megatron's own arguments. Its namespace also holds this project's."""
    settings = {_flag(name): str(value) for name, value in arguments.items()}
    return {name: value for name, value in settings.items() if name not in ours}


def _defaults() -> Settings:
    found = {}
    for package in RasftConfig.rooms().values():
        for one in fields(package):
            value = one.default if one.default_factory is MISSING else one.default_factory()
            found[_flag(one.name)] = "–" if value is MISSING else _text(value)
    return found


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value)
