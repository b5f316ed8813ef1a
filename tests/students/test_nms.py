import torch
from torchvision.ops import box_iou

from students.nms import select, select_padded, survivors

HEIGHT, WIDTH = 60, 100


def test_one_class_competes_with_itself_alone():
    # Boxes 0 and 1 overlap by 0.8: 80 of 100 columns. Of class 0 the lower-scored goes; class 1 keeps its own of box 1.
    boxes = torch.tensor([[[0.0, 0, 100, 10], [0, 0, 80, 10], [-20, 40, 30, 80]]])
    scores = torch.tensor([[[0.9, 0.0], [0.8, 0.7], [0.0, 0.6]]])
    found_boxes, found_scores, labels = select_padded(boxes, scores, (HEIGHT, WIDTH))
    assert found_scores.tolist() == torch.tensor([[0.9, 0.7, 0.6, 0, 0, 0]]).tolist()
    assert labels.tolist() == [[0, 1, 1, -1, -1, -1]]  # as many as there are (box, class) pairs
    clipped = [[0, 0, 100, 10], [0, 0, 80, 10], [0, 40, 30, 60]]
    assert found_boxes.tolist() == [clipped + [[0, 0, 0, 0]] * 3]


def test_each_class_may_have_a_box_of_its_own():
    # of one prediction, of the other; the boxes of class 1 overlap by 0.8, those of class 0 not at all
    boxes = torch.tensor([[[[0.0, 0, 10, 10], [0, 0, 50, 10]], [[20, 0, 30, 10], [0, 0, 40, 10]]]])
    scores = torch.tensor([[[0.9, 0.6], [0.8, 0.7]]])
    found_boxes, found_scores, labels = select_padded(boxes, scores, (HEIGHT, WIDTH))
    assert labels.tolist() == [[0, 0, 1, -1]]
    assert found_scores.tolist() == torch.tensor([[0.9, 0.8, 0.7, 0]]).tolist()
    assert found_boxes.tolist() == [[[0, 0, 10, 10], [20, 0, 30, 10], [0, 0, 40, 10], [0, 0, 0, 0]]]
    (found,) = select(boxes, scores, [(HEIGHT, WIDTH)])
    assert torch.equal(found.boxes, found_boxes[0, :3]) and torch.equal(found.labels, labels[0, :3])


def test_what_does_not_count_suppresses_nothing():
    # box 1 overlaps box 0 by 0.8, and has the lower score, but box 0 does not count; nor do 3 and 4, which are alike
    boxes = torch.tensor([[[0.0, 0, 100, 10], [0, 0, 80, 10], [0, 20, 10, 30], [50, 50, 60, 60], [50, 50, 60, 60]]])
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5]])
    counts = torch.tensor([[False, True, True, False, False]])
    left = survivors(boxes, scores, counts, 0, 1, (HEIGHT, WIDTH), 0.6)
    assert left.tolist() == [[False, True, True, False, False]]
    every = survivors(boxes, scores, torch.ones_like(counts), 0, 1, (HEIGHT, WIDTH), 0.6)
    assert every.tolist() == [[True, False, True, True, False]]


def random_predictions(batch=3, number=700, classes=4):
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(batch, number, 2, generator=generator) * torch.tensor([WIDTH, HEIGHT])
    sides = torch.rand(batch, number, 2, generator=generator) * 30
    scores = torch.rand(batch, number, classes, generator=generator) ** 8  # few are high
    return torch.cat((corners - sides / 2, corners + sides / 2), dim=-1), scores


def test_padded_is_what_lists_hold():
    boxes, scores = random_predictions()
    lists = select(boxes, scores, [(HEIGHT, WIDTH)] * 3)
    for found, *padded in zip(lists, *select_padded(boxes, scores, (HEIGHT, WIDTH)), strict=True):
        for one, other in zip((found.boxes, found.scores, found.labels), padded, strict=True):
            assert len(one) == 100 and torch.equal(one, other)


def test_nothing_overlaps_that_was_kept():
    boxes, scores = random_predictions(batch=2)
    for kept, kept_scores, labels in zip(*select_padded(boxes, scores, (HEIGHT, WIDTH))):
        same = (labels[:, None] == labels) & ~torch.eye(100, dtype=torch.bool)
        assert box_iou(kept, kept)[same].max() <= 0.6
        assert kept_scores.tolist() == sorted(kept_scores.tolist(), reverse=True)


def test_low_scores_are_padding():
    boxes, scores = random_predictions(batch=1, number=50)
    scores = scores * 0.01 / scores.max()  # the best is no more than the threshold
    found = select_padded(boxes, scores, (HEIGHT, WIDTH))
    assert not found[0].any() and not found[1].any() and (found[2] == -1).all()
    assert len(select(boxes, scores, [(HEIGHT, WIDTH)])[0].scores) == 0
