import math

import pytest
import torch

from losses.box_iou import pairwise_iou
from students.assignment import pad_targets
from students.yolo.assignment import Matches, Predicted, choose_by_cost, match_by_ratio, match_by_shape

ANCHORS = (((10, 13), (16, 30), (33, 23)), ((30, 61), (62, 45), (59, 119)), ((116, 90), (156, 198), (373, 326)))


def predict(sizes=((8, 8), (4, 4), (2, 2)), anchors=ANCHORS, batch=1, num_classes=2, seed=0):
    """Random predictions on maps of these sizes."""
    generator = torch.Generator().manual_seed(seed)
    anchors = torch.tensor(anchors, dtype=torch.float32)
    number = sum(height * width for height, width in sizes) * anchors.shape[1]
    boxes = torch.rand(batch, number, 2, 2, generator=generator).sort(dim=2).values.flatten(2) * 64
    classes = torch.randn(batch, number, num_classes, generator=generator)
    return Predicted(boxes, classes, torch.randn(batch, number, generator=generator), tuple(sizes), anchors)


def pad(*images):
    """Each image as rows of x1, y1, x2, y2, label."""
    rows = [torch.tensor(image, dtype=torch.float32).reshape(-1, 5) for image in images]
    return pad_targets([{"boxes": row[:, :4], "labels": row[:, 4].long()} for row in rows], torch.device("cpu"))


def places(matches, predicted, image=0):
    """(object, level, row, column, anchor) of all that counts."""
    starts, found = [0], []
    for size in predicted.level_sizes:
        starts.append(starts[-1] + size)
    counted = matches.counted[image]
    for index, item in zip(matches.predictions[image][counted].tolist(), matches.objects[image][counted].tolist()):
        level = max(n for n in range(3) if index >= starts[n])
        cell, anchor = divmod(index - starts[level], predicted.anchor_sizes.shape[1])
        found.append((item, level, *divmod(cell, predicted.shapes[level][1]), anchor))
    return sorted(found)


def random_objects(*counts, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = []
    for count in counts:
        low = torch.rand(count, 2, generator=generator) * 50
        size = 2 + torch.rand(count, 2, generator=generator) ** 2 * 60
        label = torch.randint(2, (count, 1), generator=generator).float()
        images.append(torch.cat((low, (low + size).clamp(max=64), label), dim=1).tolist())
    return pad(*images)


def test_ratio_takes_the_centre_cell_and_the_two_nearest():
    # 16 x 30 around (22, 29): on the finest level at (2.75, 3.625), the right and the lower cell are nearer
    predicted = predict()
    found = places(match_by_ratio(predicted, pad([[14, 14, 30, 44, 1]])), predicted)
    # ratios of width and height: 1.6 2.3, 1 1, 2.1 1.3 | 1.9 2.0, 3.9 1.5, 3.7 4.0 | 7.25 ...
    fine = [(0, 0, row, column, anchor) for row, column in ((3, 2), (3, 3), (4, 2)) for anchor in range(3)]
    # on the next at (1.375, 1.8125), the left and the lower one; 119 / 30 is 3.97
    coarse = [(0, 1, row, column, anchor) for row, column in ((1, 1), (1, 0), (2, 1)) for anchor in range(3)]
    assert found == sorted(fine + coarse)


def test_ratio_stays_on_the_map():
    # around (2, 2): cell (0, 0), no cell before it; on coarser maps likewise
    predicted = predict()
    found = places(match_by_ratio(predicted, pad([[0, 0, 4, 4, 0]])), predicted)
    assert found == [(0, 0, 0, 0, 0)]  # 13 / 4 is 3.25; 30 / 4 is more than 4
    found = places(match_by_ratio(predicted, pad([[60, 60, 64, 64, 0]])), predicted)
    assert found == [(0, 0, 7, 7, 0)]


def test_what_is_no_object_takes_nothing():
    predicted = predict(batch=2)
    objects = pad([], [[10, 10, 30, 30, 1]])
    for match in (match_by_ratio, match_by_shape):
        matches = match(predicted, objects)
        assert not matches.counted[0].any() and matches.counted[1].any()
        assert not match(predicted, pad([], [])).counted.any()
        chosen = choose_by_cost(matches, predicted, objects)
        assert not chosen.counted[0].any() and chosen.counted[1].any()
    # a box that ground truth squeezed to a line
    assert not match_by_ratio(predicted, pad([[3, 3, 3, 9, 0]])).counted.any()


@pytest.mark.parametrize("sizes", [((8, 8), (4, 4), (2, 2)), ((9, 12), (5, 6), (3, 3))])
def test_ratio_agrees_with_a_loop(sizes):
    predicted, objects = predict(sizes, batch=3), random_objects(5, 0, 9)
    matches = match_by_ratio(predicted, objects)
    for image in range(3):
        wanted = []
        for number in range(objects.mask[image].sum()):
            x1, y1, x2, y2 = objects.boxes[image, number].tolist()
            for level, (stride, (height, width)) in enumerate(zip((8, 16, 32), sizes)):
                x, y = (x1 + x2) / 2 / stride, (y1 + y2) / 2 / stride
                column, row = min(int(x), width - 1), min(int(y), height - 1)
                cells = [(row, column)]
                cells += [(row, column - 1)] * (x % 1 < 0.5 and x > 1) + [(row - 1, column)] * (y % 1 < 0.5 and y > 1)
                cells += [(row, column + 1)] * (x % 1 > 0.5 and x < width - 1)
                cells += [(row + 1, column)] * (y % 1 > 0.5 and y < height - 1)
                for anchor, (w, h) in enumerate(ANCHORS[level]):
                    ratios = (x2 - x1) / w, (y2 - y1) / h
                    if max(*ratios, *(1 / r for r in ratios)) < 4:
                        wanted += [(number, level, *cell, anchor) for cell in cells]
        assert places(matches, predicted, image) == sorted(wanted)


def test_shape_takes_the_best_anchor_and_those_much_like_it():
    predicted = predict()
    # 30 x 61 is the first anchor of the middle level. Of the others, centre on centre: 10x13 130/1830, 16x30 480/1830
    # = 0.26, 33x23 690/(1830 + 759 - 690) = 0.36; 62x45 1350/(1830 + 2790 - 1350) = 0.41, 59x119 1830/7021 = 0.26;
    # 116x90 1830/10440 = 0.175, and less
    found = places(match_by_shape(predicted, pad([[14, 3, 44, 64, 1]])), predicted)
    # the centre (29, 33.5)
    assert found == [(0, 0, 4, 3, 1), (0, 0, 4, 3, 2), (0, 1, 2, 1, 0), (0, 1, 2, 1, 1), (0, 1, 2, 1, 2)]
    # 2 x 2 is like none: 4/130 with the first
    assert places(match_by_shape(predicted, pad([[1, 9, 3, 11, 1]])), predicted) == [(0, 0, 1, 0, 0)]


def test_cost_chooses_as_a_loop_does():
    predicted, objects = predict(batch=3, seed=4), random_objects(6, 0, 9, seed=5)
    # predictions near the objects, or all IoUs would be small and each object would take one
    boxes = predicted.boxes.clone()
    candidates = match_by_ratio(predicted, objects)
    generator = torch.Generator().manual_seed(2)
    for image in range(3):
        for index, number in zip(candidates.predictions[image], candidates.objects[image]):
            boxes[image, index] = objects.boxes[image, number] + torch.randn(4, generator=generator)
    predicted = predicted._replace(boxes=boxes)
    matches = choose_by_cost(candidates, predicted, objects)
    several = 0
    for image in range(3):
        number = int(objects.mask[image].sum())
        index = candidates.predictions[image][candidates.counted[image]]
        if not number:
            continue
        overlap = pairwise_iou(objects.boxes[image, :number], predicted.boxes[image, index])
        cost = torch.zeros_like(overlap)
        for m in range(number):
            for c, i in enumerate(index.tolist()):
                p = (predicted.classes[image, i].sigmoid() * predicted.objectness[image, i].sigmoid()).sqrt()
                wanted = torch.eye(2)[objects.labels[image, m]]
                entropy = -(wanted * p.log() + (1 - wanted) * (1 - p).log()).sum()
                cost[m, c] = entropy - 3 * math.log(overlap[m, c].item() + 1e-8)
        takers = [[] for _ in index]
        for m in range(number):
            k = max(1, int(overlap[m].sort(descending=True).values[:10].sum()))
            several += k > 1
            for c in cost[m].argsort()[:k].tolist():
                takers[c].append(m)
        wanted = []
        for c, i in enumerate(index.tolist()):
            if takers[c]:
                wanted.append((i, takers[c][0] if len(takers[c]) == 1 else int(cost[:, c].argmin())))
        counted = matches.counted[image]
        found = zip(matches.predictions[image][counted].tolist(), matches.objects[image][counted].tolist())
        assert sorted(found) == sorted(wanted)
    assert several > 3


def test_a_candidate_goes_to_one_object():
    # two objects in one place, of one shape, and one candidate each: both are cheaper for the first, which is better
    # boxed; it takes one of them (IoU 1 + 1, so two), the second is left with what costs it least, and loses it
    anchors = (((10, 10),), ((200, 200),), ((800, 800),))
    predicted = predict(((1, 1), (1, 1), (1, 1)), anchors)
    predicted = predicted._replace(boxes=torch.tensor([[[0.0, 0, 10, 10]] * 3]), classes=torch.zeros(1, 3, 2))
    objects = pad([[0, 0, 10, 10, 0], [1, 0, 11, 10, 0]])
    chosen = choose_by_cost(match_by_ratio(predicted, objects), predicted, objects)
    assert chosen.counted.sum() == 2
    assert chosen.objects[chosen.counted].tolist() == [0, 0]


def test_levels_of_matches():
    matches = match_by_ratio(predict(), random_objects(4))
    assert isinstance(matches, Matches)
    assert matches.level_sizes == (4 * 3 * 5,) * 3 and matches.counted.shape == (1, 180)
