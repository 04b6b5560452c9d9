"""The counts of benchmarks/logprobs.py on the meta device."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_fused_logprobs_stay_under_the_bar_and_plain_ones_do_not() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/logprobs.py", "--no-time"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["max_bytes_per_logit"] <= 12
    assert report["counted"].keys() == {"1.5B", "8B", "70B TP8"}
    for rows in report["counted"].values():
        assert {row["kl"] for row in rows} == {None, "forward", "reverse"}
        for row in rows:
            # A logit is read twice and its gradient written once, 2 bytes each. With a KL the reference's logit is read twice too.
            least = 6 if row["kl"] is None else 10
            assert row["bytes_per_logit"] >= (least if row["way"].startswith("fused") else 48)
    # figures of an audit at commit 90c0253, counted by an independent program
    (first, *_) = report["counted"]["1.5B"]
    assert (first["kernels"], first["bytes_per_logit"]) == (507, 75.92)
