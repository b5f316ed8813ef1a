import pytest
import torch

from students.assignment import assign_task_aligned

# a 4x4 grid of stride 8 on 32x32 pixels: location number 4 * row + column lies at (4 + 8 * column, 4 + 8 * row)
LOCATIONS = torch.tensor([[4.0 + 8 * column, 4.0 + 8 * row] for row in range(4) for column in range(4)])
STRIDES = torch.full((16,), 8.0)
FAR = [100.0, 100.0, 101.0, 101.0]


def assign(predicted, objects, labels, scores=None, mask=None, locations=LOCATIONS, strides=STRIDES, **options):
    """One image; `predicted` gives a location's box by its number, all others lie far away."""
    boxes = torch.tensor([[predicted.get(n, FAR) for n in range(len(locations))]], dtype=torch.float32)
    scores = torch.full((1, len(locations), 2), 0.5) if scores is None else scores
    objects = torch.tensor([objects], dtype=torch.float32).reshape(1, -1, 4)
    labels = torch.tensor([labels], dtype=torch.long)
    mask = torch.ones_like(labels, dtype=torch.bool) if mask is None else torch.tensor([mask])
    return assign_task_aligned(scores, boxes, locations, strides, objects, labels, mask, **options)


def quality_of(assignment):
    """Qualities above 0 by location."""
    return {n: q for n, q in enumerate(assignment.quality[0].tolist()) if q > 0}


def test_quality_is_alignment_rescaled_to_the_best_iou():
    # the object holds locations 0, 1, 4 and 5, whose boxes have IoU 1, 1/2, 1/4 and 0; alignment is 0.5 * IoU^6
    predicted = {0: [0, 0, 16, 16], 1: [0, 0, 16, 8], 4: [0, 0, 8, 8]}
    found = assign(predicted, [[0, 0, 16, 16]], [0])
    assert quality_of(found) == pytest.approx({0: 1.0, 1: 1 / 64, 4: 1 / 4096})
    assert found.objects[0, [0, 1, 4, 5]].tolist() == [0, 0, 0, 0]


def test_the_best_location_has_its_iou_as_quality():
    found = assign({0: [0, 0, 16, 8], 1: [0, 0, 8, 8]}, [[0, 0, 16, 16]], [0])
    assert quality_of(found) == pytest.approx({0: 0.5, 1: 0.5 / 64})


def test_a_confident_location_beats_a_well_boxed_one():
    scores = torch.zeros(1, 16, 2)
    scores[0, 0] = torch.tensor([0.9, 0.1])  # the object is of class 0
    scores[0, 1] = torch.tensor([0.001, 0.999])
    found = assign({0: [0, 0, 16, 8], 1: [0, 0, 16, 16]}, [[0, 0, 16, 16]], [0], scores)
    # alignments 0.9 / 64 and 0.001 * 1; the highest IoU among them is 1
    assert quality_of(found) == pytest.approx({0: 1.0, 1: 0.001 / (0.9 / 64)})


def test_only_locations_inside_the_box_take_part():
    predicted = {n: [8, 8, 24, 24] for n in range(16)}
    assert quality_of(assign(predicted, [[8, 8, 24, 24]], [1])) == pytest.approx(dict.fromkeys((5, 6, 9, 10), 1.0))


def test_only_the_top_k_are_kept():
    predicted = {0: [0, 0, 16, 16], 1: [0, 0, 16, 12], 4: [0, 0, 16, 8]}
    assert set(quality_of(assign(predicted, [[0, 0, 16, 16]], [0], top_k=2))) == {0, 1}


def test_a_location_wanted_by_two_goes_to_the_one_it_overlaps_most():
    small, large = [0, 0, 16, 16], [0, 0, 32, 32]
    found = assign({0: small, 1: [0, 0, 32, 16], 15: large}, [small, large], [0, 1], top_k=16)
    # location 1 has IoU 1/2 with both: the first of the objects takes it
    assert found.objects[0, [0, 1, 15]].tolist() == [0, 0, 1]
    assert quality_of(found) == pytest.approx({0: 1.0, 1: 1 / 64, 15: 1.0})


def test_a_tiny_object_gets_the_nearest_location():
    found = assign({5: [12, 12, 16, 16]}, [[13, 13, 15, 15]], [0])  # IoU 4/16
    assert quality_of(found) == pytest.approx({5: 0.25})


def test_a_tiny_object_gets_a_location_of_the_finest_level():
    locations = torch.cat((LOCATIONS, torch.tensor([[8.0, 8], [24, 8], [8, 24], [24, 24]])))
    strides = torch.cat((STRIDES, torch.full((4,), 16.0)))
    everywhere = {n: [8, 8, 12, 12] for n in range(20)}
    found = assign(everywhere, [[9, 9, 10, 10]], [0], torch.full((1, 20, 2), 0.5), locations=locations, strides=strides)
    assert list(quality_of(found)) == [5]  # at (12, 12), although (8, 8) of the coarse level is nearer


def test_without_objects_all_is_background():
    found = assign({0: [0, 0, 16, 16]}, [[0, 0, 0, 0]], [0], mask=[False])
    assert found.quality.shape == found.objects.shape == (1, 16)
    assert found.quality.sum() == 0


def test_padding_is_no_object():
    both = [[0, 0, 16, 16], [0, 0, 0, 0]]
    found = assign({0: [0, 0, 16, 16], 5: [0, 0, 8, 8]}, both, [0, 0], mask=[True, False])
    assert (found.objects[found.quality > 0] == 0).all()
    assert set(quality_of(found)) == {0, 5}
    assert assign({0: [0, 0, 16, 16]}, [[0, 0, 16, 16]], [0], mask=[False]).quality.sum() == 0


def test_images_of_a_batch_do_not_mix():
    scores, strides = torch.full((2, 16, 1), 0.5), STRIDES
    boxes = torch.tensor([[[0.0, 0, 16, 16]] * 16, [[16.0, 16, 32, 32]] * 16])
    objects = torch.tensor([[[0.0, 0, 16, 16]], [[16.0, 16, 32, 32]]])
    labels, mask = torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1, dtype=torch.bool)
    quality = assign_task_aligned(scores, boxes, LOCATIONS, strides, objects, labels, mask).quality
    assert quality[0].nonzero().flatten().tolist() == [0, 1, 4, 5]
    assert quality[1].nonzero().flatten().tolist() == [10, 11, 14, 15]
