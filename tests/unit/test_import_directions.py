"""The import directions of CONTRIBUTING.md, read from the syntax trees: nothing needs to be importable for this.

Imports inside functions and under TYPE_CHECKING count like any other, and so do constant names given to
importlib.import_module and __import__.
"""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_rasft"
TOP_LEVEL = {
    "types",
    "flags",
    "config",
    "errors",
    "files",
    "metrics",
    "ranks",
    "reasoning_tags",
    "scratch",
    "wording",
}
"""Modules (config: a package) that every package may import; they import each other only, and types nothing."""

PACKAGES = {
    "data",
    "curriculum",
    "servers",
    "rollout",
    "verify",
    "objective",
    "weights",
    "bridge",
    "sync",
    "machine",
    "model",
    "monitoring",
    "generation",
    "checkpoints",
    "training",
    "tools",
}
MAY_ALSO_IMPORT = {
    "bridge": {"weights"},
    "rollout": {"servers"},
    "sync": {"servers", "weights"},
    "config": {"objective"},
    "model": {"bridge", "machine", "weights"},
    "monitoring": {"rollout"},
    "generation": {"machine", "model", "monitoring"},
    "checkpoints": {"data", "machine", "model", "monitoring", "weights"},
}
"""Package -> other packages that it may import.

servers/ has the record and the client of a server, weights/ the layout of the weights that sync/ sends. The flags of an objective
stand in its own file, which does not import torch. The live line of monitoring/ shows the counts of rollout/.
"""

JOINING_PACKAGES = {"training", "tools"}
"""May import other packages."""

MAY_IMPORT_MEGATRON = {"bridge", "checkpoints", "generation", "machine", "model", "training", "tools"}
"""The others take tensors and process groups as arguments."""
MAY_IMPORT_TORCH = MAY_IMPORT_MEGATRON | {"ranks", "objective", "weights", "sync", "monitoring"}
LIGHT_TOOLS = ["tools/capacity", "tools/cli", "tools/data"]
"""The parts of tools/ that work on a machine without torch, such as a laptop."""

MAY_SPEAK_HTTP = {"servers", "rollout"}
MAY_CALL_DEVICES = {"checkpoints", "generation", "machine", "model", "monitoring", "sync", "training"}

HTTP = ("httpx", "requests", "aiohttp", "http.client", "urllib.request", "urllib3")
VAGUE_NAMES = {"utils", "helpers", "common", "misc"}


def imported_names(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything ``tree`` imports; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                kept = len(parts) - node.level + is_package
                base = ".".join([*parts[:kept], *filter(None, [node.module])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def broken_rules(home: str, name: str) -> Iterator[str]:
    """Why a file of ``home`` (a package, a top-level module, or ``__init__``) may not import ``name``."""
    if is_within(name, PACKAGE) and name != PACKAGE:
        target = name.split(".")[1]
        if target == "training" and home not in JOINING_PACKAGES:
            yield "only pretrain_rasft.py and tools/ import training/"
        elif target == "tools" and home != "tools":
            yield "a run imports nothing of tools/"
        elif home == "types":
            yield "types.py imports nothing of this package"
        elif home not in PACKAGES and target in PACKAGES - MAY_ALSO_IMPORT.get(home, set()):
            yield f"{home} is shared and may not import the package {target}/"
        elif home in PACKAGES - JOINING_PACKAGES and target in PACKAGES - {home} - MAY_ALSO_IMPORT.get(
            home, set()
        ):
            yield f"{home}/ may not import the package {target}/: a shared noun belongs in types.py"
    if is_within(name, "torch") and home not in MAY_IMPORT_TORCH:
        yield f"{home} does without torch"
    if is_within(name, "megatron") and home not in MAY_IMPORT_MEGATRON:
        yield f"{home} does without Megatron"
    if is_within(name, "torch.cuda") and home not in MAY_CALL_DEVICES:
        yield f"{home} makes no device calls"
    if any(is_within(name, library) for library in HTTP) and home not in MAY_SPEAK_HTTP:
        yield "only servers/ and rollout/ use HTTP"
    if is_within(name, "sglang"):
        yield "sglang runs in an environment of its own and is never imported"


def import_cycles(root: Path) -> list[str]:
    """The modules that import themselves through others. Imports for type checkers are left out, because they never run."""
    modules = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        tree = WithoutTypeChecking().visit(ast.parse(path.read_text(encoding="utf-8")))
        names = {name for _, name in imported_names(tree, module, path.name == "__init__.py")}
        # ``from a.b import c`` gives a.b.c: a module, or a name in the module a.b
        targets = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module] = targets & modules.keys() - {module}
    # A module that imports none of the others, or that none of them imports, is not in a cycle.
    while ends := {
        m for m in graph if not graph[m] & graph.keys() or all(m not in t for t in graph.values())
    }:
        graph = {module: targets for module, targets in graph.items() if module not in ends}
    return sorted(graph)


class WithoutTypeChecking(ast.NodeTransformer):
    """Removes the blocks under ``if TYPE_CHECKING``."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        return node.orelse if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)


def device_calls(tree: ast.AST) -> Iterator[int]:
    """Lines that name torch.cuda."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and node.attr == "cuda"
            and getattr(node.value, "id", "") == "torch"
        ):
            yield node.lineno


def violations(root: Path) -> list[str]:
    """Every broken rule below ``root``/megatron_rasft, as ``path:line: what: why``."""
    found = []
    package = root / PACKAGE
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        home, where = parts[0], path.relative_to(root)
        if len(parts) > 1 and home not in PACKAGES and home not in TOP_LEVEL:
            found.append(f"{where}:1: {home}/ is an unknown package: enter it in {Path(__file__).name}")
            continue
        if len(parts) == 1 and home not in TOP_LEVEL and home != "__init__":
            found.append(f"{where}:1: {home}.py is not a shared module: move it into a package")
        if VAGUE_NAMES & set(parts):
            found.append(f"{where}:1: {path.stem} is a vague name: name the module for its content")
        is_package = parts[-1] == "__init__"
        module = ".".join([PACKAGE, *parts[: len(parts) - is_package]])
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        for line, name in imported_names(tree, module, is_package):
            found += [f"{where}:{line}: imports {name}: {why}" for why in broken_rules(home, name)]
        if home not in MAY_CALL_DEVICES:
            found += [f"{where}:{n}: torch.cuda: {home} makes no device calls" for n in device_calls(tree)]
    return found


def test_this_checkout_keeps_the_import_directions() -> None:
    assert (ROOT / PACKAGE / "types.py").exists()
    assert violations(ROOT) == []


def test_packages_have_an_order() -> None:
    graphlib.TopologicalSorter(MAY_ALSO_IMPORT).prepare()  # raises CycleError


@pytest.mark.parametrize("package", sorted(MAY_IMPORT_MEGATRON - {"bridge", "machine", "tools"}))
def test_machine_is_imported_before_megatron(package: str) -> None:
    """Each program imports one of these packages before the first file of Megatron, or machine/ itself."""
    tree = ast.parse((ROOT / PACKAGE / package / "__init__.py").read_text())
    assert f"{PACKAGE}.machine" in {name for _, name in imported_names(tree, f"{PACKAGE}.{package}", True)}


def test_no_module_imports_itself_through_others(tmp_path: Path) -> None:
    assert import_cycles(ROOT) == []
    write_tree(tmp_path, "data/reading.py", "from megatron_rasft.data import packing")
    (tmp_path / PACKAGE / "data" / "packing.py").write_text("from megatron_rasft.data.reading import read")
    assert import_cycles(tmp_path) == ["megatron_rasft.data.packing", "megatron_rasft.data.reading"]


def test_light_packages_import_where_torch_and_megatron_are_missing() -> None:
    """Also through what they import: a transitive import would not show in their own syntax."""
    light = [*sorted((TOP_LEVEL | PACKAGES) - MAY_IMPORT_TORCH), *LIGHT_TOOLS]
    modules = []
    for name in light:
        path = ROOT / PACKAGE / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]:
            modules.append(".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    program = (
        "import importlib, sys\n"
        "sys.modules['torch'] = sys.modules['megatron'] = None\n"  # None makes the import raise
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("rollout/store.py", "from megatron_rasft.types import Rollout"),
        ("servers/client.py", "import httpx"),
        ("sync/push.py", "from megatron_rasft.servers.client import ServerClient"),
        ("rollout/store.py", "from .replay import Replay"),
        ("rollout/__init__.py", "from .store import Store"),
        ("data/reading.py", "from megatron_rasft.config.data import DataConfig"),
        ("objective/logprobs.py", "import torch.distributed as dist"),
        ("training/forward.py", "from megatron.core import parallel_state"),
        ("model/attention.py", "from megatron.core import parallel_state"),
        ("generation/decoding.py", "from megatron_rasft.model.attention import RMSNorm"),
        ("checkpoints/checkpointer.py", "from megatron_rasft.monitoring import stalls"),
        ("training/loop.py", "from megatron.training.training import train_step"),
        ("training/loop.py", "from megatron_rasft.verify.pool import VerifierPool"),
        ("tools/evaluation/engine.py", "from megatron_rasft.model.model_chunks import build"),
        ("training/loop.py", "import torch\ntorch.cuda.synchronize()"),
        ("tools/evaluation/sampling.py", "from megatron_rasft.rollout.store import Store"),
        ("sync/streaming.py", "from megatron_rasft.weights.fp8_blocks import BLOCK"),
        ("config/__init__.py", "from megatron_rasft.config.data import DataConfig"),
        ("verify/reward.py", "from megatron_rasft import __version__"),
    ],
)
def test_allowed_imports_pass(tmp_path: Path, file: str, line: str) -> None:
    write_tree(tmp_path, file, line)
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "line", "why"),
    [
        (
            "rollout/store.py",
            "from megatron_rasft.verify.pool import VerifierPool",
            "may not import the package verify/",
        ),
        ("rollout/store.py", "from ..verify.pool import VerifierPool", "may not import the package verify/"),
        ("rollout/__init__.py", "from ..verify import pool", "may not import the package verify/"),
        ("rollout/store.py", "from megatron_rasft import verify", "may not import the package verify/"),
        ("data/reading.py", "import megatron_rasft.curriculum", "may not import the package curriculum/"),
        ("training/run.py", "from megatron_rasft.tools.report import page", "imports nothing of tools/"),
        ("data/reading.py", "def read():\n    import megatron_rasft.training", "only pretrain_rasft.py"),
        ("model/attention.py", "import megatron_rasft.generation", "may not import the package generation/"),
        ("generation/decoding.py", "import megatron_rasft.training.policy", "only pretrain_rasft.py"),
        ("monitoring/status.py", "import megatron_rasft.checkpoints", "may not import the package"),
        ("monitoring/stalls.py", "from megatron.core import parallel_state", "does without Megatron"),
        ("types.py", "from megatron_rasft.errors import RasftError", "types.py imports nothing"),
        ("config/data.py", "from megatron_rasft.data import reading", "may not import the package data/"),
        ("config/data.py", "import torch", "does without torch"),
        ("curriculum/curriculum.py", "from torch import Tensor", "does without torch"),
        ("verify/pool.py", "def f():\n    import torch.nn", "does without torch"),
        ("rollout/engine.py", "import importlib\nimportlib.import_module('torch')", "does without torch"),
        ("rollout/engine.py", "from megatron.core import parallel_state", "does without Megatron"),
        ("weights/loading.py", "from megatron.training import get_args", "does without Megatron"),
        ("objective/loss.py", "import megatron.training.training as t", "does without Megatron"),
        ("objective/loss.py", "import torch\ntorch.cuda.synchronize()", "device calls"),
        ("weights/loading.py", "from torch.cuda import Stream", "device calls"),
        ("weights/loading.py", "from megatron.core import parallel_state", "does without Megatron"),
        ("data/packing.py", "import torch", "does without torch"),
        ("sync/broadcast.py", "from urllib.request import urlopen", "only servers/ and rollout/ use HTTP"),
        ("rollout/client.py", "import sglang.srt", "never imported"),
        ("utils/strings.py", "x = 1", "is an unknown package"),
        ("data/helpers.py", "x = 1", "is a vague name"),
        ("loop.py", "x = 1", "not a shared module"),
    ],
)
def test_each_broken_rule_is_found(tmp_path: Path, file: str, line: str, why: str) -> None:
    write_tree(tmp_path, file, line)
    assert [why in found for found in violations(tmp_path)] == [True]


def write_tree(root: Path, file: str, content: str) -> None:
    path = root / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(content, encoding="utf-8")
