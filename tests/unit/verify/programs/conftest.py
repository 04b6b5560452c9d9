"""Sandboxes that all tests of this folder share: starting one takes about a second."""

from collections.abc import Iterator

import pytest

from megatron_rasft.config.verify import SandboxLevel, VerifyConfig
from megatron_rasft.verify.programs.sandbox import LEVELS, Sandbox, SandboxError


@pytest.fixture(scope="session", params=LEVELS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """A sandbox of each level with tight limits and a deadline of 2 s, for hostile programs."""
    level: SandboxLevel = request.param
    config = VerifyConfig(verify_code_timeout_s=2.0, verify_code_memory_mib=256, verify_code_output_mib=16)
    try:
        made = Sandbox(config, [level])
    except SandboxError as error:
        pytest.skip(f"this machine does not allow the level {level}: {error}")
    with made:
        yield made


@pytest.fixture(scope="session")
def brief_sandbox(sandbox: Sandbox) -> Iterator[Sandbox]:
    """A sandbox of the same level with a deadline of 0.5 s, for programs that only wait for it."""
    config = VerifyConfig(verify_code_timeout_s=0.5, verify_code_memory_mib=256, verify_code_output_mib=16)
    with Sandbox(config, [sandbox.level]) as made:
        yield made


@pytest.fixture(scope="session")
def patient_sandbox(sandbox: Sandbox) -> Iterator[Sandbox]:
    """A sandbox of the same level with a deadline of 120 s, for programs that must end by themselves on a busy machine."""
    with Sandbox(VerifyConfig(verify_code_timeout_s=120.0), [sandbox.level]) as made:
        yield made


@pytest.fixture(scope="session")
def strongest_sandbox() -> Iterator[Sandbox]:
    """A sandbox of the strongest level with a deadline of 120 s, for tests that do not depend on the level."""
    with Sandbox(VerifyConfig(verify_code_timeout_s=120.0)) as made:
        yield made
