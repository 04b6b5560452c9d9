"""The seccomp filter alone: it must forbid the calls that an old Landlock allows."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[4]

CUTS = """
import os, sys
from megatron_rasft.verify.programs import seccomp
seccomp.filter_system_calls(may_open=True, may_change_files=True, may_change_attributes=False, may_truncate=False)
for cut in (lambda p: os.truncate(p, 0), lambda p: os.open(p, os.O_RDONLY | os.O_TRUNC), lambda p: os.chmod(p, 0)):
    try: cut(sys.argv[1])
    except PermissionError: print("refused")
open(sys.argv[1] + ".own", "w").write("x")
"""


def test_filter_refuses_truncation_where_landlock_cannot(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    command = [sys.executable, "-c", CUTS, str(file)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout == "refused\n" * 3
    assert [p.read_text() for p in sorted(tmp_path.iterdir())] == ["x", "x"]
