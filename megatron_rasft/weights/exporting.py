"""Writes model chunks as a Hugging Face folder, tensor by tensor. The folder gets its name when it is complete."""

import glob
import json
import math
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rasft.errors import CheckpointError, ModelFolderError, WeightsError
from megatron_rasft.ranks import gather_to_all
from megatron_rasft.weights.carried import write_carried_files
from megatron_rasft.weights.companions import copy_companions, find_code
from megatron_rasft.weights.finite import NOT_FINITE, is_finite
from megatron_rasft.weights.folder import ModelFolder
from megatron_rasft.weights.gathering import ModelTensors, join_plans
from megatron_rasft.weights.model_card import write_card
from megatron_rasft.weights.quantization import CONFIG_KEY
from megatron_rasft.weights.shard_files import INDEX_FILE, SINGLE_FILE
from megatron_rasft.weights.shard_writer import ShardWriter, split_plans
from megatron_rasft.wording import counted

_PARTIAL = ".partial-"
"""Part of the name of an export's temporary folder: .NAME.partial-RANDOM beside NAME."""


def export(
    tensors: ModelTensors,
    template: ModelFolder,
    out_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    facts: dict[str, str] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes the model as a folder that transformers loads. Every rank of the default group must call it.

    The sender of each stage writes the files of the stage into a temporary folder next to ``out_dir``, so all nodes must share a
    file system. Rank 0 renames the folder when it is complete. Besides the collectives of ``tensors`` it runs a few object gathers
    on the default group. An error on one rank is raised on all.

    Args:
        tensors: the tensors of this rank's chunks.
        template: the folder that the model was built from; gives config, tokenizer, chat template and types.
        out_dir: the folder to write; must not exist, or be empty.
        dtype: type of all weights; None keeps each tensor's type in ``template``.
        facts: further rows of the model card (README.md); None: write no card.
        max_shard_bytes: largest size of a file, bytes.

    Raises:
        ValueError: ``out_dir`` is in use.
        CheckpointError: the folder could not be written. ``out_dir`` then does not exist.
    """
    out_dir = Path(out_dir)
    is_rank_zero = _rank() == 0
    temporary = _begin(out_dir, is_rank_zero)
    files: dict[str, list[str]] = {}
    num_bytes, failure = 0, ""
    if tensors.takes_part:
        try:
            files, num_bytes = _write_stage(tensors, template, temporary, dtype, max_shard_bytes)
        except (OSError, ModelFolderError, WeightsError, ValueError) as error:
            failure = str(error)
    reports = gather_to_all((files, num_bytes, failure))
    failure = next((f for _, _, f in reports if f), "")
    if is_rank_zero:
        try:
            if not failure:
                carried = write_carried_files(template, temporary, max_shard_bytes)
                _finish([*reports, (*carried, "")], template, temporary, out_dir, dtype, facts)
        except (OSError, ModelFolderError) as error:
            failure = str(error)
        if failure:
            shutil.rmtree(temporary, ignore_errors=True)
    failure = next((f for f in gather_to_all(failure) if f), "")
    if failure:
        raise CheckpointError(f"cannot export to {out_dir}: {failure}")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def remove_partial_exports(out_dir: Path) -> list[Path]:
    """Removes the temporary folders of exports to ``out_dir`` that were killed. No other process may be exporting to it.

    Returns:
        The removed folders.
    """
    pattern = f".{glob.escape(out_dir.name)}{_PARTIAL}*"
    folders = sorted(out_dir.absolute().parent.glob(pattern))
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    return folders


def _begin(out_dir: Path, is_rank_zero: bool) -> Path:
    """Creates the temporary folder, or refuses an ``out_dir`` in use, with the same outcome on every rank."""
    temporary, refusal, failure = None, "", ""
    if is_rank_zero:
        if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
            refusal = (
                f"export to {out_dir}: it exists and is not an empty folder. Remove it, or give another name."
            )
        else:
            try:
                remove_partial_exports(out_dir)
                temporary = out_dir.absolute().parent / f".{out_dir.name}{_PARTIAL}{uuid.uuid4().hex[:8]}"
                temporary.mkdir(parents=True)
            except OSError as error:
                failure = f"cannot export to {out_dir}: {error}"
    temporary, refusal, failure = gather_to_all((temporary, refusal, failure))[0]
    if refusal:
        raise ValueError(refusal)
    if failure:
        raise CheckpointError(failure)
    assert temporary is not None
    return temporary


def _write_stage(
    tensors: ModelTensors,
    template: ModelFolder,
    folder: Path,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
) -> tuple[dict[str, list[str]], int]:
    """Writes the files of this stage.

    Returns:
        File name -> tensor names, and the bytes of all tensors; empty and 0 on ranks that write nothing.
    """
    dtypes = _written_types(template, dtype)
    shards = split_plans(join_plans(tensors.plan(dtypes=dtypes), template.joined), max_shard_bytes)
    paths = [folder / f"stage-{tensors.stage:04d}-{i:05d}.safetensors" for i in range(len(shards))]
    shard_of = {name: i for i, shard in enumerate(shards) for plan in shard for name in plan.written}
    writers: dict[int, ShardWriter] = {}
    failure: OSError | WeightsError | None = None
    for name, tensor in tensors.gather(dtypes=dtypes, device="cpu"):
        if tensor is None or failure is not None:
            continue  # continues after a failure, because other ranks wait in the same gathers
        i = shard_of[name]
        try:
            if not is_finite(tensor):
                raise WeightsError(f"{name} contains {NOT_FINITE} as {type_names([tensor.dtype])}")
            if i not in writers:
                writers[i] = ShardWriter(paths[i], shards[i])
            writers[i].write(name, tensor)
        except (OSError, WeightsError) as error:
            failure = error
    if failure is not None:
        for writer in writers.values():
            writer.close()
        raise failure
    files = {paths[i].name: [plan.name for plan in shards[i]] for i in writers}
    return files, sum(writer.num_bytes for writer in writers.values())


def _written_types(template: ModelFolder, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Returns the type of each exported tensor: ``dtype``, or the stored type of buffers and if ``dtype`` is None."""
    return {
        name: stored.dtype if dtype is None or name in template.buffers else dtype
        for name, stored in template.tensors.items()
    }


def file_name(i: int, num_files: int) -> str:
    """Name of a folder's i-th safetensors file (from 0), as transformers names it."""
    return SINGLE_FILE if num_files == 1 else f"model-{i + 1:05d}-of-{num_files:05d}.safetensors"


def _finish(
    reports: list[tuple[dict[str, list[str]], int, str]],
    template: ModelFolder,
    temporary: Path,
    out_dir: Path,
    dtype: torch.dtype | None,
    facts: dict[str, str] | None,
) -> None:
    """Gives the files their names, writes index, configuration and card, and renames the folder."""
    files = {file: names for stage_files, _, _ in reports for file, names in stage_files.items()}
    _check_complete([name for names in files.values() for name in names], template)
    weight_map: dict[str, str] = {}
    for i, file in enumerate(sorted(files)):
        final = file_name(i, len(files))
        if not (temporary / file).exists():
            raise ModelFolderError(
                f"rank 0 does not see {file}: the output must be on a file system that all nodes share"
            )
        (temporary / file).rename(temporary / final)
        weight_map.update(dict.fromkeys(files[file], final))
    if len(files) > 1:
        total_size = sum(num_bytes for _, num_bytes, _ in reports)
        write_index(temporary, weight_map, total_size)
    copy_companions(template.path, temporary)
    written_types = _written_types(template, dtype)
    types = types_by_size((shape, written_types[name]) for name, shape in template.hf_shapes.items())
    write_config(template, temporary, types[0])
    if facts is not None:
        write_card(temporary, template, out_dir.name, {"Weights": type_names(types), **facts})
    temporary.rename(out_dir.absolute())


def write_index(folder: Path, weight_map: dict[str, str], total_size: int) -> None:
    """Writes the index of a folder with several files: tensor name -> file, and the bytes of all tensors."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _check_complete(tensors: list[str], template: ModelFolder) -> None:
    joined = template.joined
    written = [
        part
        for name in tensors
        if name not in template.carried
        for part in (joined[name].parts if name in joined else (name,))
    ]
    distinct = set(written)
    missing = [name for name in template.hf_shapes if name not in distinct]
    if missing:
        raise ModelFolderError(
            f"no rank has written {counted(len(missing), 'tensor')}; the first is {missing[0]}"
        )
    if len(written) != len(distinct):
        twice = next(name for name in written if written.count(name) > 1)
        raise ModelFolderError(
            f"tensor {twice} was written by two ranks; is_first_replica must hold on one replica only"
        )


def types_by_size(weights: Iterable[tuple[tuple[int, ...], torch.dtype]]) -> list[torch.dtype]:
    """Returns the types of (shape, type) weights, ordered by number of elements. config.json names the first."""
    sizes: Counter[torch.dtype] = Counter()
    for shape, dtype in weights:
        sizes[dtype] += math.prod(shape)
    return [dtype for dtype, _ in sizes.most_common()]


def type_names(types: Iterable[torch.dtype]) -> str:
    """Names of types for a model card, such as "bfloat16, float32"."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in types)


def write_config(template: ModelFolder, target: Path, dtype: torch.dtype, **more: Any) -> None:
    """Writes config.json for weights of type ``dtype``, with further keys ``more``.

    "auto_map" is left out if transformers has a class for the family. If not, the code beside the weights is copied too.
    "quantization_config" is left out, because quantized weights were dequantized when they were read.
    """
    kept = _without_sources(template.config)
    code = find_code(template.path, template.config) if template.is_own_code else None
    if code:
        kept["auto_map"] = template.config["auto_map"]
    for path in code or ():
        shutil.copyfile(path, target / path.name)
    if dtype == template.dtype and not more and kept == template.config:
        shutil.copyfile(template.path / "config.json", target / "config.json")
        return
    config = kept | more
    # transformers 5 reads and writes "dtype", earlier releases "torch_dtype"
    config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _without_sources(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config.json, and the parts of it, without the keys that describe code and quantized weights of the folder."""
    kept = {key: value for key, value in config.items() if key not in ("auto_map", CONFIG_KEY)}
    return {
        key: _without_sources(value) if key == "text_config" and isinstance(value, dict) else value
        for key, value in kept.items()
    }
