import pytest
import torch

from distill.distiller import Distiller, Lesson
from distill.terms import DenseSigmoidTerm, KnowledgeTerm, MaskedMimicTerm, PKDTerm, PseudoLabelTerm
from losses import dense_sigmoid
from teachers import Teacher, label_images, speak


class Echo(KnowledgeTerm):
    """Its loss is the sum of the teacher's features."""

    def forward(self, student, teacher, targets, image_size):
        return student.features[0].sum() * 0 + teacher.features[0].sum()


@pytest.fixture
def student(build_tiny):
    return build_tiny().eval()


@pytest.fixture
def teacher(build_tiny):
    """Sure enough of something everywhere."""
    teacher = build_tiny(seed=1, channels=24)
    torch.nn.init.constant_(teacher.head.class_logits.bias, 1.0)
    return Teacher(teacher)


def test_each_loss_hears_its_own_teacher(student, teacher, build_tiny, images, targets):
    coarse = Teacher(build_tiny(seed=2, levels=(4, 5)))
    terms = {"a": Echo(student, teacher.detector), "b": Echo(student, coarse.detector)}
    unit = Distiller(student, terms, taught_by={"a": "big", "b": "coarse"})
    teachers = {"big": teacher, "coarse": coarse}
    unit.bind({name: t.detector for name, t in teachers.items()})
    lessons = unit.ask(teachers, images, targets)
    assert list(lessons) == ["big", "coarse"] and lessons["big"].targets is targets
    _, values, _ = unit.losses(images, targets, lessons)
    assert values["a"].item() == pytest.approx(teacher(images).features[0].sum().item(), rel=1e-5)
    assert values["b"].item() == pytest.approx(coarse(images).features[0].sum().item(), rel=1e-5)

    unit.combiner.weights["a"] = 0.0
    lessons = unit.ask(teachers, images, targets)
    assert list(lessons) == ["coarse"]  # nobody listens to the other
    assert unit.losses(images, targets, lessons)[1]["a"] == 0
    assert Distiller(student).ask(teachers, images, targets) == {}


def test_the_task_counts_labelled_images_only(student, images, targets):
    output, unit = student(images), Distiller(student)
    alone = sum(student.loss(student(images[:1]), targets[:1]).values())
    torch.testing.assert_close(unit.task_loss(output, [targets[0], None]), alone)
    assert torch.equal(unit.task_loss(output, targets), sum(student.loss(output, targets).values()))


def test_without_labels_there_is_no_task_and_all_parameters_stay_in_step(student, images):
    loss = Distiller(student).task_loss(student(images), [None, None])
    assert loss == 0
    loss.backward()
    assert [n for n, p in student.named_parameters() if p.grad is None or bool(p.grad.any())] == []


def test_detections_stand_in_where_a_loss_goes_by_boxes(student, teacher, images, targets):
    half = [targets[0], None]
    seen = label_images(teacher.detector, teacher(images), (64, 64), 0.5)
    assert all(len(target["labels"]) for target in seen)

    def lesson(term, **settings):
        unit = Distiller(student, {"it": term(student, teacher.detector)}, **settings)
        return unit.ask({"teacher": teacher}, images, half)["teacher"].targets

    first, second = lesson(MaskedMimicTerm, score_threshold=0.5)
    assert first is targets[0]
    assert torch.equal(second["boxes"], seen[1]["boxes"]) and torch.equal(second["labels"], seen[1]["labels"])
    assert len(lesson(MaskedMimicTerm, score_threshold=1.0)[1]["boxes"]) == 0
    assert lesson(PKDTerm)[1]["boxes"].shape == (0, 4)  # nobody asks for boxes, so none are looked for


def test_classes_that_a_teacher_does_not_know_are_left_to_others(build_tiny, teacher, images, targets):
    student = build_tiny(class_names=["b", "new", "a"]).eval()
    before = teacher(images)
    speak(teacher.detector, student.class_names)
    terms = {"soft": DenseSigmoidTerm(student, teacher.detector), "pseudo": PseudoLabelTerm(student, teacher.detector)}
    unit = Distiller(student, terms)
    lessons = unit.ask({"teacher": teacher}, images, targets)
    assert lessons["teacher"].unknown == (1,)
    output = student(images)
    _, values, _ = unit.losses(images, targets, lessons)
    common = dense_sigmoid([x[:, [2, 0]] for x in output.class_logits], before.class_logits)
    torch.testing.assert_close(values["soft"], common)
    sum(values.values()).backward()
    assert not student.head.class_logits.weight.grad[1].any() and not student.head.class_logits.bias.grad[1].any()
    assert student.head.class_logits.bias.grad[0] != 0 and student.head.class_logits.bias.grad[2] != 0


def test_a_lesson_without_gaps_is_used_as_it_is(student, teacher, images, targets):
    unit = Distiller(student, {"it": DenseSigmoidTerm(student, teacher.detector)})
    asked = unit.ask({"teacher": teacher}, images, targets)
    given = {"teacher": Lesson(teacher(images), targets)}
    assert torch.equal(unit(images, targets, asked)[0], unit(images, targets, given)[0])
