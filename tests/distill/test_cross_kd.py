import copy

import pytest
import torch
from torch import nn

from distill.terms import CrossKDTerm
from losses import align_statistics, box_mimic, dense_sigmoid, localization_distillation
from students.dense import HEADS


@pytest.fixture
def pair(build_tiny):
    student = build_tiny(head_depth=2)
    teacher = build_tiny(seed=1, head_depth=3, channels=24).eval().requires_grad_(False)
    return student, teacher


@pytest.mark.parametrize("head", HEADS)
def test_a_student_is_at_zero_distance_from_itself(build_tiny, images, head):
    detector = build_tiny(head_depth=2, head=head).eval()
    output = detector(images)
    # equal widths: the adapters start as the identity, and the statistics are the teacher's already
    assert CrossKDTerm(detector, detector)(output, output, [], (64, 64)).item() == pytest.approx(0, abs=1e-5)


def test_features_cross_over_after_the_depth(pair, images):
    student, teacher = pair
    ours, theirs = student.eval()(images), teacher(images)
    term = CrossKDTerm(student, teacher, levels=["P4"], depth=2, class_weight=0.5, box_weight=3.0)
    with torch.no_grad():
        logits, boxes, wanted = [], [], []
        head, other = student.head, teacher.head
        x, y = ours.features[1], theirs.features[1]
        # by hand: two convolutions of either head, the student's map in the teacher's width and statistics ...
        for n in range(2):
            x = head.class_tower[n].norms[1](head.class_tower[n].conv(torch.relu(x) if n else x))
            y = other.class_tower[n].norms[1](other.class_tower[n].conv(torch.relu(y) if n else y))
        x = torch.relu(align_statistics(term.adapters["class_tower"](x), y))
        # ... and the rest of the teacher's
        x = torch.relu(other.class_tower[2].norms[1](other.class_tower[2].conv(x)))
        logits = dense_sigmoid([other.class_logits(x)], [theirs.class_logits[1]])
        begun = head.begin(ours.features[1], 1, 2)[1], other.begin(theirs.features[1], 1, 2)[1]
        crossed = align_statistics(term.adapters["box_tower"](begun[0]), begun[1])
        distances = other.finish(begun[1], crossed, 1, 2)[1]
        around = [torch.cat((-d[:, :2], d[:, 2:]), 1).movedim(1, -1) for d in (distances, theirs.box_distances[1])]
        boxes = box_mimic(*around, theirs.class_logits[1].sigmoid().amax(dim=1))
        wanted = 0.5 * logits + 3 * boxes
    torch.testing.assert_close(term(ours, theirs, [], (64, 64)), wanted)


@torch.no_grad()
def test_distributions_are_compared_by_their_divergence(build_tiny, images):
    student, teacher = build_tiny(head="gfl").eval(), build_tiny(seed=1, head="gfl", channels=24).eval()
    ours, theirs = student(images), teacher(images)
    term = CrossKDTerm(student, teacher, levels=["P5"])
    begun, wanted = student.head.begin(ours.features[2], 2, 1), teacher.head.begin(theirs.features[2], 2, 1)
    crossed = [align_statistics(adapter(x), y) for adapter, x, y in zip(term.adapters.values(), begun, wanted)]
    logits, _, bins = teacher.head.finish(*crossed, 2, 1)
    edges = [x.unflatten(1, (4, 17)).permute(0, 3, 4, 1, 2) for x in (bins, theirs.box_logits[2])]
    # the authors sum over the 17 bins, at a temperature of 1, and weight that by 4
    divergence = 17 * localization_distillation(*edges, theirs.class_logits[2].sigmoid().amax(dim=1), temperature=1.0)
    classes = dense_sigmoid([logits], [theirs.class_logits[2]])
    torch.testing.assert_close(term(ours, theirs, [], (64, 64)), classes + 4 * divergence)


def test_the_students_own_predictions_learn_nothing(pair, images):
    student, teacher = pair
    CrossKDTerm(student, teacher)(student(images), teacher(images), [], (64, 64)).backward()
    assert student.head.class_logits.weight.grad is None and student.head.box_distances.weight.grad is None
    assert student.head.class_tower[0].conv.weight.grad.abs().sum() > 0
    assert student.head.class_tower[1].conv.weight.grad is None  # depth 1 of 2 and 3


def test_neither_detector_is_a_part_of_it_and_copies_stay_together(pair):
    student, teacher = pair
    term = CrossKDTerm(student, teacher)
    assert {name.partition(".")[0] for name in term.state_dict()} == {"adapters"}
    both = copy.deepcopy(nn.ModuleDict({"student": student, "term": term}))
    assert both["term"]._heads[0] is both["student"].head


def test_what_it_cannot_work_on_is_refused(pair, build_tiny):
    student, teacher = pair
    with pytest.raises(ValueError, match=r"depth: 3 is too deep; the student's head has 2 .* the teacher's 3"):
        CrossKDTerm(student, teacher, depth=3)
    other = build_tiny()
    other.head = nn.Identity()
    with pytest.raises(ValueError, match="the student has TaskAlignedHead, the teacher none; choose dense_sigmoid"):
        CrossKDTerm(student, other)
    with pytest.raises(ValueError, match="the student has none, the teacher none"):
        CrossKDTerm(other, other)
    # equally many predictions, yet their layers do not fit
    with pytest.raises(ValueError, match="of its kind; the student has GFLHead, the teacher TaskAlignedHead"):
        CrossKDTerm(build_tiny(head="gfl"), build_tiny())


def test_a_trained_teacher_takes_the_place_of_the_untrained(pair, build_tiny, images):
    student, teacher = pair
    trained = build_tiny(seed=2, head_depth=3, channels=24).eval()
    term, fresh = CrossKDTerm(student, teacher), CrossKDTerm(student, trained)
    term.bind(student, trained)
    fresh.load_state_dict(term.state_dict())
    ours, theirs = student.eval()(images), trained(images)
    assert torch.equal(term(ours, theirs, [], (64, 64)), fresh(ours, theirs, [], (64, 64)))
