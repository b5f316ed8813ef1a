import pytest
import torch

from distill.terms import LDTerm
from losses import localization_distillation, valuable_region
from students.assignment import assign_atss
from students.dense import HEADS
from students.locations import grid_locations, square_anchors

SHAPES = ((8, 8), (4, 4), (2, 2))


@pytest.fixture
def pair(build_tiny):
    student, teacher = build_tiny(head="gfl").eval(), build_tiny(seed=1, head="gfl", channels=24).eval()
    for detector in (student, teacher):
        torch.nn.init.normal_(detector.head.box_distances.bias, std=3.0)  # untrained, all edges would be alike
    return student, teacher


def regions(targets):
    """Image by image: where ATSS assigns, and the weights of the valuable region."""
    locations, strides = grid_locations(SHAPES, (8, 16, 32), torch.device("cpu"))
    anchors, sizes = square_anchors(locations, strides), [64, 16, 4]
    positive, region = [], []
    for boxes in (target["boxes"] for target in targets):
        found = torch.zeros(1, 84, dtype=torch.bool)
        if len(boxes):
            mask = torch.ones(1, len(boxes), dtype=torch.bool)
            found = assign_atss(anchors, strides, sizes, boxes[None], mask)[1]
        positive.append(found[0])
        region.append(valuable_region(anchors.split(sizes), boxes))
    return torch.stack(positive), torch.stack(region)


def flat(levels, *shape):
    return torch.cat([x.flatten(2).transpose(1, 2) for x in levels], dim=1).unflatten(-1, shape)


@torch.no_grad()
def test_both_regions_by_hand(pair, images, targets):
    student, teacher = pair
    ours, theirs = student(images), teacher(images)
    positive, region = regions(targets)
    assert positive[0].any() and (region[0] * ~positive[0]).any() and not positive[1].any() and not region[1].any()
    bins = flat(ours.box_logits, 4, 17), flat(theirs.box_logits, 4, 17)
    scores = flat(ours.class_logits, 2).sigmoid().amax(dim=-1)
    main = localization_distillation(*bins, scores * positive, temperature=5.0)
    around = localization_distillation(*bins, region * ~positive, temperature=5.0)
    term = LDTerm(student, teacher, temperature=5.0, region_weight=3.0)
    torch.testing.assert_close(term(ours, theirs, targets, (64, 64)), main + 3 * around)
    assert main > 0 and around > 0


@torch.no_grad()
def test_a_choice_of_levels_does_not_move_the_regions(pair, images, targets):
    student, teacher = pair
    ours, theirs = student(images), teacher(images)
    positive, region = (x[:, 64:80] for x in regions(targets))
    bins = flat(ours.box_logits[1:2], 4, 17), flat(theirs.box_logits[1:2], 4, 17)
    scores = flat(ours.class_logits[1:2], 2).sigmoid().amax(dim=-1)
    weights = (scores * positive, region * ~positive)
    wanted = sum(localization_distillation(*bins, weight) for weight in weights)
    torch.testing.assert_close(LDTerm(student, teacher, levels=["P4"])(ours, theirs, targets, (64, 64)), wanted)


@torch.no_grad()
def test_a_student_is_at_zero_distance_from_itself(pair, images, targets):
    student, _ = pair
    output = student(images)
    assert LDTerm(student, student)(output, output, targets, (64, 64)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_what_has_no_distributions_of_one_length_is_refused(build_tiny, head):
    gfl, other = build_tiny(head="gfl"), build_tiny(head=head)
    if head == "gfl":
        other.box_bins = 9
    bins, fits = {"gfl": (9, "box_mimic"), "retinanet": (0, "pseudo_label"), "task_aligned": (0, "box_mimic")}[head]
    with pytest.raises(ValueError, match=f"the student's have 17 bins, the teacher's {bins}; choose {fits}$"):
        LDTerm(gfl, other)
    with pytest.raises(ValueError, match=f"^name: ld needs .* the student's have {bins} bins"):
        LDTerm(other, other if not bins else gfl)
