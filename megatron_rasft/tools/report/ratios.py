"""Ratios of reference and policy of the examples' rollouts: from the log-probabilities that the run stored, or from the reference model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rasft.errors import RasftError, first_line
from megatron_rasft.objective.families import Rasft
from megatron_rasft.tools.report.records import RunRecords
from megatron_rasft.tools.report.rollouts import Sample
from megatron_rasft.types import TrainingSample


@dataclass
class Ratios:
    """The ratios of some rollouts."""

    formula: str = "weight × p"
    """The product that the page shows with these ratios."""
    notes: list[str] = field(default_factory=list)
    values: dict[int, list[float]] = field(default_factory=dict)
    """id() of a sample -> the ratio of each token."""

    def of(self, sample: Sample) -> list[float]:
        """The ratio of each token; 1 if it is unknown."""
        return self.values.get(id(sample), [1.0] * len(sample.logprobs))


def read_ratios(records: RunRecords, samples: Sequence[Sample], reference: Path | None) -> Ratios:
    """Gets the ratios of the rollouts that are trained on.

    Args:
        records: the run's settings.
        samples: rollouts with their tokens and log-probabilities.
        reference: a model folder, with which log-probabilities are calculated that the run did not store; None for stored ones only.

    Raises:
        ValueError: ``reference`` cannot be loaded.
    """
    objective = _objective(records)
    if objective is None or not objective.needs_reference_logprobs():
        return Ratios()
    trained = [sample for sample in samples if sample.weight]
    wanted = [
        TrainingSample(
            problem_id="",
            kind="rollout",
            prompt_ids=sample.prompt_ids,
            response_ids=sample.response_ids,
            weight=sample.weight,
        )
        for sample in trained
    ]
    missing = _fill_from_cache(records, wanted)
    if missing and reference is not None:
        missing = _fill_from_model(reference, missing)
    ratios = Ratios(formula="ratio × weight × p" if len(missing) < len(wanted) else "weight × p")
    if missing:
        ratios.notes.append(
            f"The ratio of {len(missing)} of {len(wanted)} trained rollouts is unknown and left out of the product: the run's "
            "cache of reference log-probabilities has no such entry. --reference-model calculates it."
        )
    for sample, filled in zip(trained, wanted):
        if filled.ref_logprobs is not None:
            ratios.values[id(sample)] = _ratios_of(objective, sample, filled.ref_logprobs)
    return ratios


def _objective(records: RunRecords) -> Rasft | None:
    """The objective of the run with its flags; None if it is another one than RASFT, or unknown."""
    if records.setting("objective", "objective") not in (None, "rasft") or not records.config:
        return None
    known = Rasft.flag_fields()
    settings = records.config.get("rasft", {})
    flags = {k: v for section in settings.values() for k, v in section.items() if k in known}
    return Rasft(**flags)


def _ratios_of(objective: Rasft, sample: Sample, ref_logprobs: Sequence[float]) -> list[float]:
    """Ratio of each token, calculated with the function of the loss."""
    import torch

    from megatron_rasft.objective.token_losses import PackedTokens

    logprobs = torch.tensor(sample.logprobs)
    tokens = PackedTokens(
        logprobs=logprobs,
        loss_mask=torch.ones_like(logprobs, dtype=torch.bool),
        segment_ids=torch.zeros_like(logprobs, dtype=torch.int64),
        num_segments=1,
        weights=torch.tensor([sample.weight]),
        ref_logprobs=torch.tensor(ref_logprobs),
    )
    return [float(ratio) for ratio in tokens.reference_ratio(objective.ratio_rule())[0]]


def _fill_from_cache(records: RunRecords, samples: list[TrainingSample]) -> list[TrainingSample]:
    """Sets the log-probabilities that the run stored. Returns the samples without any."""
    path, model = records.reference_cache_path, records.model_folder
    if not samples or path is None or model is None or not model.is_dir():
        return samples
    from megatron_rasft.training.reference import LogprobCache, initial_fingerprint, logprobs_fingerprint

    try:
        weights = initial_fingerprint(model, None)
        precision = [records.megatron(name) for name in ("params_dtype", "fp8", "fp8_recipe")]
        LogprobCache(path, logprobs_fingerprint(weights, *precision, is_scaled=False)).fill(samples)
    except (OSError, RasftError):
        pass  # a note on the page says that the ratios are unknown
    return [sample for sample in samples if sample.ref_logprobs is None]


def _fill_from_model(folder: Path, samples: list[TrainingSample]) -> list[TrainingSample]:
    """Sets the log-probabilities under a model, which transformers runs on the CPU. Returns the samples without any: none.

    Raises:
        ValueError: the model cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32, local_files_only=True
        )
    except Exception as error:  # transformers raises many different exceptions for broken folders
        raise ValueError(f"--reference-model {folder} cannot be loaded: {first_line(error)}") from error
    with torch.inference_mode():
        for sample in samples:
            ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
            logprobs = model(ids).logits[0, len(sample.prompt_ids) - 1 : -1].log_softmax(-1)
            sample.ref_logprobs = logprobs.gather(1, torch.tensor(sample.response_ids)[:, None])[
                :, 0
            ].tolist()
    return []
