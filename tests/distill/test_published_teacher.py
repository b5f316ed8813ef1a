"""Teachers with published weights whose classes are others than the student's."""

import pytest
import torch

import students
from distill.config import check_config
from distill.errors import UserError
from distill.factory import build_teachers

CLASSES = ["disc", "ring"]
SMALL = {"backbone": "resnet18", "channels": 32}


@pytest.fixture
def build_teacher(settings, tmp_path):
    """Saves a small RetinaNet as others publish theirs, with or without names, and has it teach `CLASSES`."""

    def build(known, names=None, losses=None, **changes):
        torch.manual_seed(0)
        network = students.build("retinanet", class_names=known, **SMALL)
        beside = {"names": names} if names else {}
        torch.save({"model": network.model.state_dict()} | beside, tmp_path / "model.pth")
        detector = {"name": "retinanet", "weights": str(tmp_path / "model.pth"), **SMALL}
        config = check_config(settings | {"teacher": {"detector": detector} | changes, "losses": losses or {}}, "here")
        student = students.build("retinanet", class_names=CLASSES, **SMALL)
        return network.eval(), build_teachers(config, CLASSES, student)["teacher"].eval()

    return build


def class_scores(detector):
    """(B, N, K) of all candidates."""
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return detector.candidates(detector(images))[1]


def test_classes_are_found_by_name_and_the_rest_left_out(build_teacher):
    known = ["cat", "ring", "dog"]
    network, teacher = build_teacher(known, names=known)
    assert teacher.class_names == CLASSES and teacher.unknown == (0,)
    assert torch.equal(class_scores(teacher)[..., 1], class_scores(network)[..., 1])
    assert class_scores(teacher)[..., 0].max() == 0


def test_a_map_gives_them_other_names(build_teacher):
    known = ["cat", "ring", "dog"]
    network, teacher = build_teacher(known, names=dict(enumerate(known)), class_map={"dog": "disc", "ring": None})
    assert teacher.unknown == (1,)
    assert torch.equal(class_scores(teacher)[..., 0], class_scores(network)[..., 2])


def test_weights_without_names_know_as_many_classes_in_their_order_or_others_by_number(build_teacher):
    network, teacher = build_teacher(["a", "b"])
    assert teacher.unknown == () and torch.equal(class_scores(teacher), class_scores(network))
    network, teacher = build_teacher(["a", "b"], class_map={"0": "ring", "1": "disc"})
    assert teacher.unknown == () and torch.equal(class_scores(teacher), class_scores(network).flip(2))
    network, teacher = build_teacher(["a", "b", "c"], class_map={"2": "disc"})
    assert teacher.unknown == (1,)
    assert torch.equal(class_scores(teacher)[..., 0], class_scores(network)[..., 2])
    _, teacher = build_teacher(["a", "b", "c"])
    assert teacher.unknown == (0, 1)  # it may teach by its features


def test_what_the_map_cannot_mean(build_teacher):
    with pytest.raises(UserError, match=r"^teacher\.class_map: it has no class '7'; it has 0, 1, 2$"):
        build_teacher(["a", "b", "c"], class_map={"7": "disc"})
    with pytest.raises(UserError, match=r"^teacher\.class_map: it has no class 'cow'.*it has cat, dog"):
        build_teacher(["cat", "dog"], names=["cat", "dog"], class_map={"cow": "disc"})


def test_a_new_head_has_nothing_to_teach_with(settings):
    detector = {"name": "retinanet", "weights": "coco", "new_head": True}
    with pytest.raises(UserError, match=r"new_head starts the class layers of its detector anew, .*leave new_head out"):
        check_config(settings | {"teacher": {"detector": detector}}, "here")


def test_a_detector_that_only_teaches_is_not_to_be_trained_first(settings):
    with pytest.raises(UserError, match=r"train is missing, and dfine .* detects nothing yet; give the weights of a"):
        check_config(settings | {"teacher": {"detector": {"name": "dfine", "size": "n"}}}, "here")
