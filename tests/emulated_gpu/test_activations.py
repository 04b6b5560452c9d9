"""The formula of activations equals what Transformer Engine's layers keep, for the models of examples/slurm with smaller widths."""

import pytest

from tests.emulated_gpu.traced_layers import trace_settings
from tests.slurm_settings import SETTINGS, Setting

TOLERANCE = 0.02
"""The formula leaves out indices and per-token statistics."""


def test_formula_is_what_the_layers_of_every_setting_keep() -> None:
    traces = trace_settings()
    assert {*traces} == {path.stem for path in SETTINGS}
    for path in SETTINGS:
        trace = traces[path.stem]
        assert trace.calculated == pytest.approx(trace.kept, rel=TOLERANCE), (path.stem, trace)
        assert trace.weight_copies == (2 if Setting(path).precision == "fp8" else 0)
