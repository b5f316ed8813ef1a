import math
import statistics

import pytest
import torch

from losses import box_mimic, localization_distillation, valuable_region

KINDS = ["giou", "smooth_l1"]


def random_boxes(*shape, dtype=torch.float32):
    corner, size = torch.rand(*shape, 2, dtype=dtype) * 10, torch.rand(*shape, 2, dtype=dtype) * 10 + 1
    return torch.cat([corner, corner + size], dim=-1)


def mimic_of(kind):
    return lambda student, teacher, weight: box_mimic(student, teacher, weight, kind)


# Each loss with the shape of one item.
LOSSES = [
    pytest.param(localization_distillation, (4, 5), id="localization_distillation"),
    *[pytest.param(mimic_of(kind), (4,), id=kind) for kind in KINDS],
]


def random_items(item, *shape, dtype=torch.float32):
    return random_boxes(*shape, dtype=dtype) if item == (4,) else torch.randn(*shape, *item, dtype=dtype)


def test_localization_distillation_of_known_distributions():
    student, teacher = torch.zeros(2, 4, 2), torch.zeros(2, 4, 2)
    student[0, 1, 1] = 10 * math.log(3)  # softened by 10, (1/4, 3/4) against (1/2, 1/2); all else agrees
    # 100 * (ln(2) / 2 + ln(2/3) / 2), halved for the bins, over four edges: 6.25 ln(4/3), of which 3/4 count.
    loss = localization_distillation(student, teacher, torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(loss, torch.tensor(0.75 * 6.25 * math.log(4 / 3)))


def test_localization_distillation_is_its_formula():
    student, teacher, weight = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5), torch.rand(2, 3)
    total = 0.0
    for s, t, w in zip(student.view(-1, 4, 5).tolist(), teacher.view(-1, 4, 5).tolist(), weight.view(-1).tolist()):
        for s_edge, t_edge in zip(s, t):
            q, p = [math.exp(z / 2) for z in s_edge], [math.exp(z / 2) for z in t_edge]
            for a, b in zip(p, q):
                a, b = a / sum(p), b / sum(q)
                total += w * 4 * a * math.log(a / b) / 5 / 4
    expected = torch.tensor(total / weight.sum().item())
    torch.testing.assert_close(localization_distillation(student, teacher, weight, temperature=2.0), expected)


def test_box_mimic_of_known_boxes():
    student = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 1], [3, 3, 5, 4]])
    teacher = torch.tensor([[1.0, 1, 3, 3], [2, 0, 3, 1], [3, 3, 5, 4]])
    weight = torch.tensor([0.5, 1, 0.5])
    # GIoU 1/7 - 2/9 = -5/63, -1/3 and 1, as in test_detection.
    expected = (0.5 * 68 / 63 + 4 / 3) / 2
    torch.testing.assert_close(box_mimic(student, teacher, weight), torch.tensor(expected))
    # Coordinates differ by 1, 1, 1, 1: 1/2 each. By 2, 0, 2, 0: 3/2 twice of four. By nothing.
    expected = (0.5 * 0.5 + 3 / 4) / 2
    torch.testing.assert_close(box_mimic(student, teacher, weight, "smooth_l1"), torch.tensor(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_box_mimic_is_its_formula(kind):
    student, teacher, weight = random_boxes(6), random_boxes(6), torch.rand(6)
    total = 0.0
    for s, t, w in zip(student.tolist(), teacher.tolist(), weight.tolist()):
        if kind == "giou":
            width = max(0.0, min(s[2], t[2]) - max(s[0], t[0]))
            height = max(0.0, min(s[3], t[3]) - max(s[1], t[1]))
            union = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (s, t)) - width * height
            around = (max(s[2], t[2]) - min(s[0], t[0])) * (max(s[3], t[3]) - min(s[1], t[1]))
            total += w * (1 - width * height / union + (around - union) / around)
        else:
            for a, b in zip(s, t):
                total += w * (0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5) / 4
    torch.testing.assert_close(box_mimic(student, teacher, weight, kind), torch.tensor(total / weight.sum().item()))


@pytest.mark.parametrize(("loss", "item"), LOSSES)
def test_only_the_ratio_of_weights_counts(loss, item):
    student, teacher, weight = random_items(item, 4), random_items(item, 4), torch.rand(4) + 0.1
    expected = loss(student, teacher, weight)
    torch.testing.assert_close(loss(student, teacher, weight * 1e-3), expected)
    # One location of weight 1 among others of 0 is alone.
    mask = torch.tensor([False, False, True, False])
    torch.testing.assert_close(loss(student, teacher, mask), loss(student[2:3], teacher[2:3], torch.ones(1)))


@pytest.mark.parametrize(("loss", "item"), LOSSES)
def test_weights_do_not_learn(loss, item):
    weight = torch.rand(3, 2, requires_grad=True)
    loss(random_items(item, 3, 2).requires_grad_(), random_items(item, 3, 2), weight).backward()
    assert weight.grad is None


def test_valuable_region_of_known_boxes():
    fine = torch.tensor([[0.0, 0, 4, 4], [2, 0, 6, 4], [4, 0, 8, 4]])
    coarse = torch.tensor([[-2.0, -2, 6, 6]])
    # IoU with (0, 0, 4, 4): 1, 1/3, 0; 1/4. The nearest two of each level: 1, 1/3; 1/4, their mean 19/36 and their
    # unbiased deviation sqrt((17^2 + 7^2 + 10^2) / 36^2 / 2) = 0.411, so thr = 0.939 and thr / 4 = 0.235.
    # DIoU: 1, 1/3 - 4/52 = 0.256, -1/5; 1/4.
    region = valuable_region([fine, coarse], torch.tensor([[0.0, 0, 4, 4]]), candidates_per_level=2)
    torch.testing.assert_close(region, torch.tensor([0, 1 / 3, 0, 1 / 4]))


def test_valuable_region_is_its_formula():
    def overlaps(a, b):
        width, height = max(0.0, min(a[2], b[2]) - max(a[0], b[0])), max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        iou = width * height / (sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - width * height)
        diagonal = (max(a[2], b[2]) - min(a[0], b[0])) ** 2 + (max(a[3], b[3]) - min(a[1], b[1])) ** 2
        return iou, iou - distance(a, b) / diagonal

    def distance(a, b):
        return ((a[0] + a[2] - b[0] - b[2]) / 2) ** 2 + ((a[1] + a[3] - b[1] - b[3]) / 2) ** 2

    torch.manual_seed(0)
    anchors, boxes = [random_boxes(20), random_boxes(3)], random_boxes(4)
    flat, expected = torch.cat(anchors).tolist(), [0.0] * 23
    for box in boxes.tolist():
        candidates = []
        for level in anchors:
            nearest = sorted(level.tolist(), key=lambda anchor: distance(anchor, box))[:5]
            candidates += [overlaps(anchor, box)[0] for anchor in nearest]
        threshold = statistics.mean(candidates) + statistics.stdev(candidates)
        for index, anchor in enumerate(flat):
            iou, diou = overlaps(anchor, box)
            if 0.25 * threshold <= diou < threshold:
                expected[index] = max(expected[index], iou)
    assert 0 < sum(e > 0 for e in expected) < 23
    torch.testing.assert_close(valuable_region(anchors, boxes, candidates_per_level=5), torch.tensor(expected))


def test_valuable_region_of_a_batch_is_that_of_each_image():
    anchors, boxes = [random_boxes(20), random_boxes(3)], random_boxes(2, 4)
    boxes[1, 2:] = 0  # padding
    region = valuable_region(anchors, boxes)
    torch.testing.assert_close(region, torch.stack([valuable_region(anchors, b) for b in (boxes[0], boxes[1, :2])]))


def test_valuable_region_without_objects_or_anchors_is_empty():
    assert torch.equal(valuable_region([random_boxes(3), random_boxes(1)], torch.zeros(0, 4)), torch.zeros(4))
    assert valuable_region([torch.zeros(0, 4)], random_boxes(2)).shape == (0,)


def test_valuable_region_of_one_box_over_all():
    # Each quarter has IoU 1/4 with the whole, which is thr, as all are alike; its centre is (8, 8) off, in a box of
    # 32 x 32: DIoU = 1/4 - 1/16, between thr / 4 and thr.
    corners = torch.tensor([[0.0, 0], [16, 0], [0, 16], [16, 16]])
    region = valuable_region([torch.cat([corners, corners + 16], dim=1)], torch.tensor([[0.0, 0, 32, 32]]))
    torch.testing.assert_close(region, torch.full((4,), 1 / 4))


def test_valuable_region_of_a_single_anchor_is_empty():
    # The only candidate sets thr, and 1 < 1 does not hold.
    box = torch.tensor([[0.0, 0, 8, 8]])
    assert torch.equal(valuable_region([box], box), torch.zeros(1))


def test_valuable_region_is_a_weight_outside_the_graph():
    anchors = random_boxes(9).to(torch.bfloat16).requires_grad_()
    region = valuable_region([anchors], random_boxes(2).requires_grad_())
    assert region.dtype == torch.float32 and not region.requires_grad


def test_shapes_are_checked():
    bins, boxes = torch.zeros(2, 4, 3), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"localization_distillation.*\(2, 4, 3\) and \(2, 4, 5\) differ"):
        localization_distillation(bins, torch.zeros(2, 4, 5), torch.ones(2))
    with pytest.raises(ValueError, match=r"bins have shape \(2, 3, 4\); they must be \(\.\.\., 4, R\)"):
        localization_distillation(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.ones(2))
    with pytest.raises(ValueError, match=r"weight has shape \(2, 4\) for values \(2, 4, 3\); it must be \(2,\)"):
        localization_distillation(bins, bins, torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"box_mimic.*\(2, 4\) and \(1, 4\) differ"):
        box_mimic(boxes, boxes[:1], torch.ones(2))
    with pytest.raises(ValueError, match=r"boxes have shape \(2, 5\)"):
        box_mimic(torch.zeros(2, 5), torch.zeros(2, 5), torch.ones(2))
    with pytest.raises(ValueError, match=r"weight has shape \(2, 1\) for values \(2, 4\); it must be \(2,\)"):
        box_mimic(boxes, boxes, torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"kind is 'l2'; it must be"):
        box_mimic(boxes, boxes, torch.ones(2), "l2")
    with pytest.raises(ValueError, match="anchors has 0 levels"):
        valuable_region([], boxes)
    with pytest.raises(ValueError, match=r"boxes have shape \(2, 5\)"):
        valuable_region([boxes], torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"anchors of level 1 have shape \(2, 5\); they must be \(A, 4\)"):
        valuable_region([boxes, torch.zeros(2, 5)], boxes)
