"""Sandboxes that all tests of this folder share: starting one takes about a second."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rasft.config.verify import SandboxLevel, VerifyConfig
from megatron_rasft.verify.programs.sandbox import LEVELS, Sandbox, SandboxError, allowance_of
from tests.unit.verify.programs.escape_targets import targets

__all__ = ["targets"]

REPOSITORY = Path(__file__).parents[4]

PATIENT = VerifyConfig(verify_code_timeout_s=600.0, verify_sandbox_level="limits")
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


def with_limits(sandbox: Sandbox, config: VerifyConfig) -> Sandbox:
    """Returns a sandbox with other limits that shares the launchers of ``sandbox``, which must be closed in its place."""
    other = copy.copy(sandbox)
    other.allowance = allowance_of(config)
    return other


@pytest.fixture(scope="session")
def brief_sandbox(sandbox: Sandbox) -> Sandbox:
    """A sandbox of the same level with a deadline of 0.5 s, for programs that only wait for it."""
    return with_limits(sandbox, tight(0.5))


@pytest.fixture(scope="session")
def watched_sandbox(sandbox: Sandbox) -> Sandbox:
    """A sandbox of the same level with tight limits and a deadline of 600 s, for programs that a limit ends before it."""
    return with_limits(sandbox, tight(600.0))


@pytest.fixture(scope="session")
def patient_sandbox(sandbox: Sandbox) -> Sandbox:
    """A sandbox of the same level with a deadline of 600 s, for programs that must end by themselves on a busy machine."""
    return with_limits(sandbox, PATIENT)


@pytest.fixture(scope="session")
def strongest_sandbox() -> Iterator[Sandbox]:
    """A sandbox of the strongest level with a deadline of 600 s, for tests that do not depend on the level."""
    with Sandbox(PATIENT) as made:
        yield made
