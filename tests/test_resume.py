"""A run that was interrupted and resumed ends like one that was not, to the bit."""

import csv
import json
import re
import sys

import pytest
import torch
import yaml

import students
import train


class Interrupted(Exception):
    """Stands for a power cut: nothing catches it."""


@pytest.fixture
def interrupt(monkeypatch):
    """Breaks the run off after an epoch's training and before its evaluation, epochs counted from 1."""

    def at(epoch, while_distilling):
        original, done = train.train_epoch, []

        def train_epoch(run, *arguments):
            losses = original(run, *arguments)
            if bool(run.teachers) == while_distilling:
                done.append(losses)
                if len(done) == epoch:
                    monkeypatch.setattr(train, "train_epoch", original)
                    raise Interrupted
            return losses

        monkeypatch.setattr(train, "train_epoch", train_epoch)

    return at


@pytest.fixture
def start(settings, tmp_path, monkeypatch):
    """`python train.py`, in this process, on a config whose output goes to the folder of that name."""

    def start(name, *arguments):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings | {"output_dir": str(tmp_path / name)}))
        monkeypatch.setattr(sys, "argv", ["train.py", *(arguments or [str(path)])])
        return train.main()

    return start


def results(run):
    with (run / "results.csv").open() as file:
        return [{key: cell for key, cell in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def summary(run):
    """The last table's numbers, without what is measured in milliseconds."""
    entries = json.loads((run / "summary.json").read_text())
    for entry in (*entries.values(), *entries["cuts"]):
        if isinstance(entry, dict):
            del entry["latency_ms"]
    return entries


def test_a_loss_that_dominates_stops_the_run_or_stays_left_out(start, interrupt, settings, tmp_path, capsys):
    # balanced, its share is its weight; a warm-up of 6 epochs comes to a half of it in a run of 3
    settings["losses"]["loud"] = {"name": "plain_mimic", "weight": 1000.0, "schedule": {"warmup_epochs": 6}}
    settings |= {"pruning": None, "train": {"epochs": 3}, "guards": {"every": 2, "dominating_term": "stop"}}
    said = "losses.loud: its gradient is 500 times the task's, more than guards.dominates, 100; "
    said += "lower its weight below 2e+02"
    assert start("refused") == 2
    assert "losses.loud.weight: found 1000; with balance: gradient that is how many" in capsys.readouterr().err
    assert start("stopped", str(tmp_path / "refused.yaml"), "balance=none", "losses.loud.weight=1e6") == 2
    told = r"error: losses\.loud: its gradient is \S+ times the task's, .* guards\.dominating_term=warn goes on\n"
    assert re.fullmatch(told, capsys.readouterr().err)
    settings["guards"]["dominating_term"] = "skip"
    interrupt(2, while_distilling=True)
    with pytest.raises(Interrupted):
        start("broken")
    assert start("broken", "--resume", str(tmp_path / "broken")) == 0
    captured = capsys.readouterr()
    told = [line for line in (captured.out + captured.err).splitlines() if said in line]
    assert len(told) == 2 and all(line.endswith("until the next look it is left out") for line in told)  # epochs 1, 3
    rows = results(tmp_path / "broken")
    assert [float(row["loud"]) for row in rows] == [0, 0, 0]
    assert all(float(row["soft_label"]) > 0 for row in rows)


def test_a_resumed_run_equals_an_uninterrupted_one(start, interrupt, tmp_path, capsys):
    # a trained teacher, all three losses, one cut before the interruption and one after
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start("whole") == 0
    interrupt(3, while_distilling=True)
    with pytest.raises(Interrupted):
        start("broken")
    assert [row["epoch"] for row in results(broken)] == ["1", "2"]
    assert not (broken / "summary.json").exists() and not (broken / "student").exists()
    capsys.readouterr()
    assert start("broken", "--resume", str(broken)) == 0

    said = capsys.readouterr().out
    assert "resumed: 2 of 5 epochs are done" in said and "is reused" in said
    assert len(students.load(whole / "student").plans) == 2
    for folder in ("teacher", "student"):
        for file in ("model.safetensors", "plans.json"):
            assert (broken / folder / file).read_bytes() == (whole / folder / file).read_bytes(), (folder, file)
    assert results(broken) == results(whole)
    assert len(results(whole)) == 5
    macs = [int(row["macs"]) for row in results(whole)]
    assert macs[0] > macs[1] == macs[2] > macs[3] == macs[4]
    assert summary(broken) == summary(whole)


@pytest.mark.parametrize(("head", "loss"), [("gfl", "ld"), ("retinanet", "dense_sigmoid")])
def test_other_heads_are_cut_distilled_and_resumed_alike(start, interrupt, settings, tmp_path, head, loss):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for detector in (settings["student"], settings["teacher"]["detector"]):
        detector["head"] = head
    settings["losses"] = {"first": {"name": loss}, "second": {"name": "cross_kd"}}
    settings["pruning"] |= {"start": 1, "end": 1, "target": 0.7}
    settings["train"]["epochs"] = 2
    assert start("whole") == 0
    interrupt(2, while_distilling=True)
    with pytest.raises(Interrupted):
        start("broken")
    assert start("broken", "--resume", str(broken)) == 0
    student = students.load(whole / "student")
    assert student.recipe["head"] == head and len(student.plans) == 1
    for file in ("model.safetensors", "plans.json"):
        assert (broken / "student" / file).read_bytes() == (whole / "student" / file).read_bytes(), file
    assert results(broken) == results(whole)


def test_a_selection_of_the_teachers_channels_comes_back(start, interrupt, settings, tmp_path):
    # one cut before the interruption, one after; what the loss has learnt of the channels is cut along
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings["student"] = settings["student"] | {"channels": 24}
    settings["losses"] = {"mimic": {"name": "mgd", "adapter": "select"}}
    settings["pruning"] |= {"importance": "group_l1", "ranking": "uniform", "round_to": 4, "end": 2, "every": 1}
    settings["train"]["epochs"] = 3
    assert start("whole") == 0
    settings["teacher"] = {"path": str(whole / "teacher")}
    interrupt(3, while_distilling=True)
    with pytest.raises(Interrupted):
        start("broken")
    assert start("broken", "--resume", str(broken)) == 0
    ours, theirs = (torch.load(run / "checkpoints/epoch_0003.pt", weights_only=True) for run in (broken, whole))
    kept = theirs["unit"]["terms.mimic.adapters.P3.kept"].tolist()
    assert len(ours["progress"]["plans"]) == 2 and len(kept) < 24 and kept != list(range(len(kept)))
    assert ours["unit"].keys() == theirs["unit"].keys()
    assert all(torch.equal(tensor, theirs["unit"][name]) for name, tensor in ours["unit"].items())
    for number, state in ours["optimizer"]["state"].items():
        assert all(torch.equal(value, theirs["optimizer"]["state"][number][key]) for key, value in state.items())
    assert results(broken) == results(whole)


def test_what_else_is_pruned_comes_back(start, interrupt, settings, tmp_path, capsys):
    # channels that are silent, a block and masks before the interruption; channels that go and more masks after it
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings |= {"teacher": None, "losses": {}, "balance": "none", "train": {"epochs": 4}}
    settings["pruning"] |= {"target": 0.6, "start": 0, "end": 2, "every": 1, "method": "soft", "importance": "group_l1"}
    settings["pruning"]["blocks"] = {"count": 1, "epochs": [1], "importance": "taylor"}
    settings["pruning"]["sparsity"] = {"scales": 0.01, "groups": 1e-4}
    settings["pruning"]["masks"] = {"kind": "kernels", "sparsity": 0.5, "epochs": [2, 3]}
    assert start("whole") == 0
    said = capsys.readouterr().out
    assert said.count("are set to 0") == 2 and "cut before epoch 2: " in said and "cut before epoch 3: " in said
    assert "without backbone.body.layer1.0" in said and said.count("masks before epoch") == 2
    interrupt(4, while_distilling=False)
    with pytest.raises(Interrupted):
        start("broken")
    assert start("broken", "--resume", str(broken)) == 0
    for file in ("model.safetensors", "plans.json"):
        assert (broken / "student" / file).read_bytes() == (whole / "student" / file).read_bytes(), file
    assert results(broken) == results(whole) and summary(broken) == summary(whole)

    rows, student = results(whole), students.load(whole / "student")
    # what is drawn is drawn less and less, and no longer once the channels are gone
    drawn = [float(row["sparsity"]) for row in rows]
    assert drawn[0] > drawn[1] > drawn[2] == drawn[3] == 0
    assert all(row["small_scales"] for row in rows)
    nonzero = [float(row["nonzero"]) for row in rows]
    assert nonzero[0] > 0.9 and nonzero[1] > 0.9 > nonzero[2] > nonzero[3]  # before masks some filters are silent
    # the averaged copy, which is what is kept, is 0 where the student is
    counted = sum(int(p.count_nonzero()) if p.dim() > 1 else p.numel() for p in student.parameters())
    total = sum(p.numel() for p in student.parameters())
    student_too = torch.load(whole / "checkpoints/epoch_0004.pt", weights_only=True)["unit"]
    for name, parameter in student.named_parameters():
        if parameter.dim() == 4 and parameter.shape[2] > 1 and ".class_logits." not in name:
            assert torch.equal(parameter == 0, student_too[f"student.{name}"] == 0), name
    assert summary(whole)["student"]["nonzero"] == counted < summary(whole)["student"]["params"] == total
    assert "not 0" in (whole / "README.md").read_text()


def test_a_teacher_that_was_interrupted_goes_on_and_a_finished_one_is_reused(
    start, interrupt, settings, tmp_path, capsys
):
    settings["pruning"] = None
    settings["teacher"]["train"]["epochs"] = 2
    settings["train"]["epochs"] = 1
    run = tmp_path / "run"
    trained = run / "teacher_run/student/model.safetensors"

    def said(status, *arguments):
        capsys.readouterr()
        assert start("run", *arguments) == status
        return capsys.readouterr().out

    interrupt(2, while_distilling=False)  # in the teacher's second epoch
    with pytest.raises(Interrupted):
        start("run")
    interrupt(1, while_distilling=True)  # in the student's first
    capsys.readouterr()
    with pytest.raises(Interrupted):
        start("run", "--resume", str(run))
    assert "resumed: 1 of 2 epochs are done" in capsys.readouterr().out
    written = trained.stat().st_mtime_ns

    reused = "is finished and has the same settings; it is reused"
    assert reused in said(0, "--resume", str(run))
    assert len(results(run)) == 1
    settings["overwrite"] = True
    settings["student"] = settings["student"] | {"channels": 8}  # no matter to the teacher
    assert reused in said(0)
    assert trained.stat().st_mtime_ns == written

    settings["teacher"]["train"]["epochs"] = 1
    assert "teacher: is trained first" in said(0)
    assert trained.stat().st_mtime_ns > written
