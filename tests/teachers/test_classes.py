import pytest
import torch
from torch import nn

import students
from students import DenseOutput
from teachers import speak


@pytest.fixture
def sure(build_tiny):
    """A detector of classes a and b that sees both everywhere."""
    detector = build_tiny().eval()
    nn.init.constant_(detector.head.class_logits.bias, 1.0)
    return detector


@torch.no_grad()
def test_scores_move_to_the_new_labels_and_nothing_else_changes(sure, images, tmp_path):
    before = sure(images)
    found = sure.decode(before, [(64, 64)] * 2)
    speak(sure, ["b", "new", "a"])
    after = sure(images)
    for old, new in zip(before.class_logits, after.class_logits):
        torch.testing.assert_close(new[:, [2, 0]], old)
        assert torch.equal(new[:, 1].sigmoid(), torch.zeros_like(new[:, 1]))
    assert all(map(torch.equal, before.features + before.box_distances, after.features + after.box_distances))
    assert (sure.class_names, sure.unknown) == (["b", "new", "a"], (1,))
    for old, new in zip(found, sure.decode(after, [(64, 64)] * 2)):
        torch.testing.assert_close(new.scores, old.scores)
        assert torch.equal(new.labels, torch.tensor([2, 0])[old.labels])
    # recipe and tensors still belong together
    students.save(sure, tmp_path / "saved")
    assert all(map(torch.equal, students.load(tmp_path / "saved")(images).class_logits, after.class_logits))


@torch.no_grad()
def test_a_map_renames_and_leaves_out(sure, images):
    before = sure(images).class_logits[0]
    speak(sure, ["x", "a"], {"b": "x", "a": None})
    after = sure(images).class_logits[0]
    torch.testing.assert_close(after[:, 0], before[:, 1])
    assert sure.unknown == (1,) and bool((after[:, 1] == -1e4).all())


def test_its_own_classes_leave_it_as_it_is(sure):
    weight = sure.head.class_logits.weight
    speak(sure, ["a", "b"])
    assert sure.head.class_logits.weight is weight and sure.unknown == ()
    speak(sure, ["A", "b"], {"a": "A"})
    assert sure.head.class_logits.weight is weight and sure.class_names == ["A", "b"]


def test_every_anchor_has_its_rows(sure):
    sure.anchors, sure.head.class_logits = 2, nn.Conv2d(16, 4, 1)
    sure.head.class_logits.bias.data = torch.tensor([1.0, 2, 3, 4])  # a and b of the first anchor, then of the second
    speak(sure, ["b", "c", "a"])
    assert sure.head.class_logits.bias.tolist() == [2, -1e4, 1, 4, -1e4, 3]


def test_maps_that_make_no_sense_are_refused(sure, monkeypatch):
    with pytest.raises(ValueError, match=r"class_map: it has no class 'c'; it has a, b"):
        speak(sure, ["a"], {"c": "a"})
    with pytest.raises(
        ValueError, match=r"class_map.b: 'disk' is not a class of the student \(did you mean 'disc'\?\)"
    ):
        speak(sure, ["disc", "a"], {"b": "disk"})
    with pytest.raises(ValueError, match=r"class_map: both 'a' and 'b' become 'a'; .* map one of them to null"):
        speak(sure, ["a"], {"b": "a"})
    monkeypatch.setattr(type(sure), "class_layers", ())
    with pytest.raises(ValueError, match="class_map: the class layers of a DenseDetector are not known"):
        speak(sure, ["a"])


def test_hidden_classes_are_impossible_and_learn_nothing(sure):
    sure.anchors = 2
    logits = torch.zeros(1, 4, 1, 1, requires_grad=True)  # two anchors, two classes
    output = DenseOutput((), (logits,), ())
    assert sure.hide_classes(output, ()) is output
    hidden = sure.hide_classes(output, (1,)).class_logits[0]
    assert hidden.flatten().tolist() == [0, -1e4, 0, -1e4]
    hidden.sum().backward()
    assert logits.grad.flatten().tolist() == [1, 0, 1, 0]


def test_what_torchvisions_losses_read_is_hidden_too():
    student = students.build(name="fcos", class_names=["a", "b"], backbone="resnet18", channels=32).train()
    images = torch.rand(2, 3, 160, 160)
    output = student.hide_classes(student(images), (0,))
    target = {"boxes": torch.tensor([[20.0, 20, 90, 90]]), "labels": torch.tensor([1])}
    student.loss(output, [target] * 2)["classification"].backward()
    (layer,) = student.class_layers
    assert not layer.weight.grad[student.class_channels[0]].any() and layer.weight.grad[student.class_channels[1]].any()
