"""A cut that a student does not get over is taken back and halved, and the best student is what is saved."""

import csv
import json
import sys
from dataclasses import replace

import pytest
import yaml

import students
import train
from distill import evaluation
from distill.measure import count_nonzero, count_parameters
from distill.pruning.guard import CutGuard


@pytest.fixture
def start(settings, tmp_path, monkeypatch):
    """`python train.py` on a config whose output goes to the folder of that name: what it said."""

    def start(name, capsys, *arguments):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings | {"output_dir": str(tmp_path / name)}))
        monkeypatch.setattr(sys, "argv", ["train.py", *(arguments or [str(path)])])
        assert train.main() == 0
        captured = capsys.readouterr()
        return captured.out + captured.err

    return start


@pytest.fixture(autouse=True)
def quick(settings, build_tiny, scenes, tmp_path):
    """One cut before the second of four epochs, judged an epoch later."""
    settings |= {"teacher": None, "losses": {}, "balance": "none", "train": {"epochs": 4}}
    guard = {"loss": 1e6, "recovery": 1}
    settings["pruning"] = {"target": 0.6, "epochs": [1], "importance": "group_l1", "round_to": 4, "guard": guard}


def rows(run):
    with (run / "results.csv").open() as file:
        return [{key: cell for key, cell in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def refuse_large_steps(monkeypatch):
    """Whatever takes all of what is due fails, once."""
    judges, objection, seen = CutGuard.judges, CutGuard.objection, []

    def note(guard, done, cut_epoch):
        due = judges(guard, done, cut_epoch)
        if due:
            seen.append(cut_epoch)
        return due

    monkeypatch.setattr(CutGuard, "judges", note)
    monkeypatch.setattr(
        CutGuard,
        "objection",
        lambda guard, ap, loss: "too much" if seen.count(seen[0]) == 1 else objection(guard, ap, loss),
    )


def test_a_cut_that_fails_is_halved_and_the_rest_tried_again(start, settings, tmp_path, monkeypatch, capsys):
    refuse_large_steps(monkeypatch)
    said = start("run", capsys)
    assert (
        "guard: after epoch 2, too much; back to before the cut at epoch 2, 0.5 of what was due goes there now" in said
    )
    assert "resumed: 1 of 4 epochs are done" in said
    left = [float(row["macs_left"]) for row in rows(tmp_path / "run")]
    assert [row["epoch"] for row in rows(tmp_path / "run")] == ["1", "2", "3", "4"]
    assert left[0] == 1 and 0.7 < left[1] <= 0.8 and 0.55 < left[2] <= 0.6 and left[3] == left[2]

    content = json.loads((tmp_path / "run" / "pruning.json").read_text())
    assert [cut["epoch"] for cut in content["cuts"]] == [1, 2]
    (retreat,) = content["retreats"]
    assert (retreat["epoch"], retreat["until"], retreat["objection"]) == (1, 2, "too much")
    assert 0.55 < retreat["left"] <= 0.6
    lost = {name: n for cut in content["cuts"] for group in cut["groups"] for name, n in
            zip(group["layers"], [group["after"]] * len(group["layers"]))}  # fmt: skip
    student = students.load(tmp_path / "run" / "student")
    assert lost and all(student.get_submodule(name).weight.shape[0] == n for name, n in lost.items())


def test_blocks_and_masks_of_a_cut_go_back_with_it(start, settings, tmp_path, monkeypatch, capsys):
    settings["pruning"] |= {"blocks": {"count": 1, "epochs": [1]}, "masks": {"sparsity": 0.5, "epochs": [1]}}
    settings["train"]["epochs"] = 3
    refuse_large_steps(monkeypatch)
    said = start("run", capsys)
    assert "without backbone.body.layer1.0" in said and said.count("masks before epoch 2: ") == 2
    content = json.loads((tmp_path / "run" / "pruning.json").read_text())
    # half of one block is none; it goes when the rest is tried
    none, (block,) = (cut["blocks"] for cut in content["cuts"])
    assert none == [] and block["name"] == "backbone.body.layer1.0" and block["macs_saved"] > 0
    found = rows(tmp_path / "run")
    assert [float(row["nonzero"] or 1) < 0.6 for row in found] == [False, True, True]
    student = students.load(tmp_path / "run" / "student")
    assert [len(plan.blocks) for plan in student.plans] == [0, 1]
    assert count_nonzero(student) / count_parameters(student) < 0.6
    assert float(found[2]["macs_left"]) <= 0.6


def test_soft_pruning_is_judged_when_it_cuts(start, settings, tmp_path, monkeypatch, capsys):
    settings["pruning"] |= {"epochs": [1, 2], "method": "soft", "schedule": "linear"}
    refuse_large_steps(monkeypatch)
    said = start("run", capsys)
    assert said.count("before epoch 2 channels are set to 0") == 1  # the guard goes back to after it
    assert said.count("back to before the cut at epoch 3") == 1
    left = [float(row["macs_left"]) for row in rows(tmp_path / "run")]
    assert left[:2] == [1, 1] and 0.7 < left[2] <= 0.8 and 0.55 < left[3] <= 0.6


def test_what_never_holds_is_left_out_and_told(start, settings, tmp_path, monkeypatch, capsys):
    settings["pruning"]["guard"] = {"ap": 1.0, "recovery": 1}
    settings["train"]["epochs"] = 2
    monkeypatch.setattr("distill.pruning.guard.MOST", 1)
    said = start("run", capsys)
    assert said.count("back to before the cut at epoch 2") == 2
    assert "0.5 of what was due goes there now" in said and "nothing is cut there now" in said
    assert "no student came within the budget, 60.0% of the MACs, and over the guard's floor" in said
    assert [row["macs_left"] for row in rows(tmp_path / "run")] == ["1.0", "1.0"]
    assert students.load(tmp_path / "run" / "student").plans == []


def test_the_best_student_within_the_budget_is_saved(start, settings, tmp_path, monkeypatch, capsys):
    aps = iter([0.9, 0.2, 0.5, 0.3, 0.35, 0.1])  # uncut, again on test, of epochs 2 to 4, and of the last
    # the best of all was over the budget
    monkeypatch.setattr(evaluation, "run_evaluation", scored(evaluation.run_evaluation, aps))
    said = start("run", capsys)
    assert "the best student within the budget is saved, that of epoch 2" in said
    best = (tmp_path / "run/checkpoints/best/model.safetensors").read_bytes()
    assert (tmp_path / "run/student/model.safetensors").read_bytes() == best


def scored(evaluate, aps):
    return lambda *arguments: replace(evaluate(*arguments), ap=next(aps))


class Interrupted(Exception):
    """Stands for a power cut."""


def test_a_guarded_run_resumed_in_a_recovery_ends_alike(start, settings, tmp_path, monkeypatch, capsys):
    settings["pruning"]["guard"]["recovery"] = 2
    settings["train"]["epochs"] = 5
    refuse_large_steps(monkeypatch)
    start("whole", capsys)
    monkeypatch.undo()
    monkeypatch.setattr("distill.pictures.album.draw_run", lambda run: [])
    refuse_large_steps(monkeypatch)
    original, count = train.train_epoch, []

    def train_epoch(*arguments):
        count.append(1)
        if len(count) in (3, 6):  # in the recovery that fails, and in that of the half step
            raise Interrupted
        return original(*arguments)

    monkeypatch.setattr(train, "train_epoch", train_epoch)
    for arguments in ((), ("--resume", str(tmp_path / "broken"))):
        with pytest.raises(Interrupted):
            start("broken", capsys, *arguments)
    start("broken", capsys, "--resume", str(tmp_path / "broken"))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert len(json.loads((whole / "pruning.json").read_text())["retreats"]) == 1
    for file in ("student/model.safetensors", "student/plans.json", "pruning.json"):
        assert (broken / file).read_bytes() == (whole / file).read_bytes(), file
    assert rows(broken) == rows(whole)
