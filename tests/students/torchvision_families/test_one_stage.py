import math

import pytest
import torch
from torchvision.models import detection

import students

CLASSES = ["a", "b"]
CLASS_LAYER = "head.classification_head.cls_logits"
REFERENCES = {
    "fcos": (detection.fcos_resnet50_fpn, {}),
    "retinanet": (detection.retinanet_resnet50_fpn, {}),
    "retinanet v2": (detection.retinanet_resnet50_fpn_v2, {"version": 2}),
}


@pytest.fixture(params=REFERENCES, scope="module")
def pair(request, wake, pictures, tmp_path_factory):
    """torchvision's own model, and our detector with its weights."""
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    builder, settings = REFERENCES[request.param]
    torch.manual_seed(0)
    model = builder(weights=None, weights_backbone=None, num_classes=3, min_size=128, max_size=128)
    wake(model, pictures, CLASS_LAYER)
    torch.save(model.state_dict(), path)
    family = request.param.split()[0]
    weights = {"weights": str(path), "norm": "batch"}
    return model, students.build(family, class_names=CLASSES, **weights, **settings)


def small(family, **changes):
    torch.manual_seed(0)
    return students.build(family, **{"class_names": CLASSES, "backbone": "resnet18", "channels": 32} | changes)


def as_theirs(targets):
    """torchvision's label 0 is the background."""
    return [target | {"labels": target["labels"] + 1} for target in targets]


def test_it_detects_what_torchvision_does(pair, pictures):
    model, detector = pair
    with torch.no_grad():
        wanted = model(list(pictures))
        found = detector.eval().decode(detector(pictures), [(128, 128)] * 2)
    for ours, theirs in zip(found, wanted):
        known = theirs["labels"] > 0  # what is taken for background, a logit that no one trained
        assert known.sum() > 10
        torch.testing.assert_close(ours.boxes, theirs["boxes"][known], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.scores, theirs["scores"][known], atol=1e-4, rtol=1e-4)
        assert torch.equal(ours.labels, theirs["labels"][known] - 1)


def test_its_losses_are_torchvisions(pair, pictures, objects):
    model, detector = pair
    for targets in (objects, objects[1:] * 2):
        wanted = model.train()(list(pictures), as_theirs(targets))
        found = detector.train().loss(detector(pictures), targets)
        assert found.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], atol=1e-4, rtol=1e-4)


def test_shared_fields_tell_the_same_boxes_and_scores(pair, pictures):
    detector = pair[1]
    with torch.no_grad():
        output = detector.eval()(pictures)
        found = detector.decode(output, [(128, 128)] * 2)[0]
    anchors, boxes, logits = detector.anchors, [], []
    for level, stride in enumerate(detector.strides):
        _, _, height, width = output.features[level].shape
        assert output.class_logits[level].shape == (2, anchors * 2, height, width)
        assert output.box_distances[level].shape == (2, anchors * 4, height, width)
        for row in range(height):
            for column in range(width):
                x, y = (column + 0.5) * stride, (row + 0.5) * stride
                left, top, right, bottom = output.box_distances[level][0, :, row, column].view(anchors, 4).T * stride
                boxes.append(torch.stack((x - left, y - top, x + right, y + bottom), dim=-1))
                logits.append(output.class_logits[level][0, :, row, column].view(anchors, 2))
    boxes, scores = torch.cat(boxes).clamp(0, 128), torch.cat(logits).sigmoid()
    # every box that is found is one of them; of several that are the same, the best is kept
    best = torch.stack([scores[(boxes - box).abs().amax(dim=1) < 1e-3].amax(dim=0) for box in found.boxes])
    best = best.gather(1, found.labels[:, None])[:, 0]
    if output.centerness:
        assert (found.scores <= best.sqrt() + 1e-5).all()  # the score is the root of class score times centerness
    else:
        torch.testing.assert_close(found.scores, best, atol=1e-4, rtol=1e-4)


def test_fcos_distances_count_from_the_centre_of_the_cell():
    # torchvision's points are the top left corners of the cells
    detector = small("fcos")
    raw = torch.zeros(1, 4, 8, 8)
    raw[0, :, 1, 0] = torch.tensor([1.0, 0.5, 2.0, 3.0])  # in strides of 8 around (0, 8): (-8, 4) to (16, 32)
    features = tuple(torch.zeros(1, 32, 64 // s, 64 // s) for s in (8, 16, 32, 64, 64))
    anchors = detector.make_anchors(features, (64, 64))[0]
    found = detector._to_distances(raw, anchors, 8)
    # around the centre, (4, 12)
    assert found[0, :, 1, 0].tolist() == [1.5, 1.0, 1.5, 2.5]
    assert found[0, :, 0, 1].tolist() == [0.5, 0.5, -0.5, -0.5]  # an empty box at the corner


def test_retinanet_distances_of_its_own_anchors():
    detector = small("retinanet")
    features = tuple(torch.zeros(1, 32, 64 // s, 64 // s) for s in (8, 16, 32, 64, 64))
    anchors = detector.make_anchors(features, (64, 64))[0]
    found = detector._to_distances(torch.zeros(1, 36, 8, 8), anchors, 8)[0, :, 2, 3].view(9, 4)
    # 32 px, ratio 1/2: 45.25 by 22.63 px, halves rounded, around the corner (24, 16) of a cell centred at (28, 20)
    assert found[0].tolist() == [(28 - (24 - 23)) / 8, (20 - (16 - 11)) / 8, (24 + 23 - 28) / 8, (16 + 11 - 20) / 8]


@pytest.mark.parametrize(
    "settings", [{"family": "fcos", "head_depth": 1}, {"family": "retinanet"}, {"family": "retinanet", "version": 2}]
)
@pytest.mark.parametrize("empty", [False, True])
def test_every_parameter_has_a_gradient(settings, pictures, objects, empty):
    detector = small(**settings)
    losses = detector.loss(detector(pictures), objects[1:] * 2 if empty else objects)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert [name for name, p in detector.named_parameters() if p.grad is None] == []
    assert detector.feature_channels == (32,) * 5 and detector.strides == (8, 16, 32, 64, 128)


def test_low_precision_leaves_losses_and_anchors_whole(pictures, objects):
    pictures = pictures[..., :64, :64]
    for detector in (small("fcos", head_depth=1), small("retinanet")):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = detector(pictures.to(memory_format=torch.channels_last))
            losses = detector.loss(output, objects)
        assert {loss.dtype for loss in losses.values()} == {torch.float32}
        assert {level.dtype for level in output.anchor_boxes} == {torch.float32}
        lowered = detector.bfloat16()
        output = lowered(pictures.bfloat16())
        again = lowered.make_anchors(tuple(level.float() for level in output.features), (64, 64))
        assert all(map(torch.equal, output.anchor_boxes, again))
        assert all(loss.isfinite() for loss in lowered.loss(output, objects).values())


def test_sides_that_32_does_not_divide():
    # 40 rows: P3 to P7 have 5, 3, 2, 1 and 1; filled up to 64 they would have 8, 4, 2, 1 and 1 of 8, 16, 32, 64, 64
    detector = small("fcos", head_depth=1, channels=64).eval()
    output = detector(torch.rand(1, 3, 40, 64))
    assert [level.shape[2:] for level in output.class_logits] == [(5, 8), (3, 4), (2, 2), (1, 1), (1, 1)]
    assert output.anchor_boxes[1].view(3, 4, 4)[2, 1].tolist() == [16 - 8, 64 // 3 * 2 - 8, 16 + 8, 64 // 3 * 2 + 8]


def test_targets_without_area_or_score_are_left_out(pictures, objects):
    detector = small("fcos", head_depth=1)
    output = detector(pictures)
    wanted = detector.loss(output, objects)
    more = {
        "boxes": torch.cat((objects[0]["boxes"], torch.tensor([[50.0, 50, 50, 80], [8, 8, 90, 90]]))),
        "labels": torch.cat((objects[0]["labels"], torch.tensor([0, 1]))),
        "scores": torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]),
    }
    found = detector.loss(output, [more, objects[1]])
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])


@pytest.mark.parametrize("family", ["fcos", "retinanet"])
@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_saved_and_loaded(tmp_path, pictures, family, norm):
    detector = small(family, norm=norm, trainable_layers=2)
    detector(pictures)
    students.save(detector, tmp_path / "student")
    loaded = students.load(tmp_path / "student")
    assert loaded.recipe == detector.recipe and loaded.recipe["head_classes"] == 3
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in detector.parameters()]
    with torch.no_grad():
        for ours, theirs in zip(loaded(pictures), detector.eval()(pictures)):
            assert all(map(torch.equal, ours, theirs))


def test_settings_that_cannot_be_met():
    for settings, message in [
        ({"family": "fcos", "channels": 48}, "channels: 48 is no multiple of 32"),
        ({"family": "retinanet", "version": 3}, "version: 3 does not exist; choose 1 or 2"),
        ({"family": "fcos", "backbone": "resnet5"}, "backbone: 'resnet5' is none of torchvision's: resnet18, "),
        ({"family": "fcos", "norm": "layer"}, "norm: 'layer' is not allowed; choose batch, frozen"),
        ({"family": "fcos", "trainable_layers": 6}, "trainable_layers: 6 is not allowed; choose 0 to 5"),
        ({"family": "fcos", "class_names": []}, "class_names: the list of classes is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            small(**settings)


def test_a_first_class_score_is_as_in_focal_loss():
    scores = small("retinanet")(torch.rand(1, 3, 64, 64)).class_logits[0].sigmoid()
    assert math.isclose(scores.mean().item(), 0.01, rel_tol=0.2)
