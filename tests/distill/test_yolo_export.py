"""YOLO detectors as exported files: boxes and scores inside, merged convolutions."""

import pytest
import torch

import students
from distill import export
from distill.exported import DeployedDetector, ExportedDetector, trace
from distill.parity import compare_detections

SMALL = {
    "yolov5": {"size": "n", "width": 0.125, "depth": 0.1},
    "yolov7": {"width": 0.125, "depth": 0.25},
}


def lively(family):
    """A detector that is sure of something, so that there is something to find."""
    torch.manual_seed(0)
    detector = students.build(family, class_names=["a", "b"], **SMALL[family])
    for module in detector.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        detector(torch.rand(4, 3, 64, 96))  # statistics, without which nothing would be left of the image
    for layer in (*detector.head.class_logits, *detector.head.objectness):
        torch.nn.init.normal_(layer.weight, std=0.5)
        torch.nn.init.zeros_(layer.bias)
    return detector.eval()


def test_graphs_of_any_batch_and_size():
    detector = lively("yolov5")
    program = trace(DeployedDetector(detector, "boxes"), (64, 96), dynamic=("batch", "size")).module()
    generator = torch.Generator().manual_seed(1)
    for shape in ((1, 3, 64, 96), (3, 3, 128, 64)):
        images = torch.rand(shape, generator=generator)
        with torch.no_grad():
            boxes, scores = program(images)
            wanted_boxes, wanted_scores = detector.candidates(detector(images))
        torch.testing.assert_close(boxes, wanted_boxes, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(scores, wanted_scores, atol=1e-5, rtol=1e-4)


def test_onnx_with_everything_inside(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs the [export] extra")
    import onnx

    detector, file = lively("yolov7"), tmp_path / "student.onnx"
    info = {"class_names": ["a", "b"], "image_size": [64, 96], "resize": "letterbox", "batch": 1, "dynamic": []}
    export.write(DeployedDetector(detector, "detections"), file, "onnx", info | {"outputs": "detections"})
    exported, images = ExportedDetector(file), torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        ours, theirs = detector.decode(detector(images), [(64, 96)]), exported.decode(exported(images), [(64, 96)])
    assert len(ours[0].scores) > 5
    far = compare_detections(ours, theirs)
    assert far.unmatched <= 2 and far.largest["boxes"] < 0.05 and far.largest["scores"] < 1e-3
    # each tower is one convolution
    kinds = [node.op_type for node in onnx.load(file).graph.node]
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in detector.modules())
    assert kinds.count("Conv") == convolutions - 3
