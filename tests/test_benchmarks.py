"""The long comparisons, at their smallest."""

import json
import math

import pytest
import yaml

from benchmarks import losses
from benchmarks.arms import interval, markdown


def test_interval_is_students():
    # mean 2, deviation 1, t = 4.303 for two degrees of freedom: 4.303 / sqrt(3)
    assert interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(2.484, abs=1e-3))
    assert math.isnan(interval([1.0])[1])


def test_tables_are_markdown():
    assert markdown(["", "AP"], [["pkd", "1"]]) == "|  | AP |\n| :-- | --: |\n| pkd | 1 |\n"


def test_losses_that_share_pull_as_strongly_as_one(tmp_path):
    overrides = losses.overrides_of("cross_kd + pkd", tmp_path)
    assert (
        'losses={"cross_kd": {"name": "cross_kd", "weight": 0.5}, "pkd": {"name": "pkd", "weight": 0.5}}' in overrides
    )
    assert "balance=gradient" in overrides and "pruning=null" in overrides


@pytest.mark.slow
def test_losses_are_compared_and_finished_arms_kept(settings, tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text(yaml.safe_dump(settings))
    arms = ["plain", "pkd", "scores + boxes"]
    result = losses.compare(tmp_path / "out", str(config), [], arms, seeds=2, epochs=1)
    assert list(result["arms"]) == arms
    for entry in result["arms"].values():
        assert len(entry["ap"]) == 2 and entry["seconds"] > 0 and entry["kept_mib"] > 0
    assert result["arms"]["pkd"]["kept_mib"] > result["arms"]["plain"]["kept_mib"]
    table = losses.table(result)
    assert table.count("\n") == 2 + 1 + 3 and "| pkd | " in table
    assert "## Drawn scenes" in losses.document({"scenes": result}, 2, 1)

    summaries = sorted((tmp_path / "out").rglob("summary.json"))
    assert len(summaries) == 1 + 3 * 2
    times = [path.stat().st_mtime_ns for path in summaries]
    again = losses.compare(tmp_path / "out", str(config), [], arms, seeds=2, epochs=1)
    assert [path.stat().st_mtime_ns for path in summaries] == times
    assert json.dumps(again["arms"]["pkd"]["ap"]) == json.dumps(result["arms"]["pkd"]["ap"])
