"""Assignment that looks at anchors alone, whatever is predicted: ATSS, and by overlap."""

import statistics

import torch

from students.assignment import assign_atss, assign_by_overlap, pad_targets
from students.locations import grid_locations, square_anchors

# a 4x4 grid of stride 8 on 32x32 pixels: anchor number 4 * row + column is the cell itself
LOCATIONS, STRIDES = grid_locations(((4, 4),), (8,), torch.device("cpu"))
CELLS = square_anchors(LOCATIONS, STRIDES, size=1.0)


def atss(objects, mask=None, anchors=CELLS, strides=STRIDES, sizes=(16,), **options):
    objects = torch.tensor([objects], dtype=torch.float32)
    mask = torch.ones(objects.shape[:2], dtype=torch.bool) if mask is None else torch.tensor([mask])
    return by_location(*assign_atss(anchors, strides, sizes, objects, mask, **options))


def by_location(objects, assigned):
    """The object of each assigned anchor of the first image."""
    return {n: objects[0, n].item() for n in assigned[0].nonzero().flatten().tolist()}


def test_atss_takes_what_overlaps_by_the_mean_and_the_deviation():
    # nine candidates around (8, 8): four cells inside have IoU 1/4, five outside 0; 1/9 + 0.132 is less than 1/4
    assert atss([[0, 0, 16, 16]]) == dict.fromkeys((0, 1, 4, 5), 0)
    # of four candidates all have 1/4, which is their mean
    assert atss([[0, 0, 16, 16]], top_k=4) == dict.fromkeys((0, 1, 4, 5), 0)


def test_atss_wants_centres_inside():
    # overlaps its cell and the one on its right, and holds the centre (4, 4) of its own only
    assert atss([[0, 0, 11, 8]], top_k=2) == {0: 0}


def test_atss_gives_an_anchor_to_the_object_that_it_overlaps_most():
    # the first has the cells 0, 1, 4 and 5 with 1/4, the second 0 and 1 with 1/2
    assert atss([[0, 0, 16, 16], [0, 0, 16, 8]]) == {0: 1, 1: 1, 4: 0, 5: 0}


def test_atss_leaves_no_object_with_nothing():
    # smaller than a cell and off its centre; of the same place as another, which comes first
    assert atss([[13, 13, 15, 15]]) == {5: 0}
    assert atss([[0, 0, 16, 16], [13, 13, 15, 15]]) == {0: 0, 1: 0, 4: 0, 5: 1}
    assert set(atss([[0, 0, 16, 16], [0, 0, 16, 16]]).values()) == {0, 1}


def test_atss_gives_tiny_objects_the_finest_level():
    locations, strides = grid_locations(((4, 4), (2, 2)), (8, 16), torch.device("cpu"))
    anchors = square_anchors(locations, strides, size=1.0)
    # (8, 8) of the coarse level is nearer
    assert atss([[9, 9, 10, 10]], anchors=anchors, strides=strides, sizes=(16, 4)) == {5: 0}


def test_atss_of_an_object_as_large_as_the_image():
    locations, strides = grid_locations(((1, 1),), (32,), torch.device("cpu"))
    found = atss([[0, 0, 32, 32]], anchors=square_anchors(locations, strides), strides=strides, sizes=(1,))
    assert found == {0: 0}


def test_padding_is_no_object():
    objects, mask = [[0, 0, 16, 16], [0, 0, 0, 0]], [True, False]
    assert set(atss(objects, mask).values()) == {0}
    assert atss(objects, [False, False]) == {}
    found = assign_by_overlap(CELLS, torch.tensor([objects]).float(), torch.tensor([mask]))
    assert set(by_location(*found[:2]).values()) == {0}
    found = assign_by_overlap(CELLS, torch.tensor([objects]).float(), torch.tensor([[False, False]]))
    assert not found[1].any() and not found[2].any()


def overlap_of(a, b):
    width, height = max(0.0, min(a[2], b[2]) - max(a[0], b[0])), max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return width * height / (sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - width * height)


def test_atss_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    locations, strides = grid_locations(((8, 8), (4, 4), (2, 2)), (8, 16, 32), torch.device("cpu"))
    anchors, sizes, batch = square_anchors(locations, strides, size=3.0), (64, 16, 4), 3
    corner = torch.rand(batch, 4, 2, generator=generator) * 32
    boxes = torch.cat((corner, corner + 10 + torch.rand(batch, 4, 2, generator=generator) * 22), dim=-1)
    mask = torch.tensor([[True] * 4, [True] * 2 + [False] * 2, [False] * 4])
    objects, assigned = assign_atss(anchors, strides, sizes, boxes, mask, top_k=5)
    for image in range(batch):
        wanted = {}  # anchor: (IoU, object)
        for number, box in enumerate(boxes[image][mask[image]].tolist()):
            centre, candidates, first = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), [], 0
            for size in sizes:
                far = lambda n, c=centre: (locations[n, 0] - c[0]) ** 2 + (locations[n, 1] - c[1]) ** 2  # noqa: E731
                candidates += sorted(range(first, first + size), key=far)[: min(5, size)]
                first += size
            overlaps = [overlap_of(anchors[n].tolist(), box) for n in candidates]
            threshold = statistics.mean(overlaps) + statistics.stdev(overlaps)
            for n, value in zip(candidates, overlaps):
                x, y = locations[n].tolist()
                if value >= threshold and box[0] < x < box[2] and box[1] < y < box[3]:
                    wanted[n] = max(wanted.get(n, (-1.0, -1)), (value, number))
        assert {number for _, number in wanted.values()} == set(range(int(mask[image].sum())))  # none is forced
        found = {n: objects[image, n].item() for n in assigned[image].nonzero().flatten().tolist()}
        assert found == {n: number for n, (_, number) in wanted.items()}


def by_overlap(objects, **options):
    """The object of each assigned anchor, and the anchors that are neither."""
    boxes = torch.tensor([objects], dtype=torch.float32)
    found = assign_by_overlap(CELLS, boxes, torch.ones(boxes.shape[:2], dtype=torch.bool), **options)
    return by_location(*found[:2]), found[2][0].nonzero().flatten().tolist()


def test_overlap_decides_between_object_neither_and_background():
    # IoU 64 / 121.6 = 0.526 with its cell, 57.6 / 128 = 0.45 with the one below
    assert by_overlap([[0, 0, 8, 15.2]]) == ({0: 0}, [4])
    assert by_overlap([[0, 0, 8, 15.2]], background=0.46) == ({0: 0}, [])
    # 64 / 112 and 48 / 128 = 0.375
    assert by_overlap([[0, 0, 8, 14]]) == ({0: 0}, [])
    assert by_overlap([[0, 0, 8, 16]]) == ({0: 0, 4: 0}, [])  # 0.5 is enough


def test_an_objects_best_anchors_are_its_own():
    assert by_overlap([[4, 0, 12, 8]]) == ({0: 0, 1: 0}, [])  # 1/3 twice
    assert by_overlap([[13, 13, 15, 15]]) == ({5: 0}, [])  # 4 / 64
    # the first overlaps cell 5 by 64 / 124, its best, and cell 1 by 60 / 128, which is the best of the second
    objects = [[8, 0.5, 16, 16], [13, 5, 15, 7]]
    assert by_overlap(objects[:1], foreground=0.4) == ({1: 0, 5: 0}, [])
    assert by_overlap(objects, foreground=0.4) == ({1: 1, 5: 0}, [])
    # the best of both: the one that overlaps more
    assert by_overlap([[13, 13, 15, 15], [8, 8, 16, 16]]) == ({5: 1}, [])


def test_images_of_a_batch_do_not_mix():
    boxes = torch.tensor([[[0.0, 0, 8, 8]], [[24.0, 24, 32, 32]]])
    mask = torch.ones(2, 1, dtype=torch.bool)
    for assigned in (assign_atss(CELLS, STRIDES, (16,), boxes, mask)[1], assign_by_overlap(CELLS, boxes, mask)[1]):
        assert assigned.nonzero().tolist() == [[0, 0], [1, 15]]


def test_targets_are_padded_to_at_least_one_object(targets):
    nothing, unsure = targets[1], targets[0] | {"scores": torch.tensor([0.5, 0.25])}
    objects = pad_targets([nothing, unsure], torch.device("cpu"))
    assert objects.boxes.tolist() == [[[0] * 4] * 2, unsure["boxes"].tolist()]
    assert objects.labels.tolist() == [[0, 0], [0, 1]] and objects.labels.dtype == torch.int64
    assert objects.scores.tolist() == [[0, 0], [0.5, 0.25]]
    assert objects.mask.tolist() == [[False, False], [True, True]]
    matched = objects.at(torch.tensor([[0], [1]]))
    assert matched.boxes[1].tolist() == [[30, 20, 62, 60]]
    assert matched.labels.tolist() == [[0], [1]] and matched.scores.tolist() == [[0], [0.25]]
    assert pad_targets([targets[0]], torch.device("cpu")).scores.tolist() == [[1, 1]]
    empty = pad_targets([nothing, nothing], torch.device("cpu"))
    assert empty.boxes.shape == (2, 1, 4) and not empty.mask.any()
