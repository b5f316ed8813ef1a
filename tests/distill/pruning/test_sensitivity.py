import csv
import sys

import pytest
import torch
import yaml

import students
from distill import sensitivity
from distill.data.shapes import CLASSES
from distill.distiller import Distiller
from distill.errors import UserError
from distill.measure import count_parameters
from distill.pruning.graph import find_groups
from distill.pruning.sensitivity import Sensitivity, read_curves, scan, write_sensitivities


def test_each_group_is_cut_alone(build_tiny):
    unit = Distiller(build_tiny())
    by_name = {g.name: g for g in find_groups(unit, (64, 64))}
    groups = [by_name[f"student.head.{tower}.0.conv"] for tower in ("class_tower", "box_tower")]
    before = count_parameters(unit.student)
    removed = lambda student: float(before - count_parameters(student))  # noqa: E731
    rows = list(scan(unit, groups, [torch.arange(16.0)] * 2, removed, shares=(0.1, 0.5, 0.99)))
    assert [(row.layer, row.width) for row in rows] == [
        *[("head.class_tower.0.conv", 16)] * 3,
        *[("head.box_tower.0.conv", 16)] * 3,
    ]
    assert [row.cut for row in rows[:3]] == [2 / 16, 8 / 16, 15 / 16]  # 14.4, 8 and 0.16 would stay
    # 16 x 9 entries of the filter, a scale and a shift for each of three levels, and 2 filters of 9 that read it
    assert [row.harm for row in rows[:3]] == [n * (16 * 9 + 6 + 18) for n in (2, 8, 15)]
    assert count_parameters(unit.student) == before


def test_a_table_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "a.csv"
    write_sensitivities(
        path, [Sensitivity("a", 8, 0.5, 2.0), Sensitivity("a", 8, 0.25, -1.0), Sensitivity("b", 4, 0.5, 3)]
    )
    assert read_curves(path) == {"a": (8, (0.25, 0.5), (-1.0, 2.0)), "b": (4, (0.5,), (3.0,))}


@pytest.mark.parametrize(
    "text",
    [
        "layer,cut\na,0.5\n",
        "layer,cut,harm\na,0.5,1\n",
        "layer,width,cut,harm\na,8,0.5,nan\n",
        "layer,width,cut,harm\na,8,1.5,1\n",
        "layer,width,cut,harm\na,x,0.5,1\n",
        "layer,width,cut,harm\na\n",
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path, text):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=r"^pruning.sensitivity: .*a.csv, line 2, needs a layer, its width, a cut"):
        read_curves(path)
    with pytest.raises(UserError, match=r"^pruning.sensitivity: no file .*b.csv; make it with"):
        read_curves(tmp_path / "b.csv")


@pytest.mark.parametrize(("harm", "shares"), [("loss", (0.25, 0.75)), ("ap", (0.5,))])
def test_the_command_writes_what_pruning_takes(build_tiny, settings, tmp_path, monkeypatch, harm, shares):
    settings |= {"teacher": None, "losses": {}, "pruning": None}
    classes = sorted(CLASSES)  # not in the order of the data
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(settings))
    students.save(build_tiny(class_names=classes), tmp_path / "run/student", {"image_size": [64, 64]})
    monkeypatch.setattr(sensitivity, "SHARES", shares)
    source = tmp_path / "run/student"
    monkeypatch.setattr(sys, "argv", ["sensitivity", str(source), "--harm", harm, "--importance", "taylor_gate"])
    assert sensitivity.main() == 0
    assert (tmp_path / "run/sensitivity.png").stat().st_size > 10_000
    with (tmp_path / "run/sensitivity.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert set(read_curves(tmp_path / "run/sensitivity.csv")) == {row["layer"] for row in rows}
    assert len(rows) == len(shares) * len({row["layer"] for row in rows})
    assert harm == "ap" or len({row["harm"] for row in rows}) > len(rows) / 2  # an untrained one finds nothing anyway


@pytest.mark.parametrize(
    ("source", "message"), [("nowhere.yaml", "nowhere.yaml: no such folder or file; give"), (".", "holds no")]
)
def test_a_source_that_is_none_is_one_line(monkeypatch, capsys, source, message):
    monkeypatch.setattr(sys, "argv", ["sensitivity", source])
    assert sensitivity.main() == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: ") and error.count("\n") == 1 and (message in error or "no detector folder" in error)
    )
