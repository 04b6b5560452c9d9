"""What can be checked of docker/ without a docker engine: pinned images, existing files, valid commands."""

import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.test_wheel import SOURCES

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILES = sorted(ROOT.glob("docker/*.Dockerfile"))


def instructions(path: Path) -> Iterator[tuple[str, str]]:
    """Returns (instruction, arguments) of each line; continued lines are joined."""
    for line in path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        if line.strip() and not line.startswith("#"):
            name, _, arguments = line.partition(" ")
            yield name, arguments


@pytest.fixture(params=DOCKERFILES, ids=lambda path: path.name)
def dockerfile(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_both_kinds_of_machines_have_an_image() -> None:
    assert [path.name for path in DOCKERFILES] == ["cpu.Dockerfile", "gpu.Dockerfile"]


def test_base_images_are_pinned(dockerfile: Path) -> None:
    images = [arguments.split()[0] for name, arguments in instructions(dockerfile) if name == "FROM"]
    assert images
    for image in images:
        assert re.search(r":\d+\.\d+[\w.-]*$", image), image


def test_copied_files_exist_and_suffice_to_build_the_wheel(dockerfile: Path) -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = set()
    for name, arguments in instructions(dockerfile):
        if name == "COPY" and not arguments.startswith("--from="):
            copied |= set(arguments.split()[:-1])
    assert all((ROOT / source).exists() for source in copied)
    assert set(SOURCES) <= copied <= sent


def test_commands_are_valid_and_name_existing_scripts_and_extras(dockerfile: Path) -> None:
    text = " ".join(arguments for name, arguments in instructions(dockerfile) if name in ("RUN", "CMD"))
    scripts = re.findall(r"\brasft-[a-z-]+", text)
    assert scripts and set(scripts) <= PROJECT["scripts"].keys()
    (extras,) = re.findall(r"[.)]\[([a-z,]+)\]", text)
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
    for name, arguments in instructions(dockerfile):
        if name == "RUN":
            subprocess.run(["sh", "-n", "-c", arguments], check=True)
