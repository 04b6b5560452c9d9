"""Puts the scripts of tools/ into the wheel, as the package megatron_rasft.commands. Everything else is in pyproject.toml.

A top-level package "tools" would clash with those of other projects.
"""

from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py

COMMANDS = "megatron_rasft.commands"
CARRIED = {
    "__init__",
    "check_servers",
    "convert_checkpoint",
    "evaluate",
    "plan",
    "prepare_data",
    "report",
    "serve_rollouts",
    "sglang_on_cpu",  # serve_rollouts starts it
}
"""The other scripts work in a checkout only."""


class BuildPy(build_py):
    """Leaves the other scripts out."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if package != COMMANDS or module[1] in CARRIED]


setup(
    packages=[*find_namespace_packages(include=["megatron_rasft*"]), COMMANDS],
    package_dir={COMMANDS: "tools"},
    cmdclass={"build_py": BuildPy},
)
