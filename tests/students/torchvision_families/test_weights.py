import pytest
import torch
from torchvision.models import WeightsEnum, detection, resnet18
from torchvision.ops import FrozenBatchNorm2d

import students
from distill.config import check_config
from distill.errors import UserError
from distill.factory import build_teachers

SMALL = {"class_names": ["a", "b"], "backbone": "resnet18", "channels": 32}


def build(family="retinanet", **changes):
    torch.manual_seed(0)
    return students.build(family, **SMALL | changes)


def save(tensors, path):
    torch.save(tensors, path)
    return str(path)


def test_a_coco_head_stays_as_it_is_for_classes_that_it_knows(monkeypatch, wake, pictures, tmp_path):
    torch.manual_seed(0)
    trained = detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, min_size=128, max_size=128)
    wake(trained, pictures, "head.classification_head.cls_logits")
    state = trained.state_dict()
    first = "backbone.body.layer1.0.bn1.running_var"
    state[first] = state[first] * 0 + 2e-5  # so small that an epsilon of 1e-5 shows
    state = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **_: dict(state))
    wanted = detection.retinanet_resnet50_fpn(
        weights=detection.RetinaNet_ResNet50_FPN_Weights.COCO_V1, min_size=128, max_size=128
    ).eval()
    detector = students.build("retinanet", class_names=["bicycle", "person", "toothbrush"], weights="coco")
    assert detector.recipe["norm"] == "frozen" and detector.recipe["head_classes"] == 91
    ours = {name: p.requires_grad for name, p in detector.model.named_parameters()}
    assert ours == {name: p.requires_grad for name, p in wanted.named_parameters()}

    students.save(detector, tmp_path / "student")
    loaded = students.load(tmp_path / "student")  # what follows from the weights must survive
    with torch.no_grad():
        theirs = wanted([pictures[0]])[0]
        found = loaded.decode(loaded(pictures[:1]), [(128, 128)])[0]
    known = (theirs["labels"] == 1) | (theirs["labels"] == 2) | (theirs["labels"] == 90)
    assert known.any()
    torch.testing.assert_close(found.boxes, theirs["boxes"][known], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.scores, theirs["scores"][known], atol=1e-4, rtol=1e-4)
    assert [[2, 1, 90][label] for label in found.labels] == theirs["labels"][known].tolist()

    with pytest.raises(ValueError, match="weights: coco knows no class 'RBC', its own are person, bicycle, car"):
        students.build("retinanet", class_names=["person", "RBC"], weights="coco")
    # a file that has the hub's name is the hub's
    path = save(state, tmp_path / "retinanet_resnet50_fpn_coco-eeacb38b.pth")
    fresh = students.build("retinanet", class_names=["RBC"], weights=path, new_head=True)
    assert fresh.head_classes == 2 and fresh.notes == [f"its class layers start anew, all else comes from {path}"]
    assert torch.equal(fresh.model.head.regression_head.bbox_reg.weight, state["head.regression_head.bbox_reg.weight"])
    assert not any(key.endswith("num_batches_tracked") for key in fresh.state_dict())
    norm = fresh.model.backbone.body.layer1[0].bn1
    assert (norm.running_var + norm.eps).tolist() == pytest.approx([2e-5] * 64)


def test_imagenet_weights_fill_the_backbone_alone(monkeypatch):
    torch.manual_seed(1)
    classifier = resnet18()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **_: classifier.state_dict())
    detector, fresh = build(weights="imagenet"), build()
    body = detector.model.backbone.body
    assert isinstance(body.bn1, FrozenBatchNorm2d)
    assert torch.equal(body.layer4[1].conv2.weight, classifier.layer4[1].conv2.weight)
    assert [body.layer1[0].conv1.weight.requires_grad, body.layer2[0].conv1.weight.requires_grad] == [False, True]
    assert all(p.requires_grad for p in fresh.parameters())  # there is nothing worth freezing


def test_a_classifiers_file_fills_the_backbone(tmp_path):
    classifier = resnet18()
    path = save(classifier.state_dict(), tmp_path / "resnet18.pth")
    body = build("fcos", weights=path, norm="batch").model.backbone.body
    assert torch.equal(body.conv1.weight, classifier.conv1.weight)


def test_a_detectors_file_fills_all_of_it(tmp_path):
    detector = build()
    path = save({"model": detector.model.state_dict()}, tmp_path / "checkpoint.pth")
    torch.manual_seed(1)
    filled = students.build("retinanet", **SMALL, weights=path)
    assert torch.equal(
        filled.model.head.classification_head.cls_logits.weight,
        detector.model.head.classification_head.cls_logits.weight,
    )
    assert filled.recipe["weights"] == "none"


def test_tensors_that_do_not_fit_are_named(tmp_path):
    state = build().model.state_dict()
    path = save(state, tmp_path / "model.pth")
    with pytest.raises(ValueError) as error:
        build(weights=path, class_names=["a", "b", "c"])
    assert str(error.value) == (
        f"weights: {path} has 2 classes, without names, here there are 3; say new_head: true to start the class layers "
        "anew"
    )
    anew = build(weights=path, class_names=["a", "b", "c"], new_head=True)
    assert torch.equal(anew.model.backbone.body.conv1.weight, state["backbone.body.conv1.weight"])
    with pytest.raises(
        ValueError,
        match=r"network: backbone.* is \(32, 128, 1, 1\), here \(64, 128, 1, 1\) and \d+ more of other shapes",
    ):
        build(weights=path, channels=64)
    fewer = {name: tensor for name, tensor in state.items() if "layer4" not in name} | {
        "backbone.body.fc.bias": state["backbone.body.bn1.bias"]
    }
    with pytest.raises(
        ValueError,
        match=r"it lacks backbone.body.layer4.0.conv1.weight \(512, 256, 3, 3\) and .* it has backbone.body.fc.bias",
    ):
        build(weights=save(fewer, tmp_path / "fewer.pth"))


def test_weights_that_cannot_be_had(monkeypatch, tmp_path):
    def unreachable(self, **_):
        raise OSError("no route to host")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", unreachable)
    with pytest.raises(
        ValueError, match=r"weights: ResNet18_Weights.IMAGENET1K_V1 cannot be fetched \(OSError\); download"
    ):
        build(weights="imagenet")
    with pytest.raises(ValueError, match="weights: torchvision has coco weights for its own backbones and widths only"):
        build(weights="coco")
    with pytest.raises(ValueError, match="weights: no file nowhere"):
        build(weights="nowhere.pth")


def test_a_backbones_weights_do_not_make_a_teacher(settings, tmp_path):
    file = save(resnet18().state_dict(), tmp_path / "resnet18.pth")
    detector = {"name": "retinanet", "backbone": "resnet18", "channels": 32, "weights": file}
    config = check_config(settings | {"teacher": {"detector": detector}}, "here")
    with pytest.raises(
        UserError, match=r"^teacher.detector.weights: .*resnet18.pth is a backbone's, so retinanet resn"
    ):
        build_teachers(config, ["a", "b"], students.build("retinanet", **SMALL))
    whole = save(build(class_names=["a", "b"]).model.state_dict(), tmp_path / "whole.pth")
    config = check_config(settings | {"teacher": {"detector": detector | {"weights": whole}}}, "here")
    teacher = build_teachers(config, ["a", "b"], students.build("retinanet", **SMALL))["teacher"]
    assert not teacher.only_backbone
