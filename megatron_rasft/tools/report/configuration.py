"""Section "Configuration": the model card, and settings beside their defaults and the settings of other runs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_rasft.config import RasftConfig
from megatron_rasft.flags import flag_name
from megatron_rasft.tools.report.views import RunView

Settings = dict[str, str]
"""Flag -> value as text."""
Row = tuple[str, list[str]]
"""A flag and its values: the default, if known, then the value of each run."""


def configuration(views: Sequence[RunView]) -> dict[str, Any]:
    """Returns the model cards, and tables of settings of the runs that have a config.json."""
    configured = [view for view in views if view.records.config]
    ours = [_settings(view.records.config["rasft"]) for view in configured]
    defaults = _defaults()
    hosts = [_host_settings(view.records.config["megatron"], defaults) for view in configured]
    names = _union(ours)
    host_names = [name for name in _union(hosts) if any(host.get(name, "None") != "None" for host in hosts)]
    both = [one | host for one, host in zip(ours, hosts)]
    differing = [name for name in _union(both) if len({one.get(name) for one in both}) > 1]
    changed = [name for name in names if any(name in one and one[name] != defaults.get(name) for one in ours)]
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
    return {flag_name(name): _text(value) for package in packages.values() for name, value in package.items()}


def _host_settings(arguments: Mapping[str, Any], ours: Settings) -> Settings:
    """Megatron's own arguments. Its namespace also contains this project's, even for objectives that the run does not use."""
    settings = {flag_name(name): str(value) for name, value in arguments.items()}
    return {name: value for name, value in settings.items() if name not in ours}


def _defaults() -> Settings:
    return {
        flag_name(name): _text(default)
        for section in RasftConfig.sections().values()
        for name, default in section.flag_fields().items()
    }


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value)
