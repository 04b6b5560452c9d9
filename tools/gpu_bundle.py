"""Packs the wheels that a GPU machine without a network needs into pieces that can be copied there.

    python tools/gpu_bundle.py [--output DIR] [--wheel FILE ...] [--skip NAME ...]

The tool writes to --output: wheels/, the pieces 000.piece, 001.piece, ... of at most --piece-mb, manifest.json and install.py.
Copy all but wheels/ to one folder of the other machine and run `python install.py --target DIR` there. A second call keeps
existing wheels. pip uses the index in its configuration.

Exit code: 0 if the bundle is complete, 1 if a wheel could not be downloaded, 2 for wrong arguments.
"""

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# lets the file run from a checkout that is not installed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_rasft.errors import RasftError
from megatron_rasft.files import write_json
from megatron_rasft.tools import cli

PARTS = Path(__file__).resolve().parent / "gpu_bundling"
REQUIREMENTS = PARTS / "trainer.txt"
INSTALLER = PARTS / "install.py"
PIECE_MB = 46
"""Default size of a piece, MB. The tool that copies to the GPU machine takes 64 MiB per call, including the repository."""

GLIBC_VERSIONS = (5, 12, 17, 24, 26, 27, 28)
"""Minor versions of glibc 2 that the target accepts. pip only takes wheels for the platforms listed in its flags."""


class BundleError(RasftError):
    """Raised if a wheel could not be downloaded or built."""


@dataclass(frozen=True)
class Stored:
    """Name, size and hash of a file in the bundle."""

    name: str
    size: int
    sha256: str


def parser() -> argparse.ArgumentParser:
    """Builds the parser with all flags."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--output", type=Path, default=Path(".cache/gpu-bundle"), help="folder of the bundle (%(default)s)"
    )
    made.add_argument(
        "--requirements",
        type=Path,
        default=REQUIREMENTS,
        help="list of wheels: name==version --hash=sha256:...",
    )
    made.add_argument(
        "--wheel", type=Path, action="append", default=[], help="your own wheel to add; may be repeated"
    )
    made.add_argument(
        "--skip", nargs="+", default=[], metavar="NAME", help="packages that the other machine already has"
    )
    made.add_argument(
        "--piece-mb", type=float, default=PIECE_MB, help="largest piece, millions of bytes (%(default)s)"
    )
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Downloads the wheels, verifies them and splits them into pieces."""
    options = parser().parse_args(argv)
    requirements = read_requirements(options.requirements, options.skip)
    check_flags(options)
    bundle(options.output, requirements, options.wheel, int(options.piece_mb * 1e6))


def check_flags(options: argparse.Namespace) -> None:
    """Refuses wrong flags before anything is downloaded.

    Raises:
        ValueError: the message names the flag.
    """
    if options.piece_mb * 1e6 < 1:
        raise ValueError(f"--piece-mb must be at least one byte, got {options.piece_mb:g}. Use {PIECE_MB}.")
    for wheel in options.wheel:
        if not zipfile.is_zipfile(wheel) or wheel.suffix != ".whl":
            raise ValueError(
                f"--wheel {wheel} is not a wheel. Build one with `pip wheel --no-deps --no-build-isolation`."
            )


def read_requirements(path: Path, skipped: Sequence[str]) -> dict[str, str]:
    """Returns sha256 of a wheel -> the line of the requirements file that requires it.

    Raises:
        ValueError: a line without a hash, or --skip names a package that is not in the file.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"--requirements {path} cannot be read: {error.strerror}.") from error
    found = {}
    names = set()
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"([\w.-]+)==\S+ --hash=sha256:([0-9a-f]{64})", line.strip())
        if match is None:
            raise ValueError(
                f"--requirements {path}:{number}: expected name==version --hash=sha256:..., got {line!r}."
            )
        names.add(normalized(match[1]))
        if normalized(match[1]) not in map(normalized, skipped):
            found[match[2]] = line.strip()
    unknown = [name for name in skipped if normalized(name) not in names]
    if unknown:
        raise ValueError(
            f"--skip {' '.join(unknown)}: not in {path}. Names there: {', '.join(sorted(names))}."
        )
    return found


def normalized(name: str) -> str:
    """Normalizes a package's name like package indexes."""
    return re.sub(r"[-_.]+", "-", name).lower()


def bundle(output: Path, requirements: dict[str, str], own: Sequence[Path], piece_bytes: int) -> None:
    """Writes the bundle into ``output``.

    Raises:
        BundleError: a wheel could not be downloaded.
    """
    wheels = output / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    there = {sha256(path): path for path in wheels.glob("*.whl")}
    missing = {digest: line for digest, line in requirements.items() if digest not in there}
    if missing:
        download(missing.values(), wheels)
        there = {sha256(path): path for path in wheels.glob("*.whl")}
    lost = [line for digest, line in requirements.items() if digest not in there]
    if lost:
        raise BundleError(f"pip did not fetch {len(lost)} of the wheels, for example {lost[0]}")
    paths = sorted([*(there[digest] for digest in requirements), *own], key=lambda path: path.name)
    stored = [Stored(path.name, path.stat().st_size, sha256(path)) for path in paths]
    pieces = cut(paths, output, piece_bytes)
    shutil.copyfile(INSTALLER, output / "install.py")
    manifest = {"schema": 1, "wheels": [asdict(s) for s in stored], "pieces": [asdict(s) for s in pieces]}
    write_json(output / "manifest.json", manifest)
    megabytes = sum(s.size for s in stored) / 1e6
    print(f"{len(stored)} wheels of {megabytes:.0f} MB in {len(pieces)} pieces: {output}")
    print(
        "copy the pieces, manifest.json and install.py to one folder and run there: python install.py --target DIR"
    )


def download(lines: Iterable[str], wheels: Path) -> None:
    """Downloads exactly these wheels with pip, which verifies their hashes.

    Raises:
        BundleError: pip failed, after printing its own message.
    """
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC_VERSIONS]
    platforms += ["manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64"]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "requirements.txt"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--require-hashes"]
        command += ["--no-deps", "--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
        command += [word for platform in platforms for word in ("--platform", platform)]
        done = subprocess.run([*command, "--dest", str(wheels), "--requirement", str(path)], check=False)
    if done.returncode:
        raise BundleError(
            "pip could not fetch the wheels: its message is above. Those that it fetched are kept."
        )


def cut(paths: Sequence[Path], output: Path, piece_bytes: int) -> list[Stored]:
    """Writes the concatenated files into pieces, and removes the pieces of an earlier call."""
    for old in output.glob("*.piece"):
        old.unlink()
    pieces: list[Stored] = []
    for content in blocks(paths, piece_bytes):
        name = f"{len(pieces):03}.piece"
        (output / name).write_bytes(content)
        pieces.append(Stored(name, len(content), hashlib.sha256(content).hexdigest()))
    return pieces


def blocks(paths: Iterable[Path], size: int) -> Iterator[bytes]:
    """Yields the files' bytes in blocks of ``size``; the last block may be shorter."""
    block = bytearray()
    for path in paths:
        with path.open("rb") as file:
            while part := file.read(size - len(block)):
                block += part
                if len(block) == size:
                    yield bytes(block)
                    block.clear()
    if block:
        yield bytes(block)


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(cli.run(main))
