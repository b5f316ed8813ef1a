import sys

import pytest
from PIL import Image

from distill.compare import Estimate, compare_table, differences, draw_comparison, group_runs, main
from distill.pictures.style import styled
from distill.run_folder import RunFolder


@pytest.fixture
def make_run(tmp_path):
    def make(name, ap, seed=0, finished=True, teacher_ap=0.5, **settings):
        config = {"output_dir": str(tmp_path / name), "seed": seed, "data": {"root": "pets"}, "train": {"epochs": 2}}
        run = RunFolder.create(tmp_path / name, config | settings, overwrite=False)
        for epoch in (1, 2):
            run.append_result({"epoch": epoch, "ap": ap * epoch / 2, "macs": 1000, "task": 1.0})
        student = {"ap": ap, "ap50": 0.75, "ap75": None, "params": 100 + seed, "macs": 1000, "latency_ms": 2.0}
        if finished:
            run.write_summary({"teacher": {"ap": teacher_ap}, "student": student, "split": "test"})
        return run

    return make


def test_interval_is_students():
    # mean 0.5, standard deviation 0.1, of three: t at 97.5% with 2 degrees of freedom is 4.3027; 4.3027 * 0.1 / sqrt(3)
    three = Estimate.of([0.4, 0.5, 0.6])
    assert three.mean == pytest.approx(0.5) and three.margin == pytest.approx(0.24841, abs=1e-5)
    # two: t with 1 degree is 12.7062; 12.7062 * 0.1414 / sqrt(2)
    assert Estimate.of([0.4, 0.6]).margin == pytest.approx(1.27062, abs=1e-5)
    assert str(three) == "0.500 ± 0.248"


def test_of_one_seed_there_is_no_interval():
    assert Estimate.of([0.4]) == Estimate(0.4, None) and str(Estimate.of([0.4])) == "0.400"


def test_seeds_of_one_config_are_one_row(make_run):
    first = make_run("a0", 0.4)
    runs = [first, RunFolder(first.path / ".." / "a0"), make_run("b", 0.45, train={"epochs": 3}),
            make_run("a1", 0.5, seed=1), make_run("a2", 0.6, seed=2, overwrite=True, tracking=["wandb"])]  # fmt: skip
    columns, rows = compare_table(group_runs(runs))
    assert rows == [
        ["a0, a1, a2", "3", "0.500 ± 0.248", "0.750 ± 0.000", None, "100%", "101", "1.00K", "2.0 ms"],
        ["b", "1", "0.450", "0.750", None, "90%", "100", "1.00K", "2.0 ms"],
    ]
    assert len(columns) == 9


def test_a_teacher_taken_from_a_run_that_trained_it_is_the_same(make_run):
    detector = {"backbone": "resnet50"}
    first = make_run("a0", 0.4, teacher={"path": None, "detector": detector})
    second = make_run("a1", 0.5, seed=1, teacher={"path": str(first.teacher()), "detector": detector})
    other = make_run("a2", 0.5, seed=2, teacher={"path": "elsewhere", "detector": detector})
    assert [e.names for e in group_runs([first, second, other])] == [["a0", "a1"], ["a2"]]


def test_differences_by_their_paths():
    one = {"seed": 1, "pruning": {"target": 0.5, "start": 1}, "losses": {"soft": {"name": "dkd", "weight": 1.0}}}
    other = {"seed": 1, "pruning": None, "losses": {}, "data": {"size": 96}}
    assert differences([one, other]) == [
        ["pruning", "given", "-"],
        ["losses.soft", "dkd", "-"],
        ["data", "-", "given"],
    ]
    assert differences([{"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}]) == [["a.c", "2", "3"]]
    assert differences([one, one]) == []


def test_picture_has_the_means_and_their_intervals(make_run):
    experiments = group_runs([make_run("a0", 0.4), make_run("a1", 0.6, seed=1), make_run("b", 0.3, data={})])
    with styled():
        cost, course = draw_comparison(experiments).axes
    (two, one) = cost.containers
    assert two.lines[0].get_xydata().tolist() == [[1000, pytest.approx(0.5)]]
    (interval,) = two.lines[2][0].get_segments()
    assert interval[:, 1].tolist() == pytest.approx([0.5 - 1.27062, 0.5 + 1.27062], abs=1e-5)
    assert one.lines[0].get_xydata().tolist() == [[1000, 0.3]] and not one.has_yerr
    assert [line.get_ydata().tolist() for line in course.lines] == [
        pytest.approx([0.25, 0.5]),
        pytest.approx([0.15, 0.3]),
    ]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare", *map(str, arguments), "--picture", str(tmp_path / "out.png")])
        return main(), *capsys.readouterr()

    return command


def test_command(make_run, command, tmp_path):
    runs = [make_run("a0", 0.4), make_run("a1", 0.6, seed=1), make_run("half done", 0.1, finished=False)]
    status, out, err = command(*(run.path for run in runs))
    assert status == 0 and err == ""
    assert "half done is not finished and is left out" in out and "a0, a1" in out and "0.500 ± 1.271" in out
    assert "what differs" not in out  # there is but one config
    assert Image.open(tmp_path / "out.png").width == 840


def test_nothing_to_compare(make_run, command, tmp_path):
    assert command(make_run("a", 0.1, finished=False).path)[0] == 2
    status, _, err = command(tmp_path / "nowhere")
    assert status == 2 and err.startswith("error: ") and "holds no run" in err
