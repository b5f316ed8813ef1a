"""A cut that fails half way leaves a run that says so in one line and goes on as if nothing had happened."""

import sys

import pytest
import yaml

import students.plan
import train
from distill import surgery


@pytest.fixture
def start(settings, tmp_path, monkeypatch):
    """`python train.py` on a config whose output goes to the folder of that name."""

    def start(name, *arguments):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings | {"output_dir": str(tmp_path / name)}))
        monkeypatch.setattr(sys, "argv", ["train.py", *(arguments or [str(path)])])
        return train.main()

    return start


@pytest.fixture(autouse=True)
def quick(settings, build_tiny, scenes):
    """One cut before the second of two epochs."""
    settings |= {"teacher": None, "losses": {}, "balance": "none", "train": {"epochs": 2}}
    settings["pruning"] = {"target": 0.6, "epochs": [1], "importance": "group_l1", "round_to": 4}


def fail_while_measuring_again(patch):
    def fail(detector, batches):
        raise RuntimeError("DefaultCPUAllocator: no room\nfor anything")

    patch.setattr(surgery, "recalibrate_batch_norms", fail)
    return "DefaultCPUAllocator: no room"


def fail_while_slicing(patch):
    change, cut_everywhere, changes = students.plan._set, surgery.cut_everywhere, []

    def fail(owner, key, value):
        changes.append(key)
        if len(changes) == 20:
            raise MemoryError("no room")
        change(owner, key, value)

    def cut(*arguments):
        patch.setattr(students.plan, "_set", fail)
        cut_everywhere(*arguments)

    patch.setattr(surgery, "cut_everywhere", cut)
    return "plan: cutting student."


@pytest.mark.parametrize("break_it", [fail_while_measuring_again, fail_while_slicing])
def test_nothing_is_lost_where_a_cut_fails(start, break_it, tmp_path, monkeypatch, capsys):
    assert start("whole") == 0
    with monkeypatch.context() as patch:
        reason = break_it(patch)
        capsys.readouterr()
        assert start("broken") == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert said[0].startswith(f"error: pruning: the cut before epoch 2 failed and nothing was cut ({reason}")
    assert f"--resume {tmp_path / 'broken'}" in said[0] and "batch_size" not in said[0]
    assert start("broken", "--resume", str(tmp_path / "broken")) == 0
    for file in ("model.safetensors", "plans.json"):
        ours, theirs = (tmp_path / name / "student" / file for name in ("broken", "whole"))
        assert ours.read_bytes() == theirs.read_bytes(), file
