import json
import sys

import pytest

import students
from distill import compress
from distill.artifact import open_detector
from distill.compression import processor
from distill.config import check_config
from distill.data import open_index
from distill.run_folder import RunFolder


@pytest.fixture
def student(settings, scenes, build_tiny, tmp_path):
    """A run that left a student and its teacher behind, but no checkpoint."""
    settings["pruning"], settings["losses"] = None, {"soft_label": {"name": "dense_sigmoid"}}
    config = check_config(settings, "a.yaml").model_dump(mode="json")
    run = RunFolder.create(tmp_path / "run", config, overwrite=False)
    names = list(open_index(scenes, "train").class_names)
    info = {"image_size": [64, 64], "resize": "letterbox"}
    students.save(build_tiny(class_names=names), run.student, info)
    students.save(build_tiny(class_names=names, channels=24), run.teacher(), info)
    return run.student


@pytest.fixture
def command(monkeypatch, capsys):
    """`python -m distill.compress ARGUMENTS` in this process: (status, standard output, standard error)."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs the [export] extra")

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["compress", *map(str, arguments)])
        capsys.readouterr()
        status = compress.main()
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command


def test_methods_stand_in_one_table(command, student):
    status, out, err = command(student, "--methods", "dynamic", "qat", "shared", "--epochs", 1, "--images", 3)
    assert status == 0 and err == "", err
    folder = student.parent / "compressed"
    names = ["float", "dynamic", "qat", "shared"]
    rows = [line.split() for line in out.splitlines() if line.split() and line.split()[0] in names]
    assert [row[0] for row in rows] == names
    results = json.loads((folder / "compression.json").read_text())
    assert list(results["results"]) == names and results["images"] == 3 and results["split"] == "val"
    for name, entry in results["results"].items():
        assert entry["ap"] is not None and (entry["latency_ms"] is None) == (name == "shared")
    sizes = {name: entry["size"] for name, entry in results["results"].items()}
    assert max(sizes[name] for name in names[1:3]) < sizes["float"]
    assert open_detector(folder / "qat.onnx").info["quantization"] == "qat"
    weights = {
        name: weight for name, weight in open_detector(folder / "shared").named_parameters() if weight.dim() == 4
    }
    assert (
        len(weights["head.class_tower.0.conv.weight"].unique())
        <= 16
        < len(weights["head.class_logits.weight"].unique())
    )


def test_what_a_user_can_get_wrong(command, student, capsys):
    def refused(*arguments, part):
        status, _, err = command(student, *arguments)
        assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and part in err, err
        assert not (student.parent / "compressed").exists()

    refused("--images", 0, part="--images: found 0; at least 1 is needed")
    refused("--bits", 9, part="--bits: found 9; an index has at most 8")
    refused("--rate", 0, part="--rate: found 0")
    refused("--methods", "static", "--keep", "haed", part="--keep: 'haed' fits no convolution")
    refused("teacher.path=/nowhere", "--methods", "qat", part="teacher.path: /nowhere")
    with pytest.raises(SystemExit):
        command(student, "--methods", "int4")
    assert "invalid choice: 'int4'" in capsys.readouterr().err


def test_eight_bits_are_warned_of_where_they_overflow(monkeypatch, tmp_path):
    monkeypatch.setattr(processor.platform, "machine", lambda: "x86_64")
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(processor, "Path", lambda _: file)
    for flags, expected in (("fpu avx2", True), ("avx512f avx512_vnni", False), ("avx2 avx_vnni", False)):
        file.write_text(f"flags : {flags}\n")
        assert processor.sums_in_16_bits() is expected
    monkeypatch.setattr(processor.platform, "machine", lambda: "aarch64")
    assert not processor.sums_in_16_bits()
