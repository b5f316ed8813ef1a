import math

import pytest

from distill.pictures.course import ClassCourse, Course, Cut
from distill.run_folder import RunFolder


def test_cuts_are_seen_by_the_macs(run):
    # before the third epoch and before the fourth; the second size was trained for two epochs
    assert Course.read(run).cuts == [Cut(2, 700, 0.7, 0.20, 0.30), Cut(3, 500, 0.5, 0.25, 0.45)]


def test_a_cut_before_the_first_epoch_is_seen_by_the_share_that_is_left(tmp_path):
    run = RunFolder.create(tmp_path / "run", {}, overwrite=False)
    run.append_result({"epoch": 1, "macs": 500, "macs_left": 0.5, "ap": 0.1})
    assert Course.read(run).cuts == [Cut(0, 500, 0.5, None, 0.1)]


def test_results_without_the_share_go_by_the_summary_or_the_first_row(tmp_path):
    run = RunFolder.create(tmp_path / "run", {}, overwrite=False)
    for epoch, macs in ((1, 800), (2, 400)):
        run.append_result({"epoch": epoch, "macs": macs, "ap": 0.1})
    assert Course.read(run).macs_left == [1.0, 0.5]
    run.write_summary({"student_before": {"macs": 1600}, "split": "val"})
    assert Course.read(run).macs_left == [0.5, 0.25]
    assert [cut.done for cut in Course.read(run).cuts] == [0, 1]


def test_columns_that_are_no_scores_are_losses(run):
    losses = Course.read(run).losses
    assert losses == {"task": [3.0, 2.0, 2.5, 2.2, 2.0], "soft_label": [1.0, 0.8, 0.9, 0.7, 0.6]}


def test_each_class_before_the_cuts_after_them_and_now(run):
    classes = Course.read(run).classes
    assert classes == [ClassCourse("cat", 0.5, 0.4, 0.6), ClassCourse("dog", 0.3, 0.2, 0.3)]
    assert [c.lost for c in classes] == pytest.approx([0.1, 0.1])
    assert ClassCourse("rare", None, None, 0.2).lost == 0


def test_sizes_that_the_student_went_through(run):
    assert Course.read(run).sizes == [
        ("before cutting", 1000, 0.40),
        ("cut 1", 700, 0.30),
        ("student", 500, 0.45),
    ]


def test_what_is_left(run, finished):
    course = Course.read(run)
    assert course.macs_left == [1.0, 1.0, 0.7, 0.5, 0.5]
    # of the 1000 // 3 parameters that the summary knows of
    assert course.params_left == pytest.approx([400 / 333, 400 / 333, 250 / 333, 150 / 333, 150 / 333])


def test_the_teachers_ap_is_that_of_the_same_split(run):
    assert Course.read(run).teacher_ap == 0.5
    older = RunFolder.create(run.path.parent / "older", {"data": {"val": "val"}}, overwrite=False)
    older.append_result({"epoch": 1, "ap": 0.1, "macs": 100})
    assert Course.read(older).teacher_ap is None
    for split, found in (("test", None), ("val", 0.6)):
        older.write_summary({"teacher": {"ap": 0.6}, "split": split})
        assert Course.read(older).teacher_ap == found


def test_a_run_that_has_not_begun(tmp_path):
    course = Course.read(RunFolder.create(tmp_path / "run", {"train": {"epochs": 4}}, overwrite=False))
    assert (course.rows, course.losses, course.cuts, course.classes, course.sizes) == ([], {}, [], [], [])
    assert course.total_epochs == 4 and course.teacher_ap is None


def test_empty_cells_are_nan(run):
    right_after = Course.read(run).column("ap_after_cut")
    assert right_after[2:4] == [0.2, 0.25]
    assert all(map(math.isnan, right_after[:2] + right_after[4:]))
