import json
import os
import platform
import re

import pytest
import yaml

from distill import run_folder
from distill.errors import UserError
from distill.run_folder import TEACHER_RUN, RunFolder

CONFIG = {"student": {"name": "dense", "image_size": [240, 320]}, "epochs": 40, "lr": 1e-05, "note": "50 % naïve [x]"}


def make_run(path, checkpoint=False, finished=False):
    run = RunFolder.create(path, CONFIG, overwrite=False)
    if checkpoint:
        (run.checkpoints / "epoch_0003.pt").write_text("weights")
    if finished:
        run.write_summary({"AP": 0.5})
    return run


def contents(folder):
    """Every file below a folder but its lock, with its text."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def refused(expected, make, *arguments, **keywords):
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        make(*arguments, **keywords)


def test_create_makes_the_layout(tmp_path):
    run = RunFolder.create(tmp_path / "runs" / "x", CONFIG, overwrite=False)
    assert contents(run.path) == {
        "config.yaml": "# the resolved config of a distill run\n"
        "student:\n  name: dense\n  image_size:\n  - 240\n  - 320\nepochs: 40\nlr: 1.0e-05\nnote: 50 % naïve [x]\n"
    }
    assert run.checkpoints.is_dir()
    assert run.config == CONFIG
    assert list(run.config) == ["student", "epochs", "lr", "note"]
    assert not run.is_finished and run.summary is None
    paths = (run.config_file, run.results_file, run.summary_file, run.log_file, run.checkpoints, run.student,
             run.teacher(), run.pictures, run.report_file, run.card_file, run.tracking)  # fmt: skip
    assert [p.relative_to(tmp_path / "runs" / "x").as_posix() for p in paths] == [
        "config.yaml", "results.csv", "summary.json", "train.log", "checkpoints", "student", "teacher",
        "pictures", "report.html", "README.md", "tracking",
    ]  # fmt: skip


def test_naming_a_folder_creates_nothing(tmp_path):
    RunFolder(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_create_takes_an_empty_folder_and_ignores_hidden_files(tmp_path):
    (tmp_path / ".gitkeep").write_text("")
    assert make_run(tmp_path).config == CONFIG
    assert (tmp_path / ".gitkeep").exists()


def test_create_takes_a_run_that_stopped_before_it_had_anything(tmp_path):
    run = make_run(tmp_path / "x")
    run.log_file.write_text("out of memory")
    RunFolder.create(run.path, {"epochs": 1}, overwrite=False)
    assert run.config == {"epochs": 1}
    assert not run.log_file.exists()


def test_create_refuses_a_finished_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make_run("runs/x", checkpoint=True, finished=True)
    os.utime(run.summary_file, (1_700_000_000, 1_700_000_000))
    before = contents(tmp_path)
    with pytest.raises(UserError) as caught:
        RunFolder.create("runs/x", {"epochs": 1}, overwrite=False)
    assert re.fullmatch(
        r"output_dir: runs/x already holds a finished run \(2023-11-1[45] \d\d:\d\d\); "
        r"choose another output_dir, or say overwrite=true",
        str(caught.value),
    )
    assert contents(tmp_path) == before


def test_create_refuses_an_unfinished_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run("runs/x", checkpoint=True)
    before = contents(tmp_path)
    refused(
        "output_dir: runs/x holds an unfinished run; go on with it by --resume runs/x, choose another output_dir, "
        "or say overwrite=true",
        RunFolder.create, "runs/x", {"epochs": 1}, overwrite=False,
    )  # fmt: skip
    assert contents(tmp_path) == before


@pytest.mark.parametrize("work", ["results.csv", "teacher/x", "student/x", "teacher_run/x"])
def test_create_refuses_a_run_with_work_in_it_but_no_checkpoint(tmp_path, monkeypatch, work):
    monkeypatch.chdir(tmp_path)
    run = make_run("x")
    (run.path / work).parent.mkdir(exist_ok=True)
    (run.path / work).write_text("work")
    refused(
        "output_dir: x holds a run that has no checkpoint to resume from; choose another output_dir, "
        "or say overwrite=true",
        RunFolder.create, "x", CONFIG, overwrite=False,
    )  # fmt: skip
    assert (run.path / work).read_text() == "work"


@pytest.mark.parametrize("overwrite", [False, True])
def test_create_never_touches_a_folder_of_something_else(tmp_path, monkeypatch, overwrite):
    monkeypatch.chdir(tmp_path)
    # as Lightning leaves it: the same names, not our run
    (tmp_path / "x" / "checkpoints").mkdir(parents=True)
    (tmp_path / "x" / "checkpoints" / "epoch_1.pt").write_text("theirs")
    for name in ("config.yaml", "summary.json", "notes.txt"):
        (tmp_path / "x" / name).write_text("model: theirs")
    before = contents(tmp_path)
    refused(
        "output_dir: x holds no run but other files (checkpoints, config.yaml, notes.txt, ...); "
        "choose another output_dir",
        RunFolder.create, "x", CONFIG, overwrite=overwrite,
    )  # fmt: skip
    assert contents(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_create_refuses_a_file(tmp_path, monkeypatch, overwrite):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").write_text("mine")
    refused("output_dir: x is a file; choose another output_dir", RunFolder.create, "x", CONFIG, overwrite=overwrite)
    refused(
        "output_dir: cannot write to x/y (Not a directory); choose another one",
        RunFolder.create, "x/y", CONFIG, overwrite=overwrite,
    )  # fmt: skip
    assert (tmp_path / "x").read_text() == "mine"


def test_overwrite_removes_what_a_run_owns_and_nothing_else(tmp_path):
    run = make_run(tmp_path / "x", checkpoint=True, finished=True)
    run.append_result({"epoch": 1})
    run.log_file.write_text("old")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "model.safetensors").write_text("linked")
    run.student.symlink_to(elsewhere)
    run.teacher().symlink_to(tmp_path / "gone")
    make_run(run.path / TEACHER_RUN, checkpoint=True)
    (run.path / "notes.txt").write_text("mine")
    (run.path / "tensorboard").mkdir()
    (run.path / "tensorboard" / "events").write_text("mine")

    RunFolder.create(run.path, {"epochs": 1}, overwrite=True)
    left = {p.name for p in run.path.iterdir() if p.name != ".lock"}
    assert left == {"config.yaml", "checkpoints", "notes.txt", "tensorboard"}
    assert list(run.checkpoints.iterdir()) == []
    assert run.config == {"epochs": 1}
    assert contents(run.path / "tensorboard") == {"events": "mine"}
    assert contents(elsewhere) == {"model.safetensors": "linked"}


def test_overwrite_leaves_what_it_is_told_to_keep(tmp_path):
    run = make_run(tmp_path / "x", checkpoint=True)
    for folder in (run.teacher(), run.student):
        folder.mkdir()
        (folder / "model.safetensors").write_text("weights")
    training = make_run(run.path / TEACHER_RUN, checkpoint=True)
    RunFolder.create(run.path, CONFIG, overwrite=True, keep=["teacher", TEACHER_RUN])
    assert contents(run.teacher()) == {"model.safetensors": "weights"}
    assert (training.checkpoints / "epoch_0003.pt").exists()
    assert not run.student.exists()


def test_a_kept_teacher_alone_does_not_stand_in_the_way(tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "model.safetensors").write_text("weights")
    with pytest.raises(UserError, match="holds no run but other files"):
        RunFolder.create(tmp_path, CONFIG, overwrite=True)
    run = RunFolder.create(tmp_path, CONFIG, overwrite=False, keep=["teacher"])
    assert contents(run.teacher()) == {"model.safetensors": "weights"}
    RunFolder.create(tmp_path, CONFIG, overwrite=False, keep=["teacher"])  # nothing else has come of that run


def test_config_that_yaml_does_not_know_changes_nothing(tmp_path):
    run = make_run(tmp_path / "x", checkpoint=True)
    before = contents(tmp_path)
    with pytest.raises(yaml.YAMLError):
        RunFolder.create(run.path, {"output_dir": object()}, overwrite=True)
    with pytest.raises(yaml.YAMLError):
        RunFolder.create(tmp_path / "new", {"output_dir": object()}, overwrite=True)
    assert contents(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_open_gives_an_unfinished_run(tmp_path):
    make_run(tmp_path / "x", checkpoint=True)
    assert RunFolder.open(tmp_path / "x").config == CONFIG


def test_open_refuses_what_is_no_unfinished_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    way_out = "give the folder of an unfinished run"
    refused(f"resume: x does not exist; {way_out}", RunFolder.open, "x")

    (tmp_path / "file").write_text("")
    refused(f"resume: file is a file; {way_out}", RunFolder.open, "file")

    (tmp_path / "x" / "checkpoints").mkdir(parents=True)
    (tmp_path / "x" / "checkpoints" / "epoch_0001.pt").write_text("weights")
    refused(f"resume: x holds no run: no config.yaml; {way_out}", RunFolder.open, "x")

    run = make_run("y")
    (run.checkpoints / "epoch_0001.partial").write_text("half")
    refused("resume: y has no checkpoint yet, it stopped in its first epoch; start it anew", RunFolder.open, "y")

    make_run("z", checkpoint=True, finished=True)
    with pytest.raises(UserError, match=r"^resume: z is finished \(.{16}\); its student is in z/student$"):
        RunFolder.open("z")


@pytest.mark.parametrize("inner", ["teacher_run", "teacher_runs/big"])
def test_a_teachers_run_is_gone_on_with_from_outside(tmp_path, inner):
    assert RunFolder(tmp_path / "run" / inner).outermost == tmp_path / "run" / inner  # a folder of that name, no more
    run = RunFolder.create(tmp_path / "run", CONFIG, overwrite=False)
    assert RunFolder(run.path / inner).outermost == run.outermost == run.path


@pytest.mark.parametrize(
    "text, reason", [("a: [1", "is no valid YAML"), ("", "holds no settings"), ("- a", "holds no settings")]
)
def test_config_edited_to_nonsense(tmp_path, text, reason):
    run = make_run(tmp_path)
    run.config_file.write_text(text)
    with pytest.raises(UserError, match=rf"config\.yaml: {reason}") as caught:
        _ = run.config
    assert "\n" not in str(caught.value)


def test_results_take_new_columns_for_all_rows(tmp_path):
    run = make_run(tmp_path)
    assert run.read_results() == []
    run.append_result({"epoch": 1, "task": 0.1 + 0.2, "note": "a, b"})
    run.append_result({"epoch": 2, "AP": float("nan"), "task": None, "soft_label": -3})
    assert run.results_file.read_text() == (
        'epoch,task,note,AP,soft_label\n1,0.30000000000000004,"a, b",,\n2,,,nan,-3\n'
    )
    first, second = run.read_results()
    assert first == {"epoch": 1, "task": 0.1 + 0.2, "note": "a, b", "AP": None, "soft_label": None}
    assert type(first["epoch"]) is int
    assert type(second["soft_label"]) is int and second["soft_label"] == -3
    assert second["AP"] != second["AP"]  # NaN


def test_resume_does_not_double_epochs(tmp_path):
    run = make_run(tmp_path)
    for epoch in range(1, 12):
        run.append_result({"epoch": epoch, "AP": epoch / 10})
    run.truncate_results(before_epoch=10)
    run.append_result({"epoch": 10, "AP": 0.9})
    assert [row["epoch"] for row in run.read_results()] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert run.read_results()[-1] == {"epoch": 10, "AP": 0.9}


def test_truncating_all_or_no_results(tmp_path):
    run = make_run(tmp_path)
    run.truncate_results(before_epoch=1)
    run.append_result({"epoch": 1})
    run.truncate_results(before_epoch=2)
    assert run.read_results() == [{"epoch": 1}]
    run.truncate_results(before_epoch=1)
    assert run.read_results() == []
    assert not run.results_file.exists()
    run.append_result({"epoch": 1, "AP": 0.5})
    assert run.read_results() == [{"epoch": 1, "AP": 0.5}]


def test_summary_is_strict_json(tmp_path):
    run = make_run(tmp_path)
    run.write_summary({"AP": float("nan"), "rows": [(1, float("inf"))], "teacher": {"AP": -float("inf"), "n": None}})
    assert json.loads(run.summary_file.read_text(), parse_constant=pytest.fail) == {
        "AP": None, "rows": [[1, None]], "teacher": {"AP": None, "n": None},
    }  # fmt: skip
    assert run.summary == {"AP": None, "rows": [[1, None]], "teacher": {"AP": None, "n": None}}
    assert run.is_finished


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch, broken):
    run = make_run(tmp_path / "x", finished=True)
    run.append_result({"epoch": 1})
    before = contents(tmp_path)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.os, broken, fail)
    for write, argument in (
        (run.append_result, {"epoch": 2}),
        (run.write_summary, {"AP": 0.9}),
        (run.save_config, {"epochs": 1}),
    ):
        with pytest.raises(OSError, match="No space left"):
            write(argument)
    refused(
        f"output_dir: cannot write to {tmp_path / 'new'} (No space left on device); choose another one",
        RunFolder.create, tmp_path / "new", CONFIG, overwrite=False,
    )  # fmt: skip
    assert contents(tmp_path) == before  # and no file that was written aside is left


def test_files_are_replaced_not_rewritten(tmp_path):
    run = make_run(tmp_path)
    run.append_result({"epoch": 1})
    with run.results_file.open() as reader:  # someone watches the results
        run.append_result({"epoch": 2})
        assert reader.read() == "epoch\n1\n"


def test_overwriting_that_fails_midway_leaves_a_folder_that_can_be_overwritten(tmp_path, monkeypatch):
    run = make_run(tmp_path / "x", checkpoint=True, finished=True)

    def fail(_):
        raise OSError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.shutil, "rmtree", fail)
        with pytest.raises(UserError, match="Permission denied"):
            RunFolder.create(run.path, {"epochs": 1}, overwrite=True)
    assert run.config == CONFIG
    assert not run.is_finished
    assert RunFolder.create(run.path, {"epochs": 1}, overwrite=True).config == {"epochs": 1}


def test_a_folder_is_for_one_run_at_a_time(tmp_path, on_processes):
    run = RunFolder.create(tmp_path / "x", CONFIG, overwrite=False)
    run.take()  # once more by the same process does not matter
    before = contents(run.path)
    found = f"output_dir: {run.path} is in use by another run (process {os.getpid()} on {platform.node()})"

    def start_another():
        run_folder._HELD.clear()  # what a fork believes to have, it has not
        with pytest.raises(UserError, match=re.escape(found)):
            RunFolder.create(run.path, {"other": 1}, overwrite=True)

    (ended,) = on_processes(1, start_another)
    assert ended.status == 0, ended.said
    assert contents(run.path) == before


def test_a_table_that_is_none_names_its_file(tmp_path):
    run = RunFolder.create(tmp_path / "x", CONFIG, overwrite=False)
    run.results_file.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=re.escape(f"{run.results_file}: is not the table")):
        run.truncate_results(before_epoch=1)
