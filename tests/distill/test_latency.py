import json
import sys

import pytest

import students
from distill import export, latency
from distill.exported import DeployedDetector


@pytest.fixture
def student(build_tiny, tmp_path):
    students.save(build_tiny(), tmp_path / "student", {"image_size": [64, 64]})
    return tmp_path / "student"


@pytest.fixture
def exported(student, tmp_path):
    """A file for batches of two."""
    file = tmp_path / "student.pt2"
    info = {"class_names": ["a", "b"], "image_size": [64, 64], "outputs": "raw", "batch": 2, "dynamic": []}
    export.write(DeployedDetector(students.load(student), "raw"), file, "pt2", info)
    return file


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["latency", *map(str, arguments)])
        capsys.readouterr()
        status = latency.main()
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_folders_and_files_stand_in_one_table(run, student, exported, tmp_path):
    numbers = tmp_path / "numbers.json"
    status, out, err = run(student, exported, "--batch", 2, "--threads", 1, "--repeats", 4, "--json", numbers)
    assert status == 0 and err == "", err
    assert "1 thread; the network alone; 4 passes of each in turns" in out
    rows = [line.split() for line in out.splitlines() if line.startswith(str(student))]
    assert [row[0] for row in rows] == [str(student), str(exported)] and rows[0][1] == "eager"
    assert rows[0][-1] == "1.00x"
    results = json.loads(numbers.read_text())
    assert results["threads"] == 1 and results["outputs"] == "network"
    for entry, row in zip(results["results"], rows):
        assert entry["batch"] == 2 and entry["image_size"] == [64, 64] and len(entry["milliseconds"]) == 4
        assert sorted(entry["milliseconds"])[0] == entry["fastest_ms"] <= entry["median_ms"]
        assert row[-5] == f"{entry['median_ms']:.2f}"


def test_onnx_runs_the_same_graph(run, student):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs the [export] extra")
    status, out, err = run(student, "--runtime", "eager", "onnx", "--outputs", "boxes", "--threads", 1, "--repeats", 1)
    assert status == 0 and err == "", err
    assert f"{student} eager" in out and f"{student} onnx" in out
    assert sorted(path.name for path in student.parent.iterdir()) == ["student"]


@pytest.mark.slow
def test_compiled_runs_beside_the_others(run, student):
    status, out, err = run(student, "--runtime", "eager", "compiled", "--threads", 1, "--repeats", 2)
    assert status == 0, err  # a compiler may have its say there
    rows = [line.split() for line in out.splitlines() if line.startswith(str(student))]
    assert [row[1] for row in rows] == ["eager", "compiled"] and all(float(row[4]) > 0 for row in rows)


def test_what_a_user_can_get_wrong(run, student, exported, tmp_path, monkeypatch):
    def refused(*arguments, part):
        status, _, err = run(*arguments)
        assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and part in err, err

    refused(tmp_path / "nowhere", part="nowhere: no such folder")
    refused(exported, part="was made for batches of 2; export it with --batch 1 or --dynamic batch")
    refused(student, "--batch", 0, part="--batch: found 0; at least 1 is needed")
    refused(student, "--repeats", 0, part="--repeats: found 0; at least 1 is needed")
    refused(student, "--threads", 0, part="--threads: found 0; at least 1 is needed")
    refused(student, "--json", tmp_path / "no/a.json", part="--json: there is no folder")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnx" else object())
    refused(student, "--runtime", "onnx", part="ONNX needs onnx; install it: python -m pip install -e '.[export]'")
