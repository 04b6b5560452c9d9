"""The wheel holds the package, its scripts and their data, and nothing that clashes with other packages."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "megatron_rasft",
    "tools",
    "pretrain_rasft.py",
    "pyproject.toml",
    "setup.py",
    "README.md",
    "LICENSE",
)
NAMES = ("train", "convert", "evaluate", "plan", "prepare-data", "report", "serve", "check-servers")

PRINT_HELP = """
import importlib.metadata, io, json, runpy, sys
from contextlib import redirect_stdout
(found,) = importlib.metadata.distributions(path=[sys.argv[1]], name="megatron-rasft")
printed = {}
for script in found.entry_points.select(group="console_scripts"):
    sys.argv = [script.name, "--help"]
    with redirect_stdout(io.StringIO()) as text:
        try:
            code = script.load()()
        except SystemExit as stop:
            code = stop.code
    printed[script.name] = [code or 0, text.getvalue()]
try:  # as torchrun -m
    with redirect_stdout(io.StringIO()):
        runpy.run_module("megatron_rasft.commands.prepare_data", run_name="__main__")
except SystemExit as stop:
    assert not stop.code
assert not any(place.endswith("/megatron_rasft") for place in sys.path), "its modules would hide others, such as types"
files = sorted(m.__file__ for n, m in sys.modules.items() if n.startswith("megatron_rasft.commands."))
print(json.dumps([printed, files]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the wheel from a copy of the sources, because building leaves files in the folder."""
    copy = tmp_path_factory.mktemp("wheel") / "checkout"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_file():
            shutil.copy2(ROOT / name, copy)
        else:  # other tests are writing bytecode, whose temporary files vanish while they are copied
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(copy.parent)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = copy.parent.glob("*.whl")
    return built


def test_wheel_holds_the_package_its_data_and_its_scripts(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    top = {name.split("/")[0] for name in names}
    version = wheel.name.split("-")[1]
    assert top == {"megatron_rasft", "pretrain_rasft.py", f"megatron_rasft-{version}.dist-info"}
    checkout = {str(path.relative_to(ROOT)) for path in (ROOT / "megatron_rasft").rglob("*.py")}
    templates = {str(path.relative_to(ROOT)) for path in (ROOT / "megatron_rasft").rglob("templates/*")}
    assert templates and checkout | templates | {"megatron_rasft/py.typed"} <= names
    commands = {Path(name).stem for name in names if name.startswith("megatron_rasft/commands/")}
    assert commands == {
        "__init__",
        "check_servers",
        "convert_checkpoint",
        "evaluate",
        "plan",
        "prepare_data",
        "report",
        "serve_rollouts",
        "sglang_on_cpu",
    }


def test_every_script_of_the_wheel_prints_its_help(wheel: Path, tmp_path: Path) -> None:
    """In one process, which imports torch once, and where only the installed wheel is on the path."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    command = [sys.executable, "-P", "-c", PRINT_HELP, str(site)]
    done = subprocess.run(
        command, cwd=site, env={"PYTHONPATH": str(site)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    printed, files = json.loads(done.stdout.splitlines()[-1])
    assert printed.keys() == {f"rasft-{name}" for name in NAMES}
    for name, (code, text) in printed.items():
        assert code == 0 and "--" in text, name
        if name != "rasft-train":
            assert f"usage: {name} " in text
    assert len(files) == len(NAMES) - 1 and all(Path(file).is_relative_to(site) for file in files)
