"""Tests tools/gpu_bundle.py and its installer with small wheels, the real pip and no network."""

import hashlib
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from megatron_rasft.tools import cli
from tools import gpu_bundle

ROOT = Path(__file__).resolve().parents[3]

ON_THE_MACHINE = {"torch", "triton", "transformers", "safetensors", "jinja2", "numpy"}
"""Dependencies of the project that come with torch and transformers, which the GPU machine has."""


def write_wheel(folder: Path, name: str, version: str, source: str) -> Path:
    """Writes a wheel of one module, with the same bytes each time."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": source,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in {**files, f"{info}/RECORD": record}.items():
            wheel.writestr(zipfile.ZipInfo(file), text)
    return path


def line(wheel: Path) -> str:
    name, version = wheel.name.split("-")[:2]
    return f"{name}=={version} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}"


@dataclass(frozen=True)
class Files:
    """The files of one call of the program."""

    shelf: Path
    """Folder from which pip takes wheels instead of an index."""
    bundle: Path
    flags: list[str]
    """Two listed wheels and one additional wheel, split into pieces of 300 bytes."""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    listed = [
        write_wheel(shelf, "first_part", "1.0", "value = 1\n"),
        write_wheel(shelf, "second_part", "2.1", "value = 2\n"),
    ]
    (tmp_path / "list.txt").write_text("# a comment\n\n" + "\n".join(map(line, listed)) + "\n")
    own = write_wheel(tmp_path, "built_here", "3.0", "value = 'ä' * 1000\n")
    flags = ["--output", str(tmp_path / "bundle"), "--requirements", str(tmp_path / "list.txt")]
    return Files(shelf, tmp_path / "bundle", [*flags, "--wheel", str(own), "--piece-mb", "0.0003"])


@pytest.fixture
def downloaded(files: Files) -> Files:
    """The same files after an earlier call: the bundle contains the listed wheels, and pip cannot download any."""
    files.shelf.rename(files.bundle.parent / "wheels")
    files.bundle.mkdir()
    (files.bundle.parent / "wheels").rename(files.bundle / "wheels")
    files.shelf.mkdir()
    return files


def install(bundle: Path, target: Path, *more: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(bundle / "install.py"), "--target", str(target), *more]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_wheels_are_downloaded_once(files: Files) -> None:
    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in files.bundle.iterdir() if path.is_file()}

    assert cli.run(gpu_bundle.main, files.flags) == 0
    first = content()
    for wheel in files.shelf.iterdir():
        wheel.unlink()  # pip could not download any wheel now
    assert cli.run(gpu_bundle.main, files.flags) == 0
    assert content() == first


def test_download_that_broke_off_goes_on(downloaded: Files) -> None:
    """An incomplete wheel is downloaded again. A complete wheel is kept; pip could not download it here."""
    cut = downloaded.bundle / "wheels" / "second_part-2.1-py3-none-any.whl"
    whole = cut.read_bytes()
    (downloaded.shelf / cut.name).write_bytes(whole)
    cut.write_bytes(whole[:50])
    assert cli.run(gpu_bundle.main, downloaded.flags) == 0
    assert cut.read_bytes() == whole


def test_bundle_is_cut_carried_joined_and_installed(downloaded: Files, tmp_path: Path) -> None:
    assert cli.run(gpu_bundle.main, downloaded.flags) == 0
    pieces = sorted(downloaded.bundle.glob("*.piece"))
    assert len(pieces) > 3 and {piece.stat().st_size for piece in pieces[:-1]} == {300}
    carried = tmp_path / "carried"
    carried.mkdir()
    for path in [*pieces, downloaded.bundle / "manifest.json", downloaded.bundle / "install.py"]:
        path.rename(carried / path.name)
    target = tmp_path / "site"
    done = install(carried, target)
    assert (done.returncode, done.stdout) == (0, f"export PYTHONPATH={target}\n"), done.stderr
    program = "import first_part, second_part, built_here; print(first_part.value, second_part.value, len(built_here.value))"
    printed = subprocess.run(
        [sys.executable, "-c", program], cwd=target, capture_output=True, text=True, check=True
    )
    assert printed.stdout == "1 2 1000\n"
    again = install(carried, target)
    assert (again.returncode, again.stdout) == (0, done.stdout)


def test_wheel_with_another_hash_is_refused(files: Files, capfd: pytest.CaptureFixture[str]) -> None:
    write_wheel(files.shelf, "first_part", "1.0", "value = 'not what was listed'\n")
    assert cli.run(gpu_bundle.main, files.flags) == 1
    assert "DO NOT MATCH THE HASHES" in capfd.readouterr().err


def test_skipped_package_is_left_out(downloaded: Files, tmp_path: Path) -> None:
    assert cli.run(gpu_bundle.main, [*downloaded.flags, "--skip", "First-Part"]) == 0
    manifest = json.loads((downloaded.bundle / "manifest.json").read_text())
    assert [wheel["name"].split("-")[0] for wheel in manifest["wheels"]] == ["built_here", "second_part"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--skip", "unknown"], "--skip unknown: not in"),
        (["--wheel", __file__], "is not a wheel"),
        (["--piece-mb", "0"], "--piece-mb must be at least one byte"),
        (["--requirements", "nowhere.txt"], "--requirements nowhere.txt cannot be read"),
        (["--requirements", str(ROOT / "pyproject.toml")], "expected name==version --hash"),
    ],
)
def test_wrong_flags_are_refused(
    downloaded: Files, more: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(gpu_bundle.main, [*downloaded.flags, *more]) == 2
    assert says in capsys.readouterr().err


def test_missing_and_damaged_pieces_are_named(downloaded: Files, tmp_path: Path) -> None:
    assert cli.run(gpu_bundle.main, downloaded.flags) == 0
    bundle, target = downloaded.bundle, tmp_path / "site"
    piece = bundle / "001.piece"
    content = piece.read_bytes()
    piece.write_bytes(b"x" + content[1:])
    done = install(bundle, target)
    assert done.returncode == 1 and "001.piece is damaged" in done.stderr
    piece.unlink()
    done = install(bundle, target)
    assert done.returncode == 2 and "001.piece" in done.stderr
    assert not target.exists()
    (tmp_path / "elsewhere").mkdir()
    for path in bundle.glob("*.piece"):
        path.rename(tmp_path / "elsewhere" / path.name)
    (tmp_path / "elsewhere" / piece.name).write_bytes(content)
    assert install(bundle, target, "--pieces", str(tmp_path / "elsewhere")).returncode == 0


def test_folder_with_other_content_is_not_installed_into(downloaded: Files, tmp_path: Path) -> None:
    assert cli.run(gpu_bundle.main, downloaded.flags) == 0
    (tmp_path / "site").mkdir()
    done = install(downloaded.bundle, tmp_path / "site")
    assert done.returncode == 2 and "--target" in done.stderr and "site" in done.stderr


def test_list_holds_every_dependency_at_a_version_that_the_project_takes() -> None:
    listed = {}
    for text in gpu_bundle.read_requirements(gpu_bundle.REQUIREMENTS, []).values():
        match = re.match(r"(\S+)==(\S+)", text)
        assert match is not None
        listed[gpu_bundle.normalized(match[1])] = match[2]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in [
        *project["dependencies"],
        "transformer-engine>=2.20,<3",
        *project["optional-dependencies"]["code"],
    ]:
        wanted = Requirement(text)
        if gpu_bundle.normalized(wanted.name) not in ON_THE_MACHINE:
            assert wanted.specifier.contains(listed[gpu_bundle.normalized(wanted.name)]), text
