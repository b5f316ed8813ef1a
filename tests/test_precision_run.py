"""`precision: auto` in a whole run: it says what it took, and a resumed run takes the same without trying."""

import json
import sys

import pytest
import yaml

import students
import train


@pytest.fixture
def run(settings, build_tiny, monkeypatch, tmp_path, capsys):
    """`train.py` on a short run where everything is chosen, or with other arguments."""
    students.save(build_tiny(class_names=["disc", "ring", "triangle"], channels=24), tmp_path / "teacher")
    settings["teacher"] = {"path": str(tmp_path / "teacher"), "precision": "auto"}
    settings |= {"pruning": None, "train": {"epochs": 1, "precision": "auto"}}
    monkeypatch.setattr("distill.pictures.album.Album.update", lambda *arguments, **more: None)

    def run(*arguments):
        (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings))
        monkeypatch.setattr(sys, "argv", ["train.py", *(arguments or [str(tmp_path / "a.yaml")])])
        status = train.main()
        return status, capsys.readouterr()

    return run


def test_a_run_says_what_it_took_and_goes_on_with_it(run, tmp_path, monkeypatch):
    status, said = run(str(tmp_path / "a.yaml"), "--dry-run")
    assert status == 0 and "teacher.precision: auto takes " in " ".join(said.out.split())
    assert not (tmp_path / "run").exists()
    status, said = run()
    assert status == 0, said.err
    taken = json.loads((tmp_path / "run" / "precision.json").read_text())
    assert set(taken) == {"teacher.precision", "train.precision"}

    def never(*arguments):
        raise AssertionError("it was tried again")

    for name in ("faculty.try_teacher", "precision.try_student"):
        monkeypatch.setattr(f"distill.{name}", never)
    (tmp_path / "run" / "summary.json").unlink()  # it is not finished then
    status, said = run("--resume", str(tmp_path / "run"), "train.epochs=2")
    assert status == 0, said.err
    assert json.loads((tmp_path / "run" / "precision.json").read_text()) == taken


def test_two_that_choose_are_one_too_many(run, monkeypatch):
    monkeypatch.setattr(train.Accelerator, "mixed_precision", "bf16")
    status, said = run()
    assert status == 2
    assert "train.precision: auto chooses by itself, but Accelerate's settings say bf16" in said.err
