import pytest
import torch

from losses import adaptive_threshold

FINE = torch.tensor([[0.0, 0, 4, 4], [2, 0, 6, 4], [4, 0, 8, 4]])
COARSE = torch.tensor([[-2.0, -2, 6, 6]])


def test_threshold_of_known_boxes():
    overlap, candidates, threshold = adaptive_threshold([FINE, COARSE], torch.tensor([[0.0, 0, 4, 4]]), 2)
    torch.testing.assert_close(overlap, torch.tensor([[1, 1 / 3, 0, 1 / 4]]))
    assert sorted(candidates[0].tolist()) == [0, 1, 3]  # the two nearest of the first level, all of the second
    # the mean 19/36 of 1, 1/3 and 1/4, and their unbiased deviation
    deviation = ((17**2 + 7**2 + 10**2) / 36**2 / 2) ** 0.5
    torch.testing.assert_close(threshold, torch.tensor([19 / 36 + deviation]))


def test_objects_and_images_do_not_mix():
    boxes = torch.tensor([[[0.0, 0, 4, 4], [3, 0, 8, 4]], [[4.0, 0, 8, 4], [0, 0, 0, 0]]])
    together = adaptive_threshold([FINE, COARSE], boxes, 2)
    for image in range(2):
        for number in range(2):
            alone = adaptive_threshold([FINE, COARSE], boxes[image, number : number + 1], 2)
            for whole, part in zip(together, alone):
                torch.testing.assert_close(whole[image, number], part[0])


def test_edge_cases():
    box = torch.tensor([[0.0, 0, 8, 8]])
    assert adaptive_threshold([box], box)[2].tolist() == [1.0]  # one candidate has no spread
    assert [x.shape for x in adaptive_threshold([FINE], torch.zeros(2, 0, 4))] == [(2, 0, 3), (2, 0, 3), (2, 0)]
    assert adaptive_threshold([torch.zeros(0, 4)], box)[2].tolist() == [0.0]
    anchors = FINE.to(torch.bfloat16).requires_grad_()
    overlap, _, threshold = adaptive_threshold([anchors], box)
    assert overlap.dtype == threshold.dtype == torch.float32 and not threshold.requires_grad
    with pytest.raises(ValueError, match="anchors has 0 levels"):
        adaptive_threshold([], box)
    with pytest.raises(ValueError, match=r"boxes have shape \(2, 5\)"):
        adaptive_threshold([FINE], torch.zeros(2, 5))
