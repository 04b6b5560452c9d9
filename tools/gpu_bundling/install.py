"""Joins the pieces of a bundle and installs its wheels into a new folder. Needs pip but no network.

    python install.py --target DIR [--pieces DIR]

tools/gpu_bundle.py puts this file next to the pieces. It verifies the SHA-256 of every piece and wheel first. It imports only the
standard library, because the target machine need not have this package.

Exit code: 0 if the bundle is installed, 1 if a file is damaged or pip failed, 2 if pieces are missing or a flag is wrong.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

MARK = ".gpu-bundle.json"
"""File in the target with the manifest of the installed bundle, written last."""

CHUNK = 1 << 20


class Damaged(Exception):
    """Raised if a file differs from the packed file, or pip refuses it."""


class Pieces:
    """The pieces, read as one file."""

    def __init__(self, paths: list[Path]) -> None:
        self._left = list(paths)
        self._file: BinaryIO | None = None

    def copy(self, size: int, target: BinaryIO) -> str:
        """Copies the next ``size`` bytes and returns their SHA-256."""
        digest = hashlib.sha256()
        while size:
            if self._file is None:
                self._file = self._left.pop(0).open("rb")
            part = self._file.read(min(size, CHUNK))
            if not part:
                self._file.close()
                self._file = None
                continue
            digest.update(part)
            target.write(part)
            size -= len(part)
        return digest.hexdigest()


def check(folder: Path, pieces: list[dict[str, Any]]) -> list[Path]:
    """Returns the paths of the pieces after verifying them.

    Raises:
        ValueError: pieces are missing.
        Damaged: the content of a piece has changed.
    """
    missing = [piece["name"] for piece in pieces if not (folder / piece["name"]).is_file()]
    if missing:
        raise ValueError(f"{len(missing)} of {len(pieces)} pieces are not in {folder}: {' '.join(missing)}")
    paths = []
    for piece in pieces:
        path = folder / piece["name"]
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != piece["sha256"]:
                raise Damaged(
                    f"{path} is damaged ({path.stat().st_size} of {piece['size']} bytes): copy it again"
                )
        paths.append(path)
    return paths


def install(manifest: dict[str, Any], pieces: list[Path], target: Path) -> None:
    """Joins the pieces, verifies the wheels and installs them. ``target`` exists only when it is complete.

    Raises:
        Damaged: the content of a wheel has changed, or pip failed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".gpu-bundle-") as scratch:
        stream, wheels = Pieces(pieces), []
        for wheel in manifest["wheels"]:
            path = Path(scratch, wheel["name"])
            with path.open("wb") as file:
                if stream.copy(wheel["size"], file) != wheel["sha256"]:
                    raise Damaged(f"the wheel {wheel['name']} is damaged: make the bundle again")
            wheels.append(str(path))
        site = Path(scratch, "site")
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--disable-pip-version-check",
            "--quiet",
            "--no-index",
        ]
        command += ["--no-deps", "--no-compile", "--no-cache-dir", "--target", str(site), *wheels]
        if subprocess.run(command, check=False).returncode:
            raise Damaged(f"pip of {sys.executable} could not install the wheels: its message is above")
        (site / MARK).write_text(json.dumps(manifest), encoding="utf-8")
        shutil.move(site, target)


def main() -> int:
    """Runs the command line; returns the exit code, see above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).resolve().parent
    parser.add_argument("--target", type=Path, required=True, help="folder to install into; must not exist")
    parser.add_argument(
        "--pieces", type=Path, default=here, help="folder with the pieces (default: the folder of this file)"
    )
    options = parser.parse_args()
    target = options.target.resolve()
    try:
        manifest = json.loads((here / "manifest.json").read_text(encoding="utf-8"))
        mark = target / MARK
        if target.exists() and not (
            mark.is_file() and json.loads(mark.read_text(encoding="utf-8")) == manifest
        ):
            raise ValueError(
                f"--target {target} exists and does not contain this bundle: give a folder that does not exist"
            )
        if not target.exists():
            install(manifest, check(options.pieces, manifest["pieces"]), target)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Damaged as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"export PYTHONPATH={target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
