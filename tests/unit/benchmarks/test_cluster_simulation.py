"""The simulation of benchmarks/cluster_simulation.py agrees with arithmetic where there is any, and draws its plot."""

from pathlib import Path

import pytest

from benchmarks import cluster_simulation
from benchmarks.cluster_simulation import PARTS, lost_s, problems_of, sampling_s, server_gpus


def test_equal_responses_fill_the_batch_as_often_as_needed() -> None:
    lengths = [100.0] * 12
    full = 100 * (0.01 + 4 * 0.001)
    assert sampling_s(12, 4, 0.01, 0.001, lengths) == pytest.approx(3 * full)
    assert sampling_s(2, 4, 0.01, 0.001, lengths) == pytest.approx(100 * (0.01 + 2 * 0.001))


def test_one_long_response_is_waited_for() -> None:
    short = sampling_s(4, 4, 0.01, 0.001, [100.0] * 4)
    assert sampling_s(4, 4, 0.01, 0.001, [100.0, 100.0, 100.0, 1000.0]) == pytest.approx(short + 900 * 0.011)


def test_a_freed_place_is_taken_by_the_next_response() -> None:
    # 10 tokens of two, then 30 of the long one beside 10 + 20 of the others
    assert sampling_s(4, 2, 1.0, 0.0, [40.0, 10.0, 10.0, 20.0]) == pytest.approx(40.0)


def test_failures_cost_more_on_more_gpus_and_less_with_more_saves() -> None:
    day = 24 * 3600.0
    few, many = lost_s(day, 3600, 64, 0), lost_s(day, 3600, 4096, 0)
    assert many > 10 * few
    assert lost_s(day, 600, 4096, 0) < many
    expected = day * 4096 / (cluster_simulation.GPU_HOURS_BETWEEN_FAILURES * 3600)
    assert many == pytest.approx(expected * (1800 + cluster_simulation.RESTART_S), rel=0.3)


def test_servers_have_whole_nodes() -> None:
    assert server_gpus(32) == [8, 16, 24] and server_gpus(64) == [8, 16, 24, 32, 40, 48]


def test_batch_divides_by_the_replicas_of_every_share() -> None:
    assert [problems_of(gpus) for gpus in (32, 40, 48, 56, 512 * 7)] == [1024, 1280, 1152, 896, 896]


def test_table_and_plot_are_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "plot.svg"
    cluster_simulation.main(["--setting", "qwen3-8b", "--num-gpus", "16", "--output", str(output)])
    shown = capsys.readouterr().out
    assert "Calculated, not measured" in shown and all(part in shown for part in PARTS)
    text = output.read_text(encoding="utf-8")
    assert text.startswith("<?xml") and "calculated, not measured" in text
    with pytest.raises(SystemExit):
        cluster_simulation.main(["--num-gpus", "24"])
    assert "--num-gpus 24" in capsys.readouterr().err
