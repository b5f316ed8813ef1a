"""Pictures in a run folder, and the page: while it goes on, at the end, and again from the files alone."""

import re
import sys

import pytest
import torch
from accelerate import Accelerator

import students
from distill.factory import build_data
from distill.pictures import PICTURES, Album, album, draw_run, folder, sheets
from distill.pictures.__main__ import main
from distill.pictures.course import Course
from distill.pictures.page import describe_state, numbers
from distill.pictures.scenes import read_scenes
from distill.report import Report
from distill.schema import DataConfig
from students.artifact import cut
from students.plan import Cut, Plan


@pytest.fixture
def data(scenes):
    return build_data(DataConfig(root=str(scenes), image_size=64, batch_size=4, workers=0))


@pytest.fixture
def make_album(finished, data, build_tiny):
    def make() -> Album:
        teacher = build_tiny(seed=1, class_names=data.class_names).eval()
        album = Album(finished, data, Accelerator(), Report())
        album.show("teacher", teacher)
        return album

    return make


@pytest.fixture
def student(build_tiny, data):
    return build_tiny(class_names=data.class_names)


def drawn(run):
    return {file.stem for file in run.pictures.glob("*.png")}


def test_a_run_has_all_pictures_and_a_page_that_needs_nothing_else(make_album, student, finished, capsys):
    watching = make_album()
    assert drawn(finished) == {"batch"}  # the first batch, once, before anything is trained
    tower = [
        (name, 0) for name in student.state_dict() if re.match(r"head.class_tower.0.*(weight|bias|mean|var)", name)
    ]
    cut(student, Plan((Cut(16, tuple(range(8)), (*tower, ("head.class_logits.weight", 1))),)))
    watching.update(student, last=True)
    assert "warning" not in capsys.readouterr().out
    assert drawn(finished) == {picture.name for picture in PICTURES}

    page = finished.report_file.read_text()
    for picture in PICTURES:
        assert f'id="{picture.name}"><img src="data:image/png;base64,' in page
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        "Accuracy",
        "Cost",
        "Training",
        "What they see",
        "Groups of channels",
        "Cuts taken back",
    ]
    assert not re.findall(r"(?:https?:)?//|@import|<script|<link(?! rel=\"icon\" href=\"data:)", without_data(page))
    assert "<td>teacher</td><td>0.600</td>" in page and "<dd>data/pets, 320x240 px</dd>" in page
    assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page


def test_every_group_and_what_stays_whole_is_on_the_page(run):
    draw_run(run)
    page = run.report_file.read_text()
    cells = "<td>stem, add</td><td>32</td><td>8</td><td>25%</td><td>500</td><td>3.00e+00</td><td>1.00e+00</td>"
    assert cells in page and "<td>tower</td><td>16</td><td>16</td><td>100%</td><td>-</td><td>-</td><td>-</td>" in page
    assert "<td>shuffle</td><td>chunk is not followed, in &lt;shuffle&gt;</td>" in page
    assert "<td>before epoch 4</td><td>40%</td><td>5</td><td>AP 0.010 is under the floor of 0.2</td>" in page


def without_data(page):
    return re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]*", "", page)


def test_what_a_user_named_cannot_break_the_page(run):
    run.save_config(run.config | {"data": {"root": "<script>alert(1)</script>", "val": "val"}})
    assert draw_run(run) == []
    assert "<script" not in run.report_file.read_text()


def test_while_a_run_goes_on_its_page_says_so(run):
    course = Course.read(run)
    assert describe_state(course) == "in training: 5 of 6 epochs; measured on val"
    columns, rows = numbers(course)
    assert rows == [["teacher", "0.500", None, None, None], ["student, epoch 5", "0.450", "-", "-", "500"]]
    assert len(columns) == 5
    assert draw_run(run) == [] and "precision" not in drawn(run)
    assert describe_state(Course(course.config, course.rows, {"split": "test"})).startswith("finished: 5 of 6 epochs")


def test_a_picture_that_has_nothing_to_show_any_more_goes(run):
    run.pictures.mkdir()
    (run.pictures / "precision.png").write_bytes(b"of an earlier run")
    draw_run(run)
    assert "precision" not in drawn(run)


def test_no_run_fails_for_a_picture(make_album, student, finished, monkeypatch, capsys):
    watching = make_album()

    def broken(*arguments):
        raise RuntimeError("no ink\nand no paper")

    monkeypatch.setattr(folder.charts, "draw_ap", broken)
    watching.update(student, last=True)
    watching.update(student, last=True)
    said = capsys.readouterr().out
    assert said == "warning: pictures: ap: RuntimeError: no ink; training goes on without\n"  # once
    assert "losses" in drawn(finished) and "ap" not in drawn(finished)

    for target in ("draw_run", "look"):
        monkeypatch.setattr(album, target, broken)
        watching.update(student, last=True)
    monkeypatch.setattr(album, "choose_samples", broken)
    make_album().update(student, last=True)
    assert "warning: pictures: RuntimeError: no ink; training goes on without" in capsys.readouterr().out


def test_pictures_take_a_twentieth_of_the_time_at_most(make_album, student, monkeypatch):
    clock, times = [1000.0], []

    def draw(run):
        times.append(clock[0])
        clock[0] += 2.0
        return []

    monkeypatch.setattr(album.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(album, "draw_run", draw)
    watching = make_album()
    for _ in range(12):
        clock[0] += 10.0
        watching.update(student)
    # 3 seconds are expected at first, so the first page comes after a minute, the next 40 seconds after it was drawn
    assert times == [1060.0, 1102.0]
    watching.update(student, last=True)
    assert len(times) == 3


def test_what_the_student_looked_at_first_outlives_an_interruption(make_album, student, finished, monkeypatch):
    monkeypatch.setattr(album, "draw_run", lambda run: [])
    make_album().begin(student, resumes=False)
    (first, *_), _ = read_scenes(finished.pictures / "scenes.npz")
    torch.nn.init.normal_(student.backbone.body.conv1[0].weight)  # it is trained, and goes on
    watching = make_album()
    watching.begin(student, resumes=True)
    watching.update(student, last=True)
    (scene, *_), class_names = read_scenes(finished.pictures / "scenes.npz")
    stays, now = (scene.looks[name].attention[8] for name in ("student at first", "student"))
    assert (stays == first.looks["student at first"].attention[8]).all() and (stays != now).any()
    # the teacher, the student at first and now: in rows where they look, and its first boxes are nowhere
    sheet = sheets.draw_attention([scene])
    shown = [text.get_text() for axes in sheet.axes for text in axes.texts]
    assert shown == ["teacher", "student at first", "student"]
    titles = [axes.get_title() for axes in sheets.draw_mosaic([scene], class_names).axes]
    assert titles == ["truth", "teacher", "student"]


def test_the_detectors_are_left_as_they_were(make_album, student, monkeypatch):
    monkeypatch.setattr(album, "draw_run", lambda run: [])
    watching = make_album()
    student.train()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    watching.update(student, last=True)
    assert student.training
    assert all((tensor == before[name]).all() for name, tensor in student.state_dict().items())


@pytest.fixture
def redraw(monkeypatch, capsys):
    def redraw(*arguments):
        monkeypatch.setattr(sys, "argv", ["pictures", *map(str, arguments)])
        status = main()
        return status, *capsys.readouterr()

    return redraw


def test_redrawn_from_its_files_alone(make_album, student, finished, redraw):
    make_album().update(student, last=True)
    before = {file.name: file.read_bytes() for file in finished.pictures.iterdir()}
    for file in finished.pictures.glob("*.png"):
        if file.stem != "batch":
            file.unlink()
    finished.report_file.unlink()
    status, out, err = redraw(finished.path)
    assert status == 0 and err == "" and str(finished.report_file) in out
    assert {file.name: file.read_bytes() for file in finished.pictures.iterdir()} == before


def test_a_run_that_was_never_looked_at_is_looked_at(finished, settings, student, build_tiny, data, redraw):
    students.save(student, finished.student)
    students.save(build_tiny(seed=1, class_names=data.class_names), finished.teacher())
    finished.save_config(settings)
    status, _, err = redraw(finished.path)
    assert status == 0 and err == ""
    assert {"mosaic", "attention"} <= drawn(finished)


def test_where_its_data_is_gone_the_rest_is_drawn(finished, settings, student, redraw, tmp_path):
    students.save(student, finished.student)
    settings["data"]["root"] = str(tmp_path / "gone")
    finished.save_config(settings)
    status, _, err = redraw(finished.path)
    assert status == 0 and err.startswith("warning: what its detectors see cannot be shown (UserError: data.root: ")
    assert "ap" in drawn(finished) and "mosaic" not in drawn(finished)


def test_a_folder_that_is_no_run(tmp_path, redraw):
    status, _, err = redraw(tmp_path)
    assert status == 2 and err.startswith("error: ") and "holds no run: no config.yaml" in err


def test_a_setting_of_another_version_is_named(finished, redraw):
    finished.save_config(finished.config | {"pruning": {"per_macs": True}})
    status, _, said = redraw(finished.path)
    assert status == 2 and "config.yaml: per_macs is no setting of this version (Extra inputs" in said.splitlines()[-1]
