import pytest
import torch
from torchvision.models import WeightsEnum, detection, mobilenet_v3_large
from torchvision.models.vgg import cfgs, make_layers

import students

CLASSES = ["a", "b"]
BUILDERS = {"ssd300": detection.ssd300_vgg16, "ssdlite320": detection.ssdlite320_mobilenet_v3_large}
SIDES = {"ssd300": 300, "ssdlite320": 320}
LEVELS = {"ssd300": (38, 19, 10, 5, 3, 1), "ssdlite320": (20, 10, 5, 3, 2, 1)}


@pytest.fixture(params=BUILDERS, scope="module")
def family(request):
    return request.param


@pytest.fixture(scope="module")
def square(family):
    """(2, 3, S, S) in [0, 1], of the side that torchvision would bring images to."""
    return torch.rand(2, 3, SIDES[family], SIDES[family], generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def pair(family, wake, square, tmp_path_factory):
    """torchvision's own model, and our detector with its weights."""
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.manual_seed(0)
    model = BUILDERS[family](weights=None, weights_backbone=None, num_classes=3)
    if family == "ssdlite320":
        wake(model, square, *(f"head.classification_head.module_list.{level}.1" for level in range(6)))
    torch.save(model.state_dict(), path)
    return model, students.build(family, class_names=CLASSES, weights=str(path))


def test_it_detects_what_torchvision_does(pair, square):
    model, detector = pair
    with torch.no_grad():
        wanted = model.eval()(list(square))
        found = detector.eval().decode(detector(square), [tuple(square.shape[2:])] * 2)
    for ours, theirs in zip(found, wanted):
        assert len(theirs["labels"]) > 5
        torch.testing.assert_close(ours.boxes, theirs["boxes"], atol=1e-3, rtol=1e-4)  # pixels
        torch.testing.assert_close(ours.scores, theirs["scores"], atol=1e-4, rtol=1e-4)
        assert torch.equal(ours.labels, theirs["labels"] - 1)


def test_its_losses_are_torchvisions(pair, square, objects):
    model, detector = pair
    wanted = model.train()(list(square), [t | {"labels": t["labels"] + 1} for t in objects])
    output = detector.train()(square)
    found = detector.loss(output, objects)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-4, rtol=1e-4)
    nothing = detector.loss(output, objects[1:] * 2)  # no negatives without positives: SSD learns nothing there
    assert nothing == {"bbox_regression": 0, "classification": 0}
    sum([*found.values(), *nothing.values()]).backward()
    trained = [(name, p) for name, p in detector.named_parameters() if p.requires_grad]
    assert [name for name, p in trained if p.grad is None] == []


@torch.no_grad()
def test_shared_fields(pair, family, square):
    model, detector = pair
    output = detector.eval()(square)
    counts = model.anchor_generator.num_anchors_per_location()
    assert [level.shape[2] for level in output.features] == list(LEVELS[family])
    assert detector.feature_channels == tuple(level.shape[1] for level in output.features)
    for level, stride, count in zip(range(6), detector.strides, counts):
        logits, raw = output.class_logits[level], output.raw_logits[level]
        # a sigmoid says what the softmax did
        wanted = raw.unflatten(1, (count, 3)).softmax(dim=2)[:, :, 1:].flatten(1, 2)
        torch.testing.assert_close(logits.sigmoid(), wanted, atol=1e-5, rtol=1e-4)
        row, column, anchor = LEVELS[family][level] // 2, 0, count - 1
        left, top, right, bottom = output.box_distances[level][1, :, row, column].view(count, 4)[anchor] * stride
        x, y = (column + 0.5) * stride, (row + 0.5) * stride
        place = (row * LEVELS[family][level] + column) * count + anchor
        encoded = output.raw_boxes[level][1, :, row, column].view(count, 4)[anchor]
        box = model.box_coder.decode_single(encoded[None], output.anchor_boxes[level][place][None])[0]
        torch.testing.assert_close(torch.stack((x - left, y - top, x + right, y + bottom)), box, atol=1e-2, rtol=1e-4)


def test_saved_and_loaded(pictures, tmp_path):
    detector = students.build("ssdlite320", class_names=CLASSES, trainable_layers=3).eval()
    students.save(detector, tmp_path / "student")
    loaded = students.load(tmp_path / "student")
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in detector.parameters()]
    with torch.no_grad():
        for ours, theirs in zip(loaded(pictures), detector(pictures)):
            assert all(map(torch.equal, ours, theirs))


def test_a_vgg_fills_the_backbone_and_its_first_stages_may_stay(monkeypatch):
    torch.manual_seed(1)
    state = {f"features.{name}": tensor for name, tensor in make_layers(cfgs["D"]).state_dict().items()}
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **_: state)
    backbone = students.build("ssd300", class_names=CLASSES, weights="imagenet", trainable_layers=3).model.backbone
    convolutions = [layer for layer in (*backbone.features, *backbone.extra[0]) if isinstance(layer, torch.nn.Conv2d)]
    theirs = [tensor for name, tensor in state.items() if name.endswith("weight")]
    assert len(convolutions) == len(theirs) == 13
    assert all(torch.equal(layer.weight, tensor) for layer, tensor in zip(convolutions, theirs))
    # stages of 2, 2, 3, 3 and 3 convolutions, of which the last three are trained
    assert [layer.weight.requires_grad for layer in convolutions] == [False] * 4 + [True] * 9
    assert backbone.scale_weight.requires_grad


def test_a_mobilenet_fills_the_backbone_whole(monkeypatch, tmp_path):
    torch.manual_seed(1)
    classifier = mobilenet_v3_large()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **_: classifier.state_dict())
    detector = students.build("ssdlite320", class_names=CLASSES, weights="imagenet", trainable_layers=2)
    backbone = detector.model.backbone
    assert torch.equal(backbone.features[1][-1][0].weight, classifier.features[16][0].weight)
    assert detector.recipe["reduced_tail"] is False
    first, last = backbone.features[0][0][0].weight, backbone.features[1][-1][0].weight
    assert [first.requires_grad, last.requires_grad] == [False, True]
    students.save(detector, tmp_path / "student")  # a whole tail without weights, which torchvision would halve
    assert (
        students.load(tmp_path / "student").feature_channels
        == detector.feature_channels
        == (672, 960, 512, 256, 256, 128)
    )


def test_unequal_anchors_are_no_dense_head():
    assert students.FAMILIES["ssd300"].anchors == 0 and students.FAMILIES["ssdlite320"].anchors == 6
