"""Sandboxes that all tests of this folder share: starting one takes about a second."""

from collections.abc import Iterator

import pytest

from megatron_rasft.config.verify import SandboxLevel, VerifyConfig
from megatron_rasft.verify.programs.sandbox import LEVELS, Sandbox, SandboxError

PATIENT = VerifyConfig(verify_code_timeout_s=120.0, verify_sandbox_level="limits")
"""Accepts every level, because the tests run on machines that allow only the weakest."""


def tight(timeout_s: float) -> VerifyConfig:
    """Returns limits for hostile programs."""
    return VerifyConfig(
        verify_code_timeout_s=timeout_s,
        verify_code_memory_mib=256,
        verify_code_output_mib=16,
        verify_sandbox_level="limits",
    )


@pytest.fixture(scope="session", params=LEVELS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """A sandbox of each level with tight limits and a deadline of 2 s, for hostile programs."""
    level: SandboxLevel = request.param
    config = tight(2.0)
    try:
        made = Sandbox(config, [level])
    except SandboxError as error:
        pytest.skip(f"this machine does not allow the level {level}: {error}")
    with made:
        yield made


@pytest.fixture(scope="session")
def brief_sandbox(sandbox: Sandbox) -> Iterator[Sandbox]:
    """A sandbox of the same level with a deadline of 0.5 s, for programs that only wait for it."""
    config = tight(0.5)
    with Sandbox(config, [sandbox.level]) as made:
        yield made


@pytest.fixture(scope="session")
def patient_sandbox(sandbox: Sandbox) -> Iterator[Sandbox]:
    """A sandbox of the same level with a deadline of 120 s, for programs that must end by themselves on a busy machine."""
    with Sandbox(PATIENT, [sandbox.level]) as made:
        yield made


@pytest.fixture(scope="session")
def strongest_sandbox() -> Iterator[Sandbox]:
    """A sandbox of the strongest level with a deadline of 120 s, for tests that do not depend on the level."""
    with Sandbox(PATIENT) as made:
        yield made
