"""Tensors of a folder that are not part of the trained model, such as layers for multi-token prediction: exports get a copy of them."""

from pathlib import Path

from megatron_rasft.weights.folder import ModelFolder
from megatron_rasft.weights.gathering import TensorPlan
from megatron_rasft.weights.shard_writer import ShardWriter, split_plans


def carried_plans(folder: ModelFolder) -> list[TensorPlan]:
    """Returns name, shape and type of the carried tensors."""
    return [TensorPlan(name, tensor.shape, tensor.dtype) for name, tensor in folder.carried.items()]


def write_carried(folder: ModelFolder, path: Path, plans: list[TensorPlan]) -> None:
    """Copies carried tensors of ``folder`` into a new safetensors file, one tensor at a time."""
    writer = ShardWriter(path, plans)
    try:
        for plan in plans:
            writer.write(plan.name, folder.read(plan.name))
    finally:
        writer.close()


def write_carried_files(
    folder: ModelFolder, out_dir: Path, max_shard_bytes: int
) -> tuple[dict[str, list[str]], int]:
    """Copies all carried tensors into ``out_dir``. The names of the files come after those of pipeline stages.

    Returns:
        File name -> tensor names, and the bytes of all tensors.
    """
    files: dict[str, list[str]] = {}
    plans = carried_plans(folder)
    for i, shard in enumerate(split_plans(plans, max_shard_bytes)):
        name = f"unchanged-{i:05d}.safetensors"
        write_carried(folder, out_dir / name, shard)
        files[name] = [plan.name for plan in shard]
    return files, sum(plan.num_bytes for plan in plans)
