"""The long comparisons, at their smallest."""

import json
import math

import pytest
import torch
import yaml

from benchmarks import coco_size, importance, losses
from benchmarks.arms import interval, markdown
from distill.data import Batch, open_index
from distill.distiller import Distiller
from distill.pruning.graph import find_groups


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


def test_data_of_a_size_are_opened_and_scored(tmp_path, monkeypatch):
    monkeypatch.setattr(coco_size, "IMAGES", 12)
    monkeypatch.setattr(coco_size, "BOXES", 30)
    monkeypatch.setattr(coco_size, "SCORED", 4)
    coco_size.make(tmp_path)
    index = open_index(tmp_path, "train")
    assert (len(index), len(index.boxes)) == (12, 30)
    found = coco_size.score_it()
    assert list(found) == ["scoring_by_pycocotools_s", "scoring_by_faster_coco_eval_s"]
    assert coco_size.memory(["self"]) > 50


def test_what_nothing_listens_to_adds_no_loss(build_tiny, images, targets):
    unit, batches = Distiller(build_tiny()), [Batch(images, targets, [], [])]
    group = next(g for g in find_groups(unit, (64, 64)) if g.name == "student.head.class_tower.0.conv")
    with torch.no_grad():
        unit.student.head.class_logits.weight[:, 3] = 0
        unit.student.head.class_logits.weight[:, 4] = 5
    before = importance.task_loss(unit, batches)
    assert importance.added_loss(unit, group, 3, batches, before) == pytest.approx(0, abs=1e-5)
    assert abs(importance.added_loss(unit, group, 4, batches, before)) > 1e-3
    assert importance.task_loss(unit, batches) == before


def test_spearman_compares_ranks():
    # ranks 1 2 3 and 1 3 2: 1 - 6 (0 + 1 + 1) / (3 * 8)
    assert importance.spearman([0.1, 0.2, 9.0], [1.0, 3.0, 2.0]) == pytest.approx(0.5)
    assert importance.spearman([1.0, 1.0, 1.0], [1.0, 3.0, 2.0]) == 0.0


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
