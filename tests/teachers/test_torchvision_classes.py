import pytest
import torch

import students
from distill.terms import DenseSigmoidTerm, PseudoLabelTerm
from teachers import Teacher, speak

SMALL = {
    "fcos": {"backbone": "resnet18", "channels": 32, "head_depth": 1},
    "retinanet": {"backbone": "resnet18", "channels": 32},
    "faster_rcnn": {"backbone": "resnet18", "channels": 32},
    "ssdlite320": {},
}


@pytest.fixture(params=SMALL)
def build(request):
    """Builds a small detector of one of torchvision's families for the classes a, b and c; it sees all of them."""

    def build():
        torch.manual_seed(0)
        detector = students.build(request.param, class_names=["a", "b", "c"], **SMALL[request.param]).eval()
        for layer in detector.class_layers:
            torch.nn.init.normal_(layer.weight, std=1 / layer.weight[0].numel())
            torch.nn.init.zeros_(layer.bias)
        return detector

    return build


def detections(detector, output):
    """What is found on each image as rows of class name, score and box, in no order."""
    with torch.no_grad():
        found = detector.decode(output, [(128, 128)] * 2)
    return [
        {
            (detector.class_names[label], round(score, 5), *(round(x, 2) for x in box))
            for box, score, label in zip(one.boxes.tolist(), one.scores.tolist(), one.labels.tolist())
        }
        for one in found
    ]


@torch.no_grad()
def test_what_is_found_keeps_its_name_and_what_is_new_is_never_found(build, tmp_path):
    detector = build()
    pictures = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    before = detector(pictures)
    found = detections(detector, before)
    assert {name for image in found for name, *_ in image} >= {"a", "b"}
    speak(detector, ["c", "new", "a", "other"], {"b": "other", "a": "a"})
    assert (detector.unknown, detector.class_names) == ((1,), ["c", "new", "a", "other"])
    after = detector(pictures)
    assert detections(detector, after) == [
        {("other" if name == "b" else name, *rest) for name, *rest in image} for image in found
    ]
    if "class_logits" in before._fields:
        for old, new in zip(before.class_logits, after.class_logits):
            old, new = (x.unflatten(1, (-1, classes)) for x, classes in ((old, 3), (new, 4)))
            torch.testing.assert_close(new[:, :, [2, 3, 0]], old)
            assert not new[:, :, 1].sigmoid().any()
    # recipe and tensors still belong together
    students.save(detector, tmp_path / "saved")
    again = students.load(tmp_path / "saved")
    assert detections(again, again(pictures)) == detections(detector, after)


@torch.no_grad()
def test_classes_that_are_left_out_do_not_become_others(build):
    detector = build()
    pictures = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    output = detector(pictures)
    speak(detector, ["b"])
    assert detector.unknown == ()
    logits = detector(pictures)
    if "class_logits" in output._fields:
        for old, new in zip(output.class_logits, logits.class_logits):
            torch.testing.assert_close(new, old.unflatten(1, (-1, 3))[:, :, 1])
    else:
        boxes = [torch.tensor([[4.0, 4, 60, 60]])] * 2
        ours, theirs = detector.roi(logits.features, boxes), build().roi(output.features, boxes)
        # the softmax still runs over all classes of the head, but the two that are left out have no column
        torch.testing.assert_close(ours.class_logits, theirs.class_logits[:, [1, 3]])
        torch.testing.assert_close(ours.box_deltas, theirs.box_deltas[:, 4:8])


def test_such_a_teacher_teaches_a_student_of_another_family(build, build_tiny):
    student, teacher = build_tiny(class_names=["new", "a"], levels=(5,)), build()
    speak(teacher, student.class_names)
    pictures = torch.rand(2, 3, 128, 128)
    lesson, output = Teacher(teacher)(pictures), student(pictures)
    kind = DenseSigmoidTerm if teacher.anchors == student.anchors else PseudoLabelTerm
    term = kind(student, teacher)
    loss = term(student.hide_classes(output, teacher.unknown), lesson, [], (128, 128))
    assert loss.isfinite()
    gradients = torch.autograd.grad(loss, student.head.class_logits.bias)[0]
    assert gradients[1] != 0


def test_new_classes_leave_all_but_the_class_layers(build):
    detector = build()
    renewed = students.renew_classes(detector, ["x", "y"])
    assert renewed.class_names == ["x", "y"] and renewed.notes[-1] == "its class layers start anew"
    anew, own = set(renewed.class_tensors), renewed.state_dict()
    assert anew >= {"class_channels"} and len(anew) >= 3
    for name, tensor in detector.state_dict().items():
        assert (name in anew) or torch.equal(own[name], tensor), name
    assert renewed.class_channels.tolist() == [1, 2] and renewed.head_classes == 3
    assert not torch.equal(detector.class_layers[0].weight[:2], renewed.class_layers[0].weight[:2])
