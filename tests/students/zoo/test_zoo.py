"""libreyolo's networks behind our adapters: what they say, learn and lose is what libreyolo's own do."""

import importlib.util
import math
import sys
from types import SimpleNamespace

import pytest
import torch

import students
from distill import factory
from distill.config import check_config
from distill.distiller import Distiller, Lesson
from distill.errors import UserError
from distill.measure import count_parameters
from distill.pruning.budget import make_plan
from distill.pruning.graph import find_groups
from distill.terms import TERMS
from students.assignment import Objects
from students.plan import apply_plan, named_tensors
from students.zoo.yolov9 import soft_losses as soft_yolov9_losses
from students.zoo.yolox import soft_losses as soft_yolox_losses
from teachers import speak

SMALLEST = {"yolox": "n", "yolov9": "t", "dfine": "n"}
installed = pytest.mark.skipif(
    importlib.util.find_spec("libreyolo") is None, reason="libreyolo, of the extra [zoo], is not installed"
)


def small(family, seed=0, **changes):
    torch.manual_seed(seed)
    return students.build(family, **{"class_names": ["a", "b"], "size": SMALLEST[family]} | changes)


@torch.no_grad()
def shake(detector):
    """As if it had been trained: fresh heads say the same of all places."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in detector.state_dict().items():
        if name.endswith("running_var") or (name.endswith("weight") and tensor.dim() == 1):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif name.endswith(("running_mean", "bias")):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return detector.eval()


@pytest.fixture(params=SMALLEST)
def family(request):
    return request.param


@pytest.mark.parametrize("family", SMALLEST)
def test_without_the_extra_it_is_one_line(family, monkeypatch, settings):
    monkeypatch.setitem(sys.modules, "libreyolo", None)
    for name in [name for name in sys.modules if name.startswith("libreyolo.")]:
        monkeypatch.delitem(sys.modules, name)
    config = check_config(settings | {"student": {"name": family}, "teacher": None, "losses": {}}, "here")
    with pytest.raises(UserError, match=r"^student.name: .* not installed .*; python -m pip install -e '.\[zoo\]'$"):
        factory.build_student(config, ["a"])


@installed
def test_a_size_that_does_not_exist_is_refused(family):
    with pytest.raises(ValueError, match="size: 'q' does not exist; choose"):
        small(family, size="q")


@installed
def test_yolox_detects_what_libreyolo_detects(images):
    from libreyolo.postprocess.yolox import postprocess

    detector = shake(small("yolox"))
    with torch.no_grad():
        # blue first and up to 255, as its own preprocessing has it
        raw = detector.network((images * 255).flip(1))
        found = postprocess([level[:1].clone() for level in raw], 0.3, 0.5, 64, (64, 64))
        boxes, scores = detector.candidates(detector(images))
    sides = torch.tensor(found["boxes"])
    best, own = scores[0].max(dim=-1), boxes[0].clamp(0, 64)
    assert found["num_detections"] > 3
    for box, score, label in zip(sides, found["scores"], found["classes"]):
        nearest = (own - box).abs().amax(dim=-1).argmin()
        torch.testing.assert_close(own[nearest], box, atol=1e-3, rtol=1e-4)
        assert float(best.values[nearest]) == pytest.approx(float(score), abs=1e-5)
        assert int(best.indices[nearest]) == int(label)


@installed
def test_yolov9_detects_what_libreyolo_detects(images):
    detector = shake(small("yolov9"))
    with torch.no_grad():
        theirs = detector.network(images)["predictions"].mT
        boxes, scores = detector.candidates(detector(images))
    torch.testing.assert_close(boxes, theirs[..., :4], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(scores, theirs[..., 4:], atol=1e-5, rtol=1e-4)


@installed
def test_dfine_detects_what_libreyolo_detects():
    from libreyolo.postprocess.dfine import postprocess

    detector = shake(small("dfine"))
    images = torch.rand(2, 3, 256, 320, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        raw = detector.network(images)
        ours = detector.decode(detector(images), [(256, 320)] * 2)
    theirs = postprocess({key: raw[key][:1] for key in ("pred_logits", "pred_boxes")}, 0.01, 0.5, (320, 256), 100)
    assert len(ours[0].scores) == 100
    torch.testing.assert_close(ours[0].scores, torch.as_tensor(theirs["scores"]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours[0].boxes, torch.as_tensor(theirs["boxes"]).float(), atol=1e-2, rtol=1e-4)


@installed
@pytest.mark.parametrize("family", ["yolox", "yolov9"])
def test_losses_are_libreyolos(family, images, targets):
    detector = small(family)
    shake(detector).train()
    labels = torch.zeros(2, 2, 5)
    labels[0, :, 0], boxes = targets[0]["labels"], targets[0]["boxes"]
    if family == "yolox":  # centres and sides in pixels
        labels[0, :, 1:] = torch.cat(((boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]), dim=1)
        names = {"classification": "cls_loss", "objectness": "obj_loss", "box": "iou_loss"}
    else:  # corners as shares of the image
        labels[0, :, 1:] = boxes / 64
        names = {"classification": "cls_loss", "box": "box_loss", "distribution": "dfl_loss"}
    theirs = detector.network(detector.prepare(images), labels)
    ours = detector.loss(detector(images), targets)
    assert ours.keys() == names.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[names[name]], atol=1e-4, rtol=1e-4)
    sum(ours.values()).backward()
    assert all(p.grad.isfinite().all() for p in detector.parameters())
    # of images without objects, too
    empty = detector.loss(detector(images), [targets[1]] * 2)
    assert all(value.isfinite() for value in empty.values()) and empty["box"] == 0


@installed
@pytest.mark.parametrize("family", ["yolox", "yolov9"])
def test_objects_ask_for_as_much_as_their_score(family, images, targets):
    detector = small(family)
    shake(detector).train()
    output = detector(images)
    scored = lambda *s: [t | {"scores": torch.tensor(x)} for t, x in zip(targets, (s, ()))]  # noqa: E731
    true, sure, half = (detector.loss(output, t) for t in (targets, scored(1.0, 1.0), scored(0.5, 0.5)))
    for name, value in true.items():
        torch.testing.assert_close(sure[name], value, atol=1e-5, rtol=1e-5)
        if name in ("box", "distribution") or (family, name) == ("yolox", "classification"):
            torch.testing.assert_close(half[name], value / 2)
        assert half[name] != value
    scores = torch.tensor([0.3, 0.8], requires_grad=True)
    sum(detector.loss(output, [targets[0] | {"scores": scores}, targets[1]]).values()).backward()
    assert scores.grad is None and all(p.grad.isfinite().all() for p in detector.parameters())
    nothing = [targets[1] | {"scores": torch.zeros(0)}] * 2
    output = detector(images)
    empty, wanted = detector.loss(output, nothing), detector.loss(output, [targets[1]] * 2)
    for name, value in wanted.items():
        torch.testing.assert_close(empty[name], value)
    detector.zero_grad()
    sum(empty.values()).backward()
    assert all(p.grad is not None for p in detector.parameters())


def test_yolox_soft_losses_by_hand():
    # an object of score 0.3 and class 1 has the first of two cells; one of score 0 has none
    boxes = torch.tensor([[[0.0, 0, 8, 8], [0, 0, 8, 8]]])
    objects = Objects(boxes, torch.tensor([[1, 0]]), torch.tensor([[0.3, 0.0]]), torch.tensor([[True, True]]))
    asked = []

    def get_assignments(image, number, wanted, labels, *others):
        asked.append((image, number, wanted.tolist(), labels.tolist()))
        return labels, torch.tensor([True, False]), torch.tensor([0.75]), torch.tensor([0]), 1

    head = SimpleNamespace(get_assignments=get_assignments, iou_loss=lambda said, wanted: torch.tensor([0.5]))
    objectness = torch.tensor([[[math.log(3)], [0.0]]], requires_grad=True)
    said = (torch.zeros(1, 2, 4), objectness, torch.tensor([[[0.0, math.log(3)], [5.0, 5.0]]]))
    losses = soft_yolox_losses(head, said, objects, torch.zeros(2, 1, 2), torch.tensor([8.0, 8.0]))
    assert asked == [(0, 1, [[4.0, 4.0, 8.0, 8.0]], [1.0])]
    # the classes of an object that is there: 0 at 1/2, and the IoU of 3/4 at 3/4
    classes = math.log(2) + 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert losses["classification"].item() == pytest.approx(0.3 * classes)
    assert losses["objectness"].item() == pytest.approx(0.3 * math.log(4 / 3) + 0.7 * math.log(4) + math.log(2))
    assert losses["box"].item() == pytest.approx(5 * 0.3 * 0.5)
    losses["objectness"].backward()
    assert objectness.grad.flatten().tolist() == pytest.approx([0.75 - 0.3, 0.5])  # gone where the score is reached


def test_yolov9_soft_losses_by_hand():
    # of three cells of two classes one is the second object's, of score 0.25, one the first's, of 0.5
    wanted = torch.tensor([[[0.0, 0.8, 8, 8, 16, 16], [0.5, 0, 0, 0, 8, 8], [0, 0, 0, 0, 8, 8]]])
    assigned, asked = torch.tensor([[True, True, False]]), []

    def box_loss(said, wanted_boxes, assigned, weight, divisor):
        asked.append((said[0, 0].tolist(), wanted_boxes[0, 0].tolist(), assigned[0].tolist()))
        return weight.sum() / divisor

    compute = SimpleNamespace(
        vec2box=lambda said: (torch.zeros(1, 3, 2), None, torch.full((1, 3, 4), 4.0)),
        matcher=lambda targets, said, return_indices: (wanted, assigned, torch.tensor([[1, 0, 0]])),
        cls_loss=lambda said, wanted, divisor: (wanted * torch.tensor([1.0, 10])).sum() / divisor,
        box_loss=box_loss,
        dfl_loss=lambda edges, *others: box_loss(torch.zeros(1, 1), others[0], *others[2:]),
        cls_weight=0.5,
        box_weight=7.5,
        dfl_weight=1.5,
    )
    compute.vec2box.scaler, compute.vec2box.anchor_grid = torch.tensor([8.0, 8, 8]), torch.zeros(3, 2)
    objects = Objects(torch.zeros(1, 2, 4), torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]]), torch.ones(1, 2) > 0)
    losses = soft_yolov9_losses(compute, [], objects)
    # 0.8 * 0.25 of the second class and 0.5 * 0.5 of the first, over 0.8 + 0.5
    assert losses["classification"].item() == pytest.approx(0.5 * (10 * 0.2 + 0.25) / 1.3)
    assert losses["box"].item() == pytest.approx(7.5 * 0.45 / 1.3)
    assert losses["distribution"].item() == pytest.approx(1.5 * 0.45 / 1.3)
    assert asked[0] == ([0.5] * 4, [1.0, 1, 2, 2], [True, True, False])  # in strides


@installed
@pytest.mark.parametrize("family", ["yolox", "yolov9"])
def test_channels_that_nothing_reads_can_go(family, tmp_path, images, targets):
    """Where what reads a channel is zero, cutting the channel changes no output."""
    detector = shake(small(family))
    unit = Distiller(detector)
    groups, tensors = find_groups(unit, (64, 64)), named_tensors(unit)
    cut = {(member.name, member.dim) for group in groups for member in group.members}
    kept = {f"student.{name}.weight" for name, module in detector.named_modules() if module in detector.output_layers}
    own = {f"student.{name}" for name, x in detector.named_parameters() if x.dim() == 4}
    whole = {name for name in own if (name, 0) not in cut} - kept
    grouped = {f"student.network.head.cv2.{level}.{layer}.conv.weight" for level in range(3) for layer in range(2)}
    assert whole == (grouped if family == "yolov9" else set())

    generator = torch.Generator().manual_seed(1)
    scores = [torch.rand(group.width, generator=generator) for group in groups]
    plan = make_plan(groups, scores, [group.width // 2 for group in groups], tensors)
    before = count_parameters(detector)
    with torch.no_grad():
        for part in plan.cuts:
            gone = [index for index in range(part.width) if index not in set(part.keep)]
            for name, dim in part.slices:
                if dim == 1:
                    tensors[name].index_fill_(dim, torch.tensor(gone), 0)
        wanted = detector(images)
        apply_plan([(unit, plan)])
        found = detector(images)
    assert count_parameters(detector) < 0.4 * before
    for ours, theirs in zip(found[1:], wanted[1:]):
        for x, y in zip(ours, theirs):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)

    detector.plans.append(plan.below("student."))
    students.save(detector, tmp_path / "student")
    loaded = students.load(tmp_path / "student")
    with torch.no_grad():
        assert all(map(torch.equal, loaded(images).class_logits, found.class_logits))
    output = detector.train()(images)
    assert [x.shape[1] for x in output.features] == list(detector.feature_channels)
    sum(detector.loss(output, targets).values()).backward()
    assert all(p.grad.shape == p.shape for p in detector.parameters())


@installed
def test_it_is_saved_and_rebuilt(family, tmp_path, images):
    detector = shake(small(family)).eval()
    students.save(detector, tmp_path / "saved")
    loaded = students.load(tmp_path / "saved")
    with torch.no_grad():
        (boxes, scores), (found, sure) = detector.candidates(detector(images)), loaded.candidates(loaded(images))
    assert torch.equal(boxes, found) and torch.equal(scores, sure)


@installed
def test_weights_by_path_are_complete_and_by_class_name(family, tmp_path, images):
    many = shake(small(family, class_names=["x", "b", "a"]))
    network = many.network
    file = tmp_path / "published.pt"
    content = {"model": network.state_dict(), "names": {0: "x", 1: "b", 2: "a"}, "nc": 3, "size": SMALLEST[family]}
    if family == "dfine":  # files of a fixed size hold its grid
        content["model"] |= {"decoder.anchors": torch.zeros(1, 5, 4), "decoder.valid_mask": torch.ones(1, 5, 1)}
    torch.save(content, file)
    few = small(family, seed=1, weights=str(file)).eval()
    with torch.no_grad():
        (_, wanted), (_, found) = many.candidates(many(images)), few.candidates(few(images))
    if family == "dfine":  # which of its queries are chosen goes by the classes that there are
        assert torch.equal(
            few.network.decoder.dec_score_head[-1].weight, network.decoder.dec_score_head[-1].weight[[2, 1]]
        )
    else:
        torch.testing.assert_close(found, wanted[..., [2, 1]])
    del content["model"][next(iter(content["model"]))]
    torch.save(content, file)
    with pytest.raises(ValueError, match=r"published.pt is of another network: it lacks"):
        small(family, weights=str(file))


@installed
def test_it_teaches_a_student_of_ours(family, build_tiny, images, targets):
    teacher, student = shake(small(family)).requires_grad_(False), build_tiny()
    names = {"pkd", "pseudo_label", "attention_transfer"} | (
        {"dense_sigmoid", "box_mimic"} if teacher.anchors else set()
    )
    unit = Distiller(student, {name: TERMS[name](student, teacher) for name in sorted(names)})
    unit.bind({"teacher": teacher})
    speak(teacher, ["b", "a"])
    with torch.no_grad():
        lesson = Lesson(teacher(images), targets)
    _, terms, _ = unit.losses(images, targets, {"teacher": lesson})
    assert all(value.isfinite() for value in terms.values())
    sum(terms.values()).backward()
    assert student.backbone.body.conv1[0].weight.grad.abs().sum() > 0


@installed
def test_it_stays_in_eval_mode_where_training_would_change_it(images):
    teacher = small("dfine").train()
    assert not teacher.network.decoder.training and not teacher.learns
    with torch.no_grad():
        first, again = teacher(images), teacher(images)
    assert torch.equal(first.boxes[0], again.boxes[0])
