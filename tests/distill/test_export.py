"""Exported files agree with their detector, say what they are, and nothing else is written over."""

import json
import sys

import pytest
import torch

import students
from distill import export
from distill.config import check_config
from distill.data import open_index
from distill.errors import UserError
from distill.exported import DeployedDetector, ExportedDetector, _with_fixed_padding, trace
from distill.parity import compare_detections
from distill.run_folder import RunFolder
from students import Detections
from students.nms import select

SIZE = (64, 96)
INFO = {"class_names": ["a", "b"], "image_size": list(SIZE), "resize": "letterbox", "batch": 2, "dynamic": []}


@pytest.fixture
def onnx():
    pytest.importorskip("onnxscript", reason="needs the [export] extra")
    pytest.importorskip("onnxruntime", reason="needs the [export] extra")
    return pytest.importorskip("onnx", reason="needs the [export] extra")


def lively(build_tiny, **changes):
    """A detector that is sure of something, so that there is something to find."""
    detector = build_tiny(**changes).eval()
    torch.nn.init.normal_(detector.head.class_logits.weight, std=0.5)
    return detector


def pictures(batch, size=SIZE):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(3))


def assert_same_detections(detector, exported, images):
    sizes = [tuple(images.shape[-2:])] * len(images)
    with torch.inference_mode():
        ours = detector.decode(detector(images), sizes)
        theirs = exported.decode(exported(images), sizes)
    assert len(ours) == len(theirs) == len(images) and all(len(found.scores) > 5 for found in ours)
    for one, other in zip(ours, theirs):
        assert torch.equal(one.labels, other.labels)
        torch.testing.assert_close(one.boxes, other.boxes, rtol=0, atol=1e-3)
        torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=1e-5)


def test_onnx_with_everything_inside(onnx, build_tiny, tmp_path):
    detector, file = lively(build_tiny), tmp_path / "student.onnx"
    export.write(DeployedDetector(detector, "detections"), file, "onnx", INFO | {"outputs": "detections"})
    exported = ExportedDetector(file)
    assert exported.class_names == ["a", "b"] and exported.info["image_size"] == [64, 96]
    assert_same_detections(detector, exported, pictures(2))
    assert_same_detections(detector, exported, pictures(3))  # a batch and a half
    model = onnx.load(file)
    assert [entry.name for entry in model.graph.input] == ["images"]
    assert [entry.name for entry in model.graph.output] == ["boxes", "scores", "labels"]
    assert {entry.key: entry.value for entry in model.metadata_props}["class_names"] == '["a", "b"]'
    assert b".py" not in file.read_bytes()  # nobody's source paths
    assert [path.name for path in tmp_path.iterdir()] == ["student.onnx"]


def test_onnx_of_any_batch_and_size(onnx, build_tiny, tmp_path):
    detector, file = lively(build_tiny), tmp_path / "student.onnx"
    info = INFO | {"outputs": "boxes", "batch": None, "dynamic": ["batch", "size"]}
    export.write(DeployedDetector(detector, "boxes"), file, "onnx", info)
    exported = ExportedDetector(file)
    for images in (pictures(1), pictures(3, (128, 64))):
        assert_same_detections(detector, exported, images)
    named = [[d.dim_param or d.dim_value for d in e.type.tensor_type.shape.dim] for e in onnx.load(file).graph.input]
    assert named == [["batch", 3, "height", "width"]]


@pytest.mark.parametrize("head", ["gfl", "retinanet"])
def test_onnx_of_other_heads(onnx, build_tiny, tmp_path, head):
    detector, file = lively(build_tiny, head=head), tmp_path / "student.onnx"
    if head == "gfl":  # boxes of all sizes, most of them small
        torch.nn.init.normal_(detector.head.box_distances.weight, std=0.3)
        detector.head.box_distances.bias.data.copy_(-torch.arange(17.0).repeat(4) / 2)
    for outputs in ("detections", "raw"):
        export.write(DeployedDetector(detector, outputs), file, "onnx", INFO | {"outputs": outputs})
        exported, images, sizes = ExportedDetector(file, detector=detector), pictures(2), [SIZE] * 2
        with torch.inference_mode():
            assert_alike(exported.decode(exported(images), sizes), detector.decode(detector(images), sizes))


@pytest.mark.parametrize(
    ("family", "settings", "size"),
    [
        ("fcos", {"backbone": "resnet18", "channels": 32, "head_depth": 1}, (64, 96)),
        ("retinanet", {"backbone": "resnet18", "channels": 32}, (64, 96)),
        pytest.param("ssdlite320", {}, (96, 96), marks=pytest.mark.slow),
        pytest.param("ssd300", {}, (300, 300), marks=pytest.mark.slow),
    ],
)
def test_torchvisions_detectors_without_their_own_post_processing(family, settings, size, tmp_path):
    torch.manual_seed(0)
    detector = students.build(family, class_names=["a", "b"], **settings).eval()
    for layer in detector.output_layers:
        torch.nn.init.normal_(layer.weight, std=0.05)
        torch.nn.init.zeros_(layer.bias)  # sure of something
    # torchvision takes the best of each level, or class, and we of all together; and some of its detections are of the
    # background, which no one has trained here: neither shall leave any out
    detector.model.topk_candidates = detector.model.detections_per_img = 10_000
    images, sizes = pictures(2, size), [size] * 2
    with torch.no_grad():
        if family.startswith("ssd"):  # whose deep maps fade in a new network, and all scores become one
            for layer, level in zip(detector.output_layers, detector(images).raw_logits):
                layer.weight /= level.std()
        output = detector(images)
        assert_alike(select(*detector.candidates(output), sizes, *detector.limits), detector.decode(output, sizes))
    info = INFO | {"image_size": list(size), "outputs": "detections"}
    file = tmp_path / "student.pt2"
    export.write(DeployedDetector(detector, "detections"), file, "pt2", info)
    exported = ExportedDetector(file)
    with torch.inference_mode():
        assert_alike(exported.decode(exported(images), sizes), detector.decode(output, sizes))


def assert_alike(ours, theirs):
    """But for those where rounding decided which of two survives; without boxes that clipping left without an area."""
    ours, theirs = ([with_area(found) for found in image] for image in (ours, theirs))
    far = compare_detections(ours, theirs)
    assert all(len(found.scores) > 10 for found in theirs)
    assert far.unmatched <= 2 and far.largest["boxes"] < 0.01 and far.largest["scores"] < 1e-4


def with_area(found):
    keep = (found.boxes[:, 2:] - found.boxes[:, :2]).amin(dim=1) > 1
    return Detections(found.boxes[keep], found.scores[keep], found.labels[keep])


def test_pt2(build_tiny, tmp_path):
    detector = lively(build_tiny)
    for outputs, batch in (("raw", 2), ("detections", None)):
        file = tmp_path / f"{outputs}.pt2"
        info = INFO | {"outputs": outputs, "batch": batch, "dynamic": [] if batch else ["batch"]}
        export.write(DeployedDetector(detector, outputs), file, "pt2", info)
        exported = ExportedDetector(file, detector=detector)
        assert_same_detections(detector, exported, pictures(3))
        assert not list(exported.parameters())
    alone = ExportedDetector(tmp_path / "raw.pt2")
    with pytest.raises(UserError, match=r"raw.pt2: gives raw outputs, .+ export it with --outputs boxes or detections"):
        alone.decode(alone(pictures(2)), [SIZE] * 2)
    images = pictures(2).to(memory_format=torch.channels_last)  # as a loader gives them
    assert_same_detections(detector, exported, images)


def test_raw_outputs_are_named_by_stride(build_tiny):
    names = DeployedDetector(build_tiny(levels=(4, 5)), "raw").names
    assert names == ("class_logits_16", "class_logits_32", "box_distances_16", "box_distances_32")


def test_padding_is_the_same_where_the_stride_divides(build_tiny):
    deployed = DeployedDetector(build_tiny(backbone="tf_efficientnet_lite0").eval(), "raw")
    images = pictures(1)
    with torch.inference_mode():
        ours, theirs = deployed(images), _with_fixed_padding(deployed)(images)
    assert all(map(torch.equal, ours, theirs))


def test_tracing_leaves_nothing_behind(build_tiny):
    detector = lively(build_tiny)
    size = (32, 160)  # which no other test has in the cache of locations
    trace(DeployedDetector(detector, "boxes"), size)
    images = pictures(1, size)
    with torch.inference_mode():
        found = detector.decode(detector(images), [size])[0]
    assert type(found.boxes) is torch.Tensor and len(found.scores) > 5


def test_what_cannot_be_traced_is_one_line(build_tiny):
    class Nosy(torch.nn.Module):
        def forward(self, features):
            assert features[0].sum() > 0
            return features

    detector = build_tiny()
    detector.neck = torch.nn.Sequential(detector.neck, Nosy())
    with pytest.raises(UserError, match=r"^test_resnet: cannot be traced \(.+\); try --outputs raw$"):
        trace(DeployedDetector(detector, "raw"), SIZE)


@pytest.fixture
def run_folder(settings, scenes, build_tiny, tmp_path):
    """A run that left a student behind."""
    config = check_config(settings, "a.yaml")
    run = RunFolder.create(tmp_path / "run", config.model_dump(mode="json"), overwrite=False)
    names = open_index(scenes, "train").class_names
    students.save(
        lively(build_tiny, class_names=list(names)), run.student, {"image_size": [64, 64], "resize": "letterbox"}
    )
    return run


@pytest.fixture
def command(monkeypatch, capsys):
    """`python -m distill.export ARGUMENTS` in this process: (status, standard output, standard error)."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
        capsys.readouterr()
        status = export.main()
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command


def test_the_command_measures_what_it_wrote(command, run_folder):
    status, out, err = command(run_folder.student, "--format", "pt2")
    assert status == 0 and err == "" and "warning" not in out, out + err
    assert "Input     images (1, 3, 64, 64): RGB in [0, 1], float32" in out
    assert "Outputs   boxes (1, 100, 4), scores (1, 100), labels (1, 100)" in out
    assert "random images (1): largest difference of boxes " in out and "real images (4): " in out
    assert "AP on 4 images of val, latency of 1 image with detections" in out
    rows = [line.split() for line in out.splitlines() if line.startswith(("PyTorch, eager", "torch.export"))]
    assert rows[0][2:4] == rows[1][1:3]  # AP and AP50
    status, out, err = command(run_folder.student, "--format", "pt2", "data.root=/nowhere")
    assert status == 2 and "data.root: /nowhere does not exist" in err
    (run_folder.path / "config.yaml").unlink()
    status, out, err = command(run_folder.student, "--format", "pt2", "--outputs", "raw")
    assert status == 0 and "warning: AP is not measured: " in out and "name the config whose data to use" in out


def test_what_a_user_can_get_wrong(command, run_folder, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    student = run_folder.student

    def refused(*arguments, part):
        status, _, err = command(*arguments)
        assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and part in err, err
        assert sorted(tmp_path.rglob("*")) == before

    refused(tmp_path / "nowhere", part="nowhere: no such folder")
    refused(student / "detector.json", part="is a file; give a detector's folder")
    refused(run_folder.path, part=f"is a run; give the detector in it, {student}")
    refused(tmp_path, part="is no detector folder, it has no detector.json")
    refused(student, "--batch", 0, part="--batch: found 0; at least 1 is needed")
    refused(student, "--format", "pt2", "--opset", 18, part="--opset: is ONNX's")
    refused(student, "--format", "pt2", "--output", tmp_path / "a.onnx", part="does not end in .pt2")
    (tmp_path / "folder.pt2").mkdir()
    (tmp_path / "foreign.pt2").write_text("years of work")
    before = sorted(tmp_path.rglob("*"))
    refused(student, "--format", "pt2", "--output", tmp_path / "folder.pt2", part="folder.pt2 is a folder")
    refused(student, "--format", "pt2", "--output", tmp_path / "foreign.pt2", part="was not made by distill.export")


def test_a_run_without_a_student(command, run_folder):
    for file in run_folder.student.iterdir():
        file.unlink()
    run_folder.student.rmdir()
    status, _, err = command(run_folder.path)
    assert status == 2 and "is a run that has no student yet; finish it: train.py --resume" in err


def test_a_missing_extra_is_named(command, run_folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else object())
    status, _, err = command(run_folder.student)
    assert status == 2 and err == "error: ONNX needs onnxscript; install it: python -m pip install -e '.[export]'\n"


def test_opsets(onnx, command, run_folder):
    status, _, err = command(run_folder.student, "--opset", 999)
    assert status == 2 and "--opset: found 999; the installed onnx knows 1 to " in err
    status, _, err = command(run_folder.student, "--opset", 9)
    assert status == 2 and "--opset: 9 cannot hold this detector, it lacks " in err and "NonMaxSuppression" in err
    assert not list(run_folder.path.glob("*.onnx"))


def test_a_foreign_file(onnx, tmp_path):
    value = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["images"], ["y"])], "a", [value], [])
    graph.output.add().CopyFrom(onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1]))
    opset = onnx.helper.make_opsetid("", 18)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8), tmp_path / "a.onnx")
    with pytest.raises(UserError, match=r"was not made by distill\.export"):
        ExportedDetector(tmp_path / "a.onnx")
    (tmp_path / "b.onnx").write_text(json.dumps({}))
    with pytest.raises(UserError, match="cannot be read as ONNX"):
        ExportedDetector(tmp_path / "b.onnx")
    with pytest.raises(UserError, match="no such file"):
        ExportedDetector(tmp_path / "c.onnx")
