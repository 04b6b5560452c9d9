"""Converts Hugging Face folders to Megatron checkpoints and back, on disk: one pass, one parameter at a time, no process groups."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import reduce
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_rasft.errors import CheckpointError, WeightsError
from megatron_rasft.files import replacing
from megatron_rasft.tools.conversion.fp8_folders import quantization_config, quantized, unquantized_type
from megatron_rasft.tools.conversion.staging import StagedFolder
from megatron_rasft.tools.conversion.torch_dist import (
    COMMON_STATE,
    DistcpFile,
    Record,
    TorchDistFolder,
    common_state,
    write_checkpoint_index,
)
from megatron_rasft.weights.architecture import megatron_args
from megatron_rasft.weights.carried import carried_plans, write_carried
from megatron_rasft.weights.companions import copy_companions
from megatron_rasft.weights.exporting import (
    file_name,
    type_names,
    types_by_size,
    write_config,
    write_index,
)
from megatron_rasft.weights.families import (
    Entry,
    JoinedTensor,
    NameTable,
    Piece,
    ShardLayout,
    StoredParameter,
)
from megatron_rasft.weights.finite import NOT_FINITE, describe_overflow, is_finite
from megatron_rasft.weights.folder import CARRIED_FILE, HfFolder
from megatron_rasft.weights.fp8_blocks import SCALE_SUFFIX, is_linear_layer, scale_shape
from megatron_rasft.weights.gathering import TensorPlan, assemble, join_plans
from megatron_rasft.weights.loading import read_shard
from megatron_rasft.weights.model_card import saved_run_facts, write_card
from megatron_rasft.weights.shard_writer import ShardWriter, split_plans
from megatron_rasft.weights.tracker import RELEASE, TRACKER_FILE
from megatron_rasft.wording import counted

TEMPLATE_DIR = "hugging_face"
"""Subfolder of a converted checkpoint with the folder's other files: config, tokenizer and so on."""

_WIDER_TYPE = "Give --dtype bfloat16 or float32."

_WITH_EXTRA_STATE = (".in_proj", ".out_proj")
"""Modules that may have an FP8 state, besides those that are named linear or layernorm."""

_MAX_CHUNKS = 16
_MIN_CHUNK_BYTES = 1 << 20

Progress = Callable[[int], None]


def _silent(num_bytes: int) -> None:
    pass


def _size(shape: Sequence[int], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _fingerprint(files: Sequence[Path]) -> str:
    """Identifies the input files by path, size and time, so that a conversion only continues an earlier conversion of the same
    input."""
    digest = hashlib.sha256()
    for path in sorted(files):
        status = path.stat()
        digest.update(f"{path.absolute()} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


# ---- to Megatron


class _LayerPart(NamedTuple):
    """The parameters of one .distcp file: those of one layer, or those before or after all layers."""

    name: str
    num_bytes: int
    parameters: tuple[StoredParameter, ...]


class _Whole(NamedTuple):
    """Shape and type shared by all parameters with one key, not split over ranks."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return _size(self.shape, self.dtype)


def hf_to_megatron(
    source: HfFolder,
    out_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    query_groups: int | None = None,
    num_workers: int = 1,
    on_progress: Progress = _silent,
) -> None:
    """Writes the folder's weights as a Megatron checkpoint that every parallel layout can load.

    The checkpoint is a "release" in Megatron's terms: weights without a training state. Each worker holds one chunk of a
    parameter in memory, or a complete parameter if ranks split its columns.

    Args:
        source: an opened folder.
        out_dir: the folder to write; must not exist, or be empty. It exists only when it is complete.
        dtype: type of all weights; None keeps the stored types. Layers with different types get the wider type.
        query_groups: value of the run's --rasft-query-groups, which the run's checkpoints must match.
        num_workers: number of layers to convert at a time.
        on_progress: called with the bytes that were written since the last call.

    Raises:
        ValueError: ``out_dir`` is in use, or an argument does not fit the model.
        CheckpointError: the disk is full or fails. Finished files are kept for the next call.
        WeightsError: a tensor has NaN or infinity, or overflows as ``dtype``. No file is kept.
    """
    arguments = megatron_args(source, query_groups)
    shape = replace(
        source.shape,
        num_attention_heads=arguments["num_attention_heads"],
        num_query_groups=arguments["num_query_groups"],
    )
    wholes = _wholes(source, NameTable(source.family, shape), dtype)
    parts = list(_layer_parts(source, wholes))
    work = {
        "input": _fingerprint([source.path / f for f in {t.file for t in source.tensors.values()}]),
        "dtype": str(dtype),
        "query groups": shape.num_query_groups,
    }
    with StagedFolder(out_dir, work) as staged:
        folder = staged.path / RELEASE
        folder.mkdir(exist_ok=True)

        def make(part: _LayerPart) -> list[Any]:
            with DistcpFile(folder / part.name) as file:
                write_layer(file, source, part.parameters, wholes)
            return [record.to_json() for record in file.records]

        made = staged.do(parts, make, num_workers=num_workers, on_progress=on_progress)
        with DistcpFile(folder / "common.distcp") as file:
            file.write_object(COMMON_STATE, common_state(arguments))
        records = [Record.from_json(r) for part in parts for r in made[part.name]]
        write_checkpoint_index(folder, [*records, *file.records])
        template = staged.path / TEMPLATE_DIR
        template.mkdir(exist_ok=True)
        copy_companions(source.path, template)
        if source.carried:
            write_carried(source, template / CARRIED_FILE, carried_plans(source))
        kept = source.table.buffers
        types = types_by_size(
            (t.shape, t.dtype if dtype is None or name in kept else dtype)
            for name, t in source.tensors.items()
        )
        write_config(source, template, types[0])
        (staged.path / TRACKER_FILE).write_text(RELEASE, encoding="utf-8")
        staged.finish()


def _wholes(source: HfFolder, table: NameTable, dtype: torch.dtype | None) -> dict[str, _Whole]:
    """Returns key -> shape and type. The type of a key is the narrowest that represents all of its tensors exactly."""
    wholes: dict[str, _Whole] = {}
    for p in table.stored_parameters():
        stored = reduce(torch.promote_types, (source.tensors[name].dtype for name in p.binding.hf_names))
        if p.key not in wholes:
            shape = p.binding.shard_shape(p.binding.entry.layout(table.shape, 0, 1, None))
            wholes[p.key] = _Whole(shape, written_type(p.binding.entry, stored, dtype, is_fp8=False))
        elif dtype is None:
            wholes[p.key] = wholes[p.key]._replace(dtype=torch.promote_types(wholes[p.key].dtype, stored))
    return wholes


def _layer_parts(source: HfFolder, wholes: dict[str, _Whole]) -> Iterator[_LayerPart]:
    groups = groupby(source.table.stored_parameters(), key=lambda p: p.binding.prefix)
    for i, (_, group) in enumerate(groups):
        parameters = tuple(group)
        num_bytes = sum(wholes[p.key].num_bytes for p in parameters)
        yield _LayerPart(f"__{i}_0.distcp", num_bytes, parameters)


def write_layer(
    file: DistcpFile,
    source: HfFolder,
    parameters: Sequence[StoredParameter],
    wholes: dict[str, _Whole],
) -> None:
    modules = {}
    for parameter in parameters:
        whole = wholes[parameter.key]
        layout = parameter.binding.entry.layout(source.shape, 0, 1, whole.shape)
        position = 0
        for suffix, length in parameter.sections or (("", layout.length),):
            section = _clip(layout, position, position + length) if parameter.sections else layout
            _write_tensor(file, source, parameter, suffix, section, whole)
            position += length
        modules[parameter.key.rpartition(".")[0], parameter.position] = parameter.stack
    for (module, index), stack in modules.items():
        if module.endswith(_WITH_EXTRA_STATE) or "linear" in module or "layernorm" in module:
            file.write_object(_extra_state_key(module, index, stack), None)


def _write_tensor(
    file: DistcpFile,
    source: HfFolder,
    parameter: StoredParameter,
    suffix: str,
    layout: ShardLayout,
    whole: _Whole,
) -> None:
    """Writes a parameter, or the section of it that ``layout`` describes."""
    size = list(whole.shape)
    size[layout.dim] = layout.length
    leading = (1,) * len(parameter.position)
    position = 0
    for stored in _read_chunks(source, parameter, layout, _size(size, whole.dtype)):
        chunk = stored.to(whole.dtype)
        if not is_finite(chunk):
            raise WeightsError(
                f"model folder {source.path}: {_describe_not_finite(source, parameter, chunk.dtype)}"
            )
        offsets = [0] * len(size)
        offsets[layout.dim] = position
        position += chunk.shape[layout.dim]
        file.write_chunk(
            parameter.key + suffix,
            chunk.reshape(*leading, *chunk.shape),
            (*parameter.position, *offsets),
            (*parameter.stack, *size),
        )


def _read_chunks(
    source: HfFolder, parameter: StoredParameter, layout: ShardLayout, num_bytes: int
) -> Iterator[Tensor]:
    """Yields a tensor of a checkpoint in equal chunks along the dimension that ranks split, so that a rank can read only its own
    part.

    The chunks have the stored type.
    """
    num = num_chunks(layout.length, num_bytes) if parameter.binding.entry.is_sharded else 1
    length = layout.length // num
    if layout.dim == 0:
        parts = (_clip(layout, i * length, (i + 1) * length) for i in range(num))
        chunks: Iterable[Tensor] = (read_shard(source, parameter.binding, part) for part in parts)
    else:  # a range of columns is scattered over the file, so the parameter is read once
        chunks = read_shard(source, parameter.binding, layout).split(length, layout.dim)
    yield from chunks


def _describe_not_finite(source: HfFolder, parameter: StoredParameter, made: torch.dtype) -> str:
    """Names the tensor of a parameter that has NaN or infinity, or that overflows as type ``made``."""
    for name in parameter.binding.hf_names:
        stored = source.read(name)
        if not is_finite(stored):
            return f"{name} contains {NOT_FINITE}"
        if not is_finite(stored.to(made)):
            return f"--dtype: {name} {describe_overflow(stored, made)}. {_WIDER_TYPE}"
    raise AssertionError(f"{parameter.key} is not finite, but its tensors are")


def _clip(layout: ShardLayout, start: int, stop: int) -> ShardLayout:
    """Returns the layout of the part of a shard from ``start`` to ``stop`` along its dimension."""
    pieces, position = [], 0
    for tensor, first, last in layout.pieces:
        low, high = max(start, position), min(stop, position + last - first)
        if low < high:
            pieces.append(Piece(tensor, first + low - position, first + high - position))
        position += last - first
    return ShardLayout(layout.dim, stop - start, tuple(pieces))


def num_chunks(length: int, num_bytes: int) -> int:
    """Number of chunks of a parameter that ranks split: the largest power of two up to 16 that divides it into chunks of at
    least 1 MiB."""
    num = _MAX_CHUNKS
    while num > 1 and (length % num or num_bytes // num < _MIN_CHUNK_BYTES):
        num //= 2
    return num


def _extra_state_key(module: str, index: tuple[int, ...], stack: tuple[int, ...]) -> str:
    """Returns the key of the empty object that Megatron expects for every module that may have an FP8 state."""
    position, size = (".".join(map(str, numbers)) for numbers in (index or (0,), stack or (1,)))
    return f"{module}._extra_state/shard_{position}_{size}"


# ---- to Hugging Face


class _FilePart(NamedTuple):
    """One safetensors file: its parameters, and the tensors made from each."""

    name: str
    num_bytes: int
    parameters: list[tuple[StoredParameter, list[TensorPlan]]]
    joined: dict[str, JoinedTensor]

    @property
    def planned(self) -> list[TensorPlan]:
        """The tensors of the file."""
        return join_plans((plan for _, plans in self.parameters for plan in plans), self.joined)


def megatron_to_hf(
    source: TorchDistFolder,
    template: HfFolder,
    out_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    is_fp8: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    num_workers: int = 1,
    on_progress: Progress = _silent,
) -> None:
    """Writes a checkpoint's weights, without optimizer and other state, as a folder that transformers loads.

    Each worker holds one parameter in memory, and a copy of it if the checkpoint interleaves several tensors in it.

    Args:
        source: an opened checkpoint, from a run or a conversion.
        template: gives config, tokenizer and chat template; its weights are not read.
        out_dir: the folder to write; must not exist, or be empty. It exists only when it is complete.
        dtype: type of all weights; None keeps the checkpoint's types. config.json names the type that is written.
        is_fp8: quantize the layers' matrices to e4m3 in blocks, for serving. Other tensors get ``dtype``; with None float32
            becomes bfloat16.
        max_shard_bytes: largest size of a file, bytes.
        num_workers: number of files to write at a time.
        on_progress: called with the bytes that were written since the last call.

    Raises:
        ValueError: ``out_dir`` is in use, or ``is_fp8`` does not fit the model.
        CheckpointError: the checkpoint does not fit the template, or the disk is full. Finished files are kept.
        WeightsError: a tensor has NaN or infinity, or overflows as ``dtype``. No file is kept.
    """
    check_parameters(source, template.table)
    if is_fp8 and template.family.has_expert_biases:
        raise ValueError(
            f"--fp8: engines do not read the experts of {template.family.architecture} in FP8. Leave --fp8 out, and serve this model in "
            "bfloat16."
        )
    if is_fp8 and template.carried:
        raise ValueError(
            f"--fp8: {next(iter(template.carried))} and {len(template.carried) - 1} more tensors are not part of the trained model and stay "
            "in 16 bits, which engines would read as FP8. Leave --fp8 out, and serve this model in bfloat16."
        )
    carried = split_plans(carried_plans(template), max_shard_bytes)
    parts = _file_parts(source, template, dtype, is_fp8, max_shard_bytes, len(carried))
    num_files = len(parts) + len(carried)
    work = {
        "input": _fingerprint([source.path / ".metadata", *source.path.glob("*.distcp")]),
        "template": hashlib.sha256((template.path / "config.json").read_bytes()).hexdigest(),
        "dtype": str(dtype),
        "fp8": is_fp8,
        "shard size": max_shard_bytes,
    }
    with StagedFolder(out_dir, work) as staged:

        def make(part: _FilePart) -> None:
            with replacing(staged.path / part.name) as temporary:
                write_file(temporary, source, template.table, part)

        staged.do(parts, make, num_workers=num_workers, on_progress=on_progress)
        weight_map = {plan.name: part.name for part in parts for plan in part.planned}
        for i, shard in enumerate(carried, start=len(parts)):
            with replacing(staged.path / file_name(i, num_files)) as temporary:
                write_carried(template, temporary, shard)
            weight_map.update((plan.name, file_name(i, num_files)) for plan in shard)
        if num_files > 1:
            num_bytes = sum(part.num_bytes for part in parts)
            num_bytes += sum(plan.num_bytes for shard in carried for plan in shard)
            write_index(staged.path, weight_map, num_bytes)
        copy_companions(template.path, staged.path)
        more = {"quantization_config": quantization_config(template.table.hf_shapes)} if is_fp8 else {}
        types = types_by_size(_plain_weights(parts))
        write_config(template, staged.path, types[0], **more)
        kind = "fp8 in blocks of 128 x 128, the rest " * is_fp8 + type_names(types)
        facts = {"Weights": kind, **saved_run_facts(source.path.parent, source.iteration)}
        write_card(staged.path, template, Path(out_dir).name, facts)
        staged.finish()


def check_parameters(source: TorchDistFolder, table: NameTable) -> None:
    """Refuses a checkpoint with missing, additional or differently shaped parameters."""
    known = set()
    for parameter in table.stored_parameters():
        found = places(source, parameter)
        for (key, index), shape in zip(found, _section_shapes(source, table, parameter), strict=True):
            expected = (*parameter.stack[len(parameter.stack) - len(index) :], *shape)
            if tuple(source.tensors[key].size) != expected:
                raise CheckpointError(
                    f"checkpoint {source.path}: {key} has shape {list(source.tensors[key].size)}, config.json implies "
                    f"{list(expected)}; give the --hf-model that the run was started with"
                )
            known.add(key)
    _check_query_groups(source, table)
    extra = [key for key in source.tensors if key not in known and not key.startswith("optimizer.")]
    if extra:
        raise CheckpointError(
            f"checkpoint {source.path}: {counted(len(extra), 'tensor')} unknown to the model of config.json, the first is "
            f"{extra[0]}; give the --hf-model that the run was started with"
        )


def _section_shapes(
    source: TorchDistFolder, table: NameTable, parameter: StoredParameter
) -> list[tuple[int, ...]]:
    """Returns the shape that each tensor of a parameter should have, with as much padding as this checkpoint has."""
    key, index = places(source, parameter)[0]
    size = None if parameter.sections else source.tensors[key].size[len(index) :]
    try:
        layout = parameter.binding.entry.layout(table.shape, 0, 1, size)
    except (ValueError, IndexError):
        layout = parameter.binding.entry.layout(table.shape, 0, 1, None)
    shape = parameter.binding.shard_shape(layout)
    return [(rows, *shape[1:]) for _, rows in parameter.sections] or [shape]


def _check_query_groups(source: TorchDistFolder, table: NameTable) -> None:
    """Refuses a checkpoint whose projections before and after attention have different numbers of query groups."""
    shape = table.shape
    heads = shape.num_attention_heads // shape.num_query_groups * shape.head_dim
    found = {}
    for parameter in table.stored_parameters():
        rows = sum(size[0] for size in parameter.binding.hf_shapes) // shape.num_query_groups
        for name, size in (("linear_qkv.weight", rows), ("linear_proj.weight", heads)):
            if parameter.key.endswith(name):
                ((key, index),) = places(source, parameter)
                dim = len(index) + (name == "linear_proj.weight")
                found[name] = source.tensors[key].size[dim] / size
    if len(set(found.values())) > 1 or any(groups % 1 for groups in found.values()):
        raise CheckpointError(
            f"checkpoint {source.path} does not have the attention heads of config.json ({shape.num_attention_heads} of "
            f"{shape.head_dim} in {shape.num_query_groups} groups); give the --hf-model that the run was started with"
        )


def places(source: TorchDistFolder, parameter: StoredParameter) -> list[tuple[str, tuple[int, ...]]]:
    """Returns key and index of each tensor of a parameter in this checkpoint. Most parameters are one tensor."""
    return [_place(source, parameter, suffix) for suffix, _ in parameter.sections or (("", 0),)]


def _place(source: TorchDistFolder, parameter: StoredParameter, suffix: str) -> tuple[str, tuple[int, ...]]:
    """Returns key and index of a tensor, whether layers are stacked or not."""
    stacked, single = parameter.key + suffix, parameter.single_key + suffix
    for key, index in ((stacked, parameter.position), (single, parameter.position[1:])):
        if key in source.tensors:
            return key, index
    raise CheckpointError(
        f"checkpoint {source.path} has no {stacked}; give the --hf-model that the run was started with"
    )


def read_parameter(source: TorchDistFolder, table: NameTable, parameter: StoredParameter) -> list[Tensor]:
    """Reads the Hugging Face tensors of a parameter, in the order of its names, in the checkpoint's type."""
    sections = [source.read(*place) for place in places(source, parameter)]
    whole = sections[0] if len(sections) == 1 else torch.cat(sections)
    layout = parameter.binding.entry.layout(table.shape, 0, 1, whole.shape)
    if len(layout.pieces) > len(parameter.binding.hf_names):
        return assemble([whole], parameter.binding, table)
    # each tensor is one contiguous piece, so views suffice
    sizes = [stop - start for _, start, stop in layout.pieces]
    starts = accumulate(sizes, initial=0)
    return [whole.narrow(layout.dim, start, size) for start, size in zip(starts, sizes, strict=False)]


def _file_parts(
    source: TorchDistFolder,
    template: HfFolder,
    dtype: torch.dtype | None,
    is_fp8: bool,
    max_shard_bytes: int,
    num_more: int,
) -> list[_FilePart]:
    """Splits the model into files. The tensors of one parameter, and of a joined tensor, stay in one file.

    ``num_more`` files follow these. Engines read the experts of an FP8 model one by one.
    """
    joined = {} if is_fp8 else template.joined
    files: list[list[tuple[StoredParameter, list[TensorPlan]]]] = []
    sizes: list[int] = []
    for group in _joined_parameters(template.table, joined):
        planned = []
        for parameter in group:
            stored = source.tensors[places(source, parameter)[0][0]].properties.dtype
            kind = written_type(parameter.binding.entry, stored, dtype, is_fp8=is_fp8)
            planned.append((parameter, _plan(parameter, kind, is_fp8)))
        num_bytes = sum(_size(plan.shape, plan.dtype) for _, plans in planned for plan in plans)
        if not files or sizes[-1] + num_bytes > max_shard_bytes:
            files.append([])
            sizes.append(0)
        files[-1] += planned
        sizes[-1] += num_bytes
    return [
        _FilePart(file_name(i, len(files) + num_more), size, parameters, joined)
        for i, (parameters, size) in enumerate(zip(files, sizes, strict=True))
    ]


def _joined_parameters(
    table: NameTable, joined: dict[str, JoinedTensor]
) -> Iterator[tuple[StoredParameter, ...]]:
    """Yields the parameters whose tensors are parts of one joined tensor together, and the others alone."""
    whole_of = {part: name for name, tensor in joined.items() for part in tensor.parts}

    def whole(parameter: StoredParameter) -> str:
        name = parameter.binding.hf_names[0]
        return whole_of.get(name, name)

    yield from (tuple(group) for _, group in groupby(table.stored_parameters(), key=whole))


def written_type(
    entry: Entry, stored: torch.dtype, dtype: torch.dtype | None, *, is_fp8: bool
) -> torch.dtype:
    """Returns the type of an exported tensor that is not quantized; the arguments are those of ``megatron_to_hf``."""
    if entry.is_buffer:
        return stored
    return dtype or (unquantized_type(stored) if is_fp8 else stored)


def _plain_weights(parts: Sequence[_FilePart]) -> Iterator[tuple[tuple[int, ...], torch.dtype]]:
    """Yields shape and type of every tensor that is not quantized."""
    for part in parts:
        for parameter, plans in part.parameters:
            names = parameter.binding.hf_names
            plain = (p for p in plans if p.name in names and p.dtype is not torch.float8_e4m3fn)
            yield from ((plan.shape, plan.dtype) for plan in plain)


def _plan(parameter: StoredParameter, dtype: torch.dtype, is_fp8: bool) -> list[TensorPlan]:
    plans = []
    for name, shape in zip(parameter.binding.hf_names, parameter.binding.hf_shapes, strict=True):
        if is_fp8 and is_linear_layer(name, shape):
            plans.append(TensorPlan(name, shape, torch.float8_e4m3fn))
            plans.append(TensorPlan(name + SCALE_SUFFIX, scale_shape(shape), torch.float32))
        else:
            plans.append(TensorPlan(name, shape, dtype))
    return plans


def write_file(path: Path, source: TorchDistFolder, table: NameTable, part: _FilePart) -> None:
    writer = ShardWriter(path, part.planned)
    try:
        following = [places(source, parameter) for parameter, _ in part.parameters[1:]]
        for (parameter, plans), ahead in zip(part.parameters, [*following, []], strict=True):
            for key, index in ahead:
                source.read_ahead(key, index)
            dtypes = {plan.name: plan.dtype for plan in plans}
            for name, tensor in zip(
                parameter.binding.hf_names, read_parameter(source, table, parameter), strict=True
            ):
                _check_finite(source, name, tensor, dtypes[name])
                if dtypes[name] is torch.float8_e4m3fn:
                    values, scales = quantized(tensor)
                    writer.write(name, values)
                    writer.write(name + SCALE_SUFFIX, scales)
                else:
                    writer.write(name, tensor.to(dtypes[name]))
    finally:
        writer.close()


def _check_finite(source: TorchDistFolder, name: str, tensor: Tensor, made: torch.dtype) -> None:
    """Refuses a tensor with NaN or infinity, or with values beyond the range of the type to write."""
    if not is_finite(tensor):
        raise WeightsError(f"checkpoint {source.path}: {name} contains {NOT_FINITE}")
    # FP8 has scales, and a type of the same range needs no second pass
    if made.itemsize > 1 and torch.finfo(made).max < torch.finfo(tensor.dtype).max:
        if not is_finite(tensor.to(made)):
            raise WeightsError(
                f"checkpoint {source.path}: --dtype: {name} {describe_overflow(tensor, made)}. {_WIDER_TYPE}"
            )
