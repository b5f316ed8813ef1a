import copy

import pytest
import torch
from torchvision.models import WeightsEnum, detection

import students
from distill.measure import count_macs, count_uses
from students import TwoStageOutput

CLASSES = ["a", "b"]
REFERENCES = {
    "faster_rcnn": (detection.fasterrcnn_resnet50_fpn, {}),
    "faster_rcnn v2": (detection.fasterrcnn_resnet50_fpn_v2, {"version": 2}),
    "faster_rcnn mobilenet": (
        detection.fasterrcnn_mobilenet_v3_large_320_fpn,
        {"backbone": "mobilenet_v3_large_320"},
    ),
    "mask_rcnn": (detection.maskrcnn_resnet50_fpn, {}),
}


def take_fewer(model):
    """Fewer proposals, for the sake of time."""
    model.roi_heads.fg_bg_sampler.batch_size_per_image = 24
    model.rpn._post_nms_top_n.update(training=60, testing=40)


@pytest.fixture(params=REFERENCES, scope="module")
def pair(request, wake, pictures, tmp_path_factory):
    """torchvision's own model, and our detector with its weights."""
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    builder, settings = REFERENCES[request.param]
    torch.manual_seed(0)
    model = builder(weights=None, weights_backbone=None, num_classes=3, min_size=128, max_size=128)
    wake(model, pictures, "rpn.head.cls_logits", "roi_heads.box_predictor.cls_score")
    torch.save(model.state_dict(), path)
    family = request.param.split()[0]
    detector = students.build(family, class_names=CLASSES, weights=str(path), norm="batch", **settings)
    for part in (model, detector.model):
        take_fewer(part)
    return model, detector


def small(**changes):
    torch.manual_seed(0)
    return students.build("faster_rcnn", **{"class_names": CLASSES, "backbone": "resnet18", "channels": 32} | changes)


@pytest.fixture(scope="module")
def tiny():
    """The least that is a Faster R-CNN, in eval mode; read only."""
    return small().eval()


def test_it_detects_what_torchvision_does(pair, pictures):
    model, detector = pair
    with torch.no_grad():
        wanted = model.eval()(list(pictures))
        output = detector.eval()(pictures)
        found = detector.decode(output, [(128, 128)] * 2)
    assert isinstance(output, TwoStageOutput)
    for ours, theirs in zip(found, wanted):
        assert len(theirs["labels"]) > 5
        torch.testing.assert_close(ours.boxes, theirs["boxes"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.scores, theirs["scores"], atol=1e-4, rtol=1e-4)
        assert torch.equal(ours.labels, theirs["labels"] - 1)


def test_its_losses_are_torchvisions(pair, pictures, objects):
    model, detector = pair
    if model.roi_heads.has_mask():
        pytest.skip("masks are not trained here")
    for targets in (objects, objects[1:] * 2):
        torch.manual_seed(3)
        wanted = model.train()(list(pictures), [t | {"labels": t["labels"] + 1} for t in targets])
        torch.manual_seed(3)
        for _ in targets:
            torch.empty(1).uniform_()  # torchvision draws a size for each image
        found = detector.train().loss(detector(pictures), targets)
        assert found.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"version": 2}, {"backbone": "mobilenet_v3_large"}])
def test_every_parameter_has_a_gradient(settings, pictures, objects):
    detector = small(**settings)
    take_fewer(detector.model)
    for targets in (objects, objects[1:] * 2):
        detector.zero_grad()
        losses = detector.loss(detector(pictures), targets)
        assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
        sum(losses.values()).backward()
        assert [name for name, p in detector.named_parameters() if p.grad is None] == []
    with torch.no_grad():
        output = detector(torch.rand(1, 3, 256, 256))
    assert detector.strides == tuple(256 // level.shape[2] for level in output.features)
    assert detector.feature_channels == tuple(level.shape[1] for level in output.features)


@torch.no_grad()
def test_roi_puts_our_labels_first_and_the_background_last(tiny, pictures):
    output = tiny(pictures)
    boxes = [torch.tensor([[4.0, 4, 60, 70]]), torch.tensor([[0.0, 0, 128, 128], [8, 8, 20, 16]])]
    logits, deltas = tiny._run_roi_head(output.features, boxes)
    found = tiny.roi(output.features, boxes)
    assert torch.equal(found.class_logits, logits[:, [1, 2, 0]])
    assert torch.equal(found.box_deltas, deltas[:, 4:12])
    # the rows are the boxes', image by image, each on its own image
    alone = tiny.roi(tuple(level[1:] for level in output.features), boxes[1:])
    torch.testing.assert_close(found.class_logits[1:], alone.class_logits)


def test_samples_are_proposals_and_objects_with_true_deltas(tiny, objects):
    proposals = [torch.tensor([[30.0, 20, 120, 90], [0, 0, 8, 8]]), torch.tensor([[0.0, 0, 8, 8]])]
    samples = tiny.sample(proposals, objects)
    assert [len(boxes) for boxes in samples.boxes] == [5, 1]
    labels = dict(zip(map(tuple, torch.cat(samples.boxes).int().tolist()), samples.labels.tolist()))
    assert labels == {
        (30, 20, 120, 90): 1,
        (0, 0, 8, 8): 2,
        (4, 4, 40, 44): 0,
        (30, 20, 120, 100): 1,
        (60, 64, 90, 110): 1,
    }
    row = samples.boxes[0].int().tolist().index([30, 20, 120, 90])
    # to (30, 20, 120, 100): the centre 5 px lower, 10 * 5 / 70; the height 80 / 70, 5 * log(8 / 7)
    assert samples.box_deltas[row].tolist() == pytest.approx([0, 50 / 70, 0, 5 * 0.13353], abs=1e-4)


@torch.no_grad()
def test_boxes_stay_in_the_valid_part(tiny, pictures):
    output = tiny(pictures)
    proposals = tiny.propose(output, [(128, 128), (50, 70)])
    assert proposals[1].amax(dim=0).tolist()[2:] == [70, 50]
    found = tiny.decode(output, [(128, 128), (50, 70)])
    assert all((image.boxes >= 0).all() for image in found) and (found[1].boxes[:, 3] <= 50).all()


@torch.no_grad()
def test_an_image_without_proposals_has_no_detections(tiny, pictures):
    output = tiny(pictures)
    none = output._replace(objectness=tuple(torch.full_like(level, -20) for level in output.objectness))
    detector = copy.deepcopy(tiny)
    detector.model.rpn.score_thresh = 0.05
    found = detector.decode(none, [(128, 128)] * 2)
    assert [(len(image.boxes), image.boxes.shape[1], image.labels.dtype) for image in found] == [
        (0, 4, torch.int64)
    ] * 2


def test_levels_of_roi_pooling_do_not_hang_on_the_first_image(pictures, tiny):
    detector = small().eval()
    with torch.no_grad():
        detector.decode(detector(torch.rand(1, 3, 36, 70)), [(20, 70)])
        for ours, theirs in zip(
            detector.decode(detector(pictures), [(128, 128)] * 2), tiny.decode(tiny(pictures), [(128, 128)] * 2)
        ):
            assert torch.equal(ours.boxes, theirs.boxes)


def test_cost_counts_the_head_on_all_proposals(tiny):
    # fc6 32 * 49 -> 1024, fc7 1024 -> 1024, and 3 classes with 4 deltas each, on 1000 proposals
    head = 1000 * (32 * 49 * 1024 + 1024 * 1024 + 1024 * 15)
    rest = copy.deepcopy(tiny)
    rest.traced = lambda output: list(output.features)
    assert count_macs(tiny, (64, 64)) - count_macs(rest, (64, 64)) == head
    assert count_macs(small(backbone="mobilenet_v3_large_320"), (64, 64)) < 150 * 3e6 + 1e8
    uses = count_uses(tiny, (64, 64))
    assert uses["model.roi_heads.box_head.fc6.weight"] == 1000
    assert uses["model.rpn.head.cls_logits.weight"] == 16**2 + 8**2 + 4**2 + 2**2 + 1


def test_low_precision(objects, pictures):
    detector, pictures = small(), pictures[..., :64, :64]
    detector.model.roi_heads.fg_bg_sampler.batch_size_per_image = 4
    detector.model.rpn._post_nms_top_n.update(training=8, testing=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = detector(pictures)
        losses = detector.loss(output, objects)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    lowered = detector.bfloat16().eval()
    with torch.no_grad():
        output = lowered(pictures.bfloat16())
        assert all(loss.isfinite() for loss in lowered.loss(output, objects).values())
        assert lowered.decode(output, [(64, 64)] * 2)[0].boxes.dtype == torch.float32


def test_saved_and_loaded(tmp_path, pictures, tiny):
    students.save(tiny, tmp_path / "student")
    loaded = students.load(tmp_path / "student")
    with torch.no_grad():
        for ours, theirs in zip(*(d.decode(d(pictures), [(128, 128)] * 2) for d in (loaded, tiny))):
            assert torch.equal(ours.boxes, theirs.boxes) and torch.equal(ours.scores, theirs.scores)


def test_coco_weights_go_by_backbone_and_version(monkeypatch):
    asked = []

    def fetch(weights, **_):
        asked.append(str(weights))
        raise OSError

    monkeypatch.setattr(WeightsEnum, "get_state_dict", fetch)
    for family, settings in [
        ("faster_rcnn", {}),
        ("faster_rcnn", {"version": 2}),
        ("faster_rcnn", {"backbone": "mobilenet_v3_large"}),
        ("faster_rcnn", {"backbone": "mobilenet_v3_large_320"}),
        ("mask_rcnn", {"version": 2}),
    ]:
        with pytest.raises(ValueError, match="cannot be fetched"):
            students.build(family, class_names=["person"], weights="coco", **settings)
    assert [name.partition("_Weights")[0] for name in asked] == [
        "FasterRCNN_ResNet50_FPN",
        "FasterRCNN_ResNet50_FPN_V2",
        "FasterRCNN_MobileNet_V3_Large_FPN",
        "FasterRCNN_MobileNet_V3_Large_320_FPN",
        "MaskRCNN_ResNet50_FPN_V2",
    ]
    with pytest.raises(ValueError, match="there is no version 2 with mobilenet_v3_large; choose 1"):
        small(backbone="mobilenet_v3_large", version=2)
