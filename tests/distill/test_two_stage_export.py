"""Two-stage detectors as graphs of fixed shape: as many proposals of every image, padded."""

import pytest
import torch

import students
from distill import export
from distill.distiller import Distiller
from distill.errors import UserError
from distill.exported import DeployedDetector, ExportedDetector
from distill.parity import compare_detections
from distill.pruning.budget import make_plan
from distill.pruning.graph import find_groups
from students import Detections
from students.nms import clip, select
from students.plan import apply_plan, named_tensors
from students.torchvision_families.proposals import propose_padded

SIZE = (64, 96)
INFO = {"class_names": ["a", "b"], "image_size": list(SIZE), "resize": "letterbox", "batch": 2, "dynamic": []}


@pytest.fixture
def build():
    """A detector that is sure of something, and no two of whose proposals are alike; of few proposals."""

    def build(class_names=("a", "b"), **settings):
        torch.manual_seed(0)
        settings = {"class_names": list(class_names), "backbone": "resnet18", "channels": 32} | settings
        detector = students.build("faster_rcnn", **settings)
        for norm in (module for module in detector.modules() if isinstance(module, torch.nn.BatchNorm2d)):
            norm.momentum = 1.0
        with torch.no_grad():
            detector.train()(pictures(4, (128, 128)))  # statistics, without which a MobileNet's maps fade
        detector.eval()
        for layer in detector.output_layers:
            torch.nn.init.normal_(layer.weight, std=0.1)
        rpn = detector.model.rpn
        rpn._pre_nms_top_n["testing"], rpn._post_nms_top_n["testing"] = 60, 40
        return detector

    return build


@pytest.fixture
def detector(build):
    return build()


def pictures(batch, size=SIZE):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(3))


def assert_alike(ours, theirs):
    far = compare_detections(ours, theirs)
    assert all(len(found.scores) > 10 for found in theirs)
    assert far.unmatched == 0 and far.largest["boxes"] < 1e-3 and far.largest["scores"] < 1e-5


@torch.no_grad()
def test_padded_proposals_are_torchvisions(detector):
    output = detector(pictures(2))
    wanted = detector.propose(output, [SIZE] * 2)
    boxes, found = propose_padded(detector.model.rpn, output, SIZE)
    assert boxes.shape == (2, 40, 4)
    for image in range(2):
        torch.testing.assert_close(boxes[image][found[image]], wanted[image], rtol=0, atol=1e-4)
    detector.model.rpn.score_thresh = 0.6  # so that some places stay empty
    wanted = detector.propose(output, [SIZE] * 2)
    boxes, found = propose_padded(detector.model.rpn, output, SIZE)
    assert found.sum(dim=1).tolist() == [len(image) for image in wanted] and not found.all()
    assert boxes[~found].abs().max() == 0
    torch.testing.assert_close(boxes[found], torch.cat(wanted), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("version", [1, 2])
def test_candidates_are_what_torchvision_finds(build, version):
    detector = build(version=version)
    output = detector(pictures(2))
    boxes, scores = detector.candidates(output)
    assert boxes.shape == (*scores.shape, 4)
    assert_alike(select(boxes, scores, [SIZE] * 2, *detector.limits), detector.decode(output, [SIZE] * 2))


@torch.no_grad()
def test_proposals_end_where_the_image_does(detector):
    """Also where the pyramid goes on, as no stride divides these sides."""
    size = (61, 94)
    images = pictures(2, size)
    wanted = detector.decode(detector(images), [size] * 2)
    padded = zip(*DeployedDetector(detector, "detections")(images))
    found = [Detections(boxes[scores > 0], scores[scores > 0], labels[scores > 0]) for boxes, scores, labels in padded]
    assert_alike(found, wanted)


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v3_large"])
def test_candidates_are_what_the_roi_head_says_of_proposals(build, backbone):
    """A MobileNet's maps are so coarse that small boxes at the edge look alike to it, and which of two with the same
    score becomes a detection is chance; so what is compared comes before that."""
    detector, size = build(backbone=backbone), (96, 100)
    heads, output = detector.model.roi_heads, detector(pictures(2, size))
    proposals = detector.propose(output, [size] * 2)
    logits, deltas = detector._run_roi_head(output.features, proposals)
    wanted_boxes = clip(heads.box_coder.decode(deltas, proposals)[:, 1:], size)
    wanted_scores = logits.softmax(dim=1)[:, 1:]
    boxes, scores = detector.candidates(output, size)
    there = torch.cat([torch.arange(40) < len(image) for image in proposals])
    large = (wanted_boxes[..., 2:] - wanted_boxes[..., :2]).amin(dim=-1) >= 0.01
    torch.testing.assert_close(boxes.flatten(0, 1)[there], wanted_boxes, rtol=0, atol=1e-3)
    torch.testing.assert_close(scores.flatten(0, 1)[there], wanted_scores * large, rtol=0, atol=1e-5)
    assert not scores.flatten(0, 1)[~there].any()


@torch.no_grad()
def test_classes_that_are_not_ours_are_left_out(build):
    """Of a head with 7 classes, three are ours, in another order."""
    detector = build("abc", head_classes=7)
    torch.nn.init.normal_(detector.model.roi_heads.box_predictor.cls_score.weight, std=0.02)  # of several classes
    detector.class_channels.copy_(torch.tensor([5, 1, 3]))
    detector.model.roi_heads.detections_per_img = 10_000  # torchvision counts detections of other classes
    output = detector(pictures(1))
    found = select(*detector.candidates(output), [SIZE], *detector.limits)
    assert_alike(found, detector.decode(output, [SIZE]))
    assert set(found[0].labels.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_a_cut_detector_in_a_file(detector, format, tmp_path):
    if format == "onnx":
        pytest.importorskip("onnxscript", reason="needs the [export] extra")
        pytest.importorskip("onnxruntime", reason="needs the [export] extra")
    groups = find_groups(Distiller(detector), SIZE)
    scores = [torch.rand(group.width, generator=torch.Generator().manual_seed(1)) for group in groups]
    plan = make_plan(groups, scores, [group.width // 2 for group in groups], named_tensors(Distiller(detector)))
    apply_plan([(Distiller(detector), plan)])
    assert detector.model.roi_heads.box_head.fc6.out_features == 512
    file = tmp_path / f"student.{format}"
    images, sizes = pictures(3), [SIZE] * 3
    with torch.no_grad():
        wanted = detector.decode(detector(images), sizes)
    export.write(DeployedDetector(detector, "detections"), file, format, INFO | {"outputs": "detections"})
    exported = ExportedDetector(file)
    with torch.inference_mode():
        assert_alike(exported.decode(exported(images), sizes), wanted)  # a batch and a half


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_a_file_for_any_batch_and_size(detector, format, tmp_path):
    if format == "onnx":
        pytest.importorskip("onnxscript", reason="needs the [export] extra")
        pytest.importorskip("onnxruntime", reason="needs the [export] extra")
    file = tmp_path / f"student.{format}"
    info = INFO | {"outputs": "boxes", "batch": None, "dynamic": ["batch", "size"], "image_size": [128, 192]}
    info["limits"] = list(detector.limits)
    export.write(DeployedDetector(detector, "boxes"), file, format, info)
    exported = ExportedDetector(file)
    images, sizes = pictures(1, (192, 128)), [(192, 128)]
    with torch.no_grad():
        wanted = detector.decode(detector(images), sizes)
    assert_alike(exported.decode(exported(images), sizes), wanted)


def test_raw_outputs_are_refused_and_the_network_alone_ends_in_boxes(detector):
    with pytest.raises(UserError, match=r"^faster_rcnn resnet18: its second stage needs .* say detections or boxes$"):
        DeployedDetector(detector, "raw")
    assert DeployedDetector(detector, "network").names == ("boxes", "scores")
