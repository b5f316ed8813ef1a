import math
import re

import pytest
import torch
import torchvision

from losses import ciou, giou, iou, pairwise_diou, pairwise_iou


def test_pairwise_iou_of_known_boxes():
    a = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 1]])
    b = torch.tensor([[1.0, 1, 3, 3], [0, 0, 2, 2], [5, 5, 6, 6]])
    # Row 0: overlap 1 of union 4 + 4 - 1; the same box; apart. Row 1: touching in a point; 1 of 4; apart.
    expected = torch.tensor([[1 / 7, 1, 0], [0, 1 / 4, 0]])
    torch.testing.assert_close(pairwise_iou(a, b), expected)


@pytest.mark.parametrize("seed", range(3))
def test_overlaps_agree_with_torchvision(seed):
    torch.manual_seed(seed)
    corner, size = 10 * torch.rand(2, 6, 2), 10 * torch.rand(2, 6, 2) + 1
    a, b = torch.cat([corner, corner + size], dim=-1)
    torch.testing.assert_close(pairwise_iou(a, b), torchvision.ops.box_iou(a, b))
    torch.testing.assert_close(pairwise_diou(a, b), torchvision.ops.distance_box_iou(a, b))
    torch.testing.assert_close(giou(a, b), torchvision.ops.generalized_box_iou(a, b).diagonal())
    torch.testing.assert_close(ciou(a, b), torchvision.ops.complete_box_iou(a, b).diagonal())


def test_pairwise_iou_keeps_images_apart():
    a = torch.tensor([[[0.0, 0, 2, 2]], [[0, 0, 4, 4]]])
    b = torch.tensor([[[0.0, 0, 2, 2], [0, 0, 2, 1]], [[0, 0, 2, 2], [0, 0, 4, 2]]])
    # Image 0: 4/4 and 2/4; image 1: 4/16 and 8/16.
    torch.testing.assert_close(pairwise_iou(a, b), torch.tensor([[[1.0, 0.5]], [[0.25, 0.5]]]))
    # One set of locations for all images broadcasts.
    torch.testing.assert_close(pairwise_iou(a[0], b), torch.tensor([[[1.0, 0.5]], [[1.0, 0.5]]]))


def test_pairwise_iou_of_empty_boxes_is_zero_not_nan():
    boxes = torch.zeros(2, 4, requires_grad=True)
    overlap = pairwise_iou(boxes, boxes)
    overlap.sum().backward()
    assert torch.equal(overlap, torch.zeros(2, 2))
    assert boxes.grad.isfinite().all()


@pytest.mark.parametrize(("num_a", "num_b"), [(0, 3), (3, 0), (0, 0)])
def test_pairwise_iou_without_boxes(num_a, num_b):
    assert pairwise_iou(torch.rand(5, num_a, 4), torch.rand(5, num_b, 4)).shape == (5, num_a, num_b)


def test_iou_is_the_diagonal_of_all_pairs():
    a, b = torch.rand(2, 3, 5, 4).sort(dim=-1).values  # x1 <= y1 <= x2 <= y2
    torch.testing.assert_close(iou(a, b), pairwise_iou(a, b).diagonal(dim1=1, dim2=2))
    assert torch.equal(iou(torch.zeros(1, 4), torch.zeros(1, 4)), torch.zeros(1))
    with pytest.raises(ValueError, match=r"iou\(a, b\): shapes \(1, 4\) and \(2, 4\) differ"):
        iou(torch.zeros(1, 4), torch.zeros(2, 4))


def test_giou_of_known_boxes():
    a = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 1], [3, 3, 5, 4], [1, 1, 1, 1]])
    b = torch.tensor([[1.0, 1, 3, 3], [2, 0, 3, 1], [3, 3, 5, 4], [1, 1, 1, 1]])
    expected = torch.tensor(
        [
            1 / 7 - (9 - 7) / 9,  # the box around both is 3 x 3
            0 - (3 - 2) / 3,  # apart: 3 x 1 around both, of which they cover 2
            1.0,
            0.0,  # nothing on nothing
        ]
    )
    torch.testing.assert_close(giou(a, b), expected)


def test_giou_has_a_gradient_for_boxes_apart():
    pred = torch.tensor([[0.0, 0, 1, 1]], requires_grad=True)
    giou(pred, torch.tensor([[2.0, 0, 3, 1]])).sum().backward()
    # G = u/c - 1, with u = x2 + 1 and c = 3 for x2 < 3 (the gap closes), so dG/dx2 = 1/3.
    torch.testing.assert_close(pred.grad[0, 2], torch.tensor(1 / 3))


@pytest.mark.parametrize("overlap", [giou, pairwise_iou, pairwise_diou])
def test_half_precision_boxes_are_measured_in_float32(overlap):
    # 1001 * 1001 is beyond float16, whose largest number is 65504.
    boxes = torch.tensor([[0.0, 0, 1001, 1001]], dtype=torch.float16)
    result = overlap(boxes, boxes)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, torch.ones_like(result))


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"pairwise_iou: boxes have shape \(2, 5\)"):
        pairwise_iou(torch.zeros(3, 4), torch.zeros(2, 5))
    for a, b in [((2, 3, 4), (3, 5, 4)), ((4,), (2, 4)), ((2, 1, 4), (4,))]:
        with pytest.raises(ValueError, match=f"pairwise_iou: shapes {re.escape(str(a))} and {re.escape(str(b))}; they"):
            pairwise_iou(torch.zeros(a), torch.zeros(b))
    assert pairwise_iou(torch.zeros(2, 1, 3, 4), torch.zeros(5, 1, 4)).shape == (2, 5, 3, 1)
    with pytest.raises(ValueError, match=r"giou: boxes have shape \(2, 5\)"):
        giou(torch.zeros(2, 5), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"shapes \(1, 4\) and \(2, 4\) differ"):
        giou(torch.zeros(1, 4), torch.zeros(2, 4))


def test_pairwise_diou_of_known_boxes():
    a = torch.tensor([[0.0, 0, 4, 4], [1, 1, 1, 1]])
    b = torch.tensor([[2.0, 0, 6, 4], [4, 0, 8, 4], [-2, -2, 6, 6], [1, 1, 1, 1]])
    expected = torch.tensor(
        [
            # 8 of 24, centres 2 apart in a box of 6 x 4; touching, 4 apart in 8 x 4; concentric, 16 of 64; a point
            # inside, sqrt(2) from the centre of a 4 x 4 box.
            [1 / 3 - 4 / 52, -16 / 80, 1 / 4, -2 / 32],
            # The point's distance to (4, 2) in a box of 5 x 4; to (6, 2) in 7 x 4; to (2, 2) in 8 x 8; to itself.
            [-10 / 41, -26 / 65, -2 / 128, 0],
        ]
    )
    torch.testing.assert_close(pairwise_diou(a, b), expected)


def test_pairwise_diou_checks_shapes():
    with pytest.raises(ValueError, match=r"pairwise_diou: boxes have shape \(2, 5\)"):
        pairwise_diou(torch.zeros(3, 4), torch.zeros(2, 5))


def test_ciou_of_known_boxes():
    a = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 1], [3, 3, 5, 4], [1, 1, 1, 1], [0, 0, 2, 2]])
    b = torch.tensor([[1.0, 1, 3, 3], [2, 0, 3, 1], [3, 3, 5, 4], [1, 1, 1, 1], [0, 0, 2, 1]])
    v = 4 / math.pi**2 * (math.atan(2) - math.atan(1)) ** 2
    expected = torch.tensor(
        [
            1 / 7 - 2 / 18,  # centres (1, 1) apart, in a box of 3 x 3
            0 - 4 / 10,  # 2 apart, in one of 3 x 1
            1.0,
            0.0,  # nothing on nothing
            1 / 2 - 0.25 / 8 - v * v / (1 / 2 + v),  # another shape
        ]
    )
    torch.testing.assert_close(ciou(a, b), expected)


def test_ciou_has_a_gradient_everywhere():
    boxes = torch.tensor([[0.0, 0, 0, 0], [0, 0, 1, 1], [5, 5, 6, 9]], requires_grad=True)
    ciou(boxes, torch.tensor([[0.0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 2, 2]])).sum().backward()
    assert boxes.grad.isfinite().all() and boxes.grad[2].abs().sum() > 0


def test_ciou_takes_the_weight_of_the_shape_for_a_constant():
    a = torch.tensor([[0.0, 0, 2, 2]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([[0.5, 0.5, 1.5, 1]], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(ciou(a, b).sum(), a)
    angle = math.atan(2) - math.atan(1)
    v = 4 / math.pi**2 * angle**2
    # where the right edge moves out from (2, 2): the union, 4, grows by 2, the intersection of 1/2 stays; the squared
    # distance of the centres, 1/16, does not change to first order, the squared diagonal, 8, grows by 4; the angle of
    # width and height grows by 2 / (2^2 + 2^2)
    of_overlap, of_distance = -0.5 * 2 / 4**2, -1 / 16 * 4 / 8**2
    of_shape = v / (7 / 8 + v) * 4 / math.pi**2 * 2 * angle * -1 / 4
    assert gradient[0, 2].item() == pytest.approx(of_overlap - of_distance - of_shape, abs=1e-6)
