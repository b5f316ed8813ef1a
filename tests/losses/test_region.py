import math

import pytest
import torch

from losses import fgd_masks, foreground_mask

NO_BOXES = torch.zeros(0, 4)


def masks_by_loops(boxes, image_size, feature_size):
    """Box by box and location by location, as FGD's paper and code describe it."""
    height, width = feature_size
    foreground, background = torch.zeros(len(boxes), height, width), torch.zeros(len(boxes), height, width)
    for image, its_boxes in enumerate(boxes):
        for box in its_boxes:
            x1, y1, x2, y2 = box / torch.tensor([image_size[1], image_size[0]] * 2) * torch.tensor([width, height] * 2)
            left, top, right, bottom = math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2)
            weight = 1 / (bottom + 1 - top) / (right + 1 - left)
            for y in range(height):
                for x in range(width):
                    if left <= x <= right and top <= y <= bottom:
                        foreground[image, y, x] = max(foreground[image, y, x].item(), weight)
        free = [(y, x) for y in range(height) for x in range(width) if foreground[image, y, x] == 0]
        for y, x in free:
            background[image, y, x] = 1 / len(free)
    return foreground, background


def test_known_boxes():
    # 32 pixels on 4 locations: 8 pixels each. The large box covers columns 0 to 2 and rows 0 to 1 (y2 = 7 -> ceil 1):
    # 6 locations. The small one covers columns floor(1.5) = 1 to 2 and row 1 to 1: 2 locations, 1/2 beats 1/6.
    boxes = [torch.tensor([[0.0, 0, 16, 7], [12, 8, 16, 8]])]
    foreground, background = fgd_masks(boxes, (32, 32), (4, 4))
    sixth = 1 / 6
    expected = torch.tensor([[sixth, sixth, sixth, 0], [sixth, 0.5, 0.5, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(foreground, expected[None])
    torch.testing.assert_close(background, (expected == 0)[None] / 10)
    assert torch.equal(foreground_mask(boxes, (32, 32), (4, 4)), (expected > 0)[None].float())


def test_width_and_height_are_not_mixed_up():
    # 16 x 64 pixels on 2 x 4 locations: columns 40/16 -> 2 to 60/16 -> 4 (3 of them, one beyond the map), row 0 to 1.
    foreground, background = fgd_masks([torch.tensor([[40.0, 0, 60, 8]])], (16, 64), (2, 4))
    expected = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 1]]]) / 6
    torch.testing.assert_close(foreground, expected)
    torch.testing.assert_close(background, (expected == 0) / 4)


def test_the_smallest_box_counts_whatever_the_order():
    boxes = torch.tensor([[0.0, 0, 64, 64], [0, 0, 8, 8], [0, 0, 30, 30]])
    torch.testing.assert_close(fgd_masks([boxes], (64, 64), (8, 8)), fgd_masks([boxes.flip(0)], (64, 64), (8, 8)))
    assert fgd_masks([boxes], (64, 64), (8, 8))[0][0, 0, 0] == 1 / 4  # both ends: 2 x 2


def test_no_boxes_are_all_background():
    foreground, background = fgd_masks([NO_BOXES, NO_BOXES], (32, 32), (2, 4))
    assert torch.equal(foreground, torch.zeros(2, 2, 4))
    assert torch.equal(background, torch.full((2, 2, 4), 1 / 8))
    assert not foreground_mask([NO_BOXES, NO_BOXES], (32, 32), (2, 4)).any()


def test_one_box_over_all_leaves_no_background():
    boxes = [torch.tensor([[0.0, 0, 32, 32]])]
    foreground, background = fgd_masks(boxes, (32, 32), (4, 4))
    assert torch.equal(foreground, torch.full((1, 4, 4), 1 / 25))  # rows and columns 0 to 4, one of each beyond the map
    assert not background.any()
    assert foreground_mask(boxes, (32, 32), (4, 4)).all()


def test_images_do_not_see_each_other():
    box = torch.tensor([[0.0, 0, 8, 8]])
    foreground, background = fgd_masks([box, NO_BOXES, torch.cat([box, box + 16])], (32, 32), (4, 4))
    for image, boxes in enumerate([box, NO_BOXES, torch.cat([box, box + 16])]):
        alone = fgd_masks([boxes], (32, 32), (4, 4))
        torch.testing.assert_close((foreground[image : image + 1], background[image : image + 1]), alone)


def test_one_pixel_maps():
    foreground, background = fgd_masks([torch.tensor([[4.0, 4, 8, 8]]), NO_BOXES], (32, 32), (1, 1))
    # The whole map is one location; floor(1/8) = 0 to ceil(1/4) = 1 in both directions.
    assert foreground.flatten().tolist() == [0.25, 0]
    assert background.flatten().tolist() == [0, 1]


def test_boxes_beyond_the_image_are_cut_at_the_border():
    # Columns -1 to 1 and rows 3 to 5: 9 locations, of which the map has 2 columns and 1 row.
    foreground, _ = fgd_masks([torch.tensor([[-8.0, 24, 8, 40]])], (32, 32), (4, 4))
    expected = torch.zeros(1, 4, 4)
    expected[0, 3, :2] = 1 / 9
    torch.testing.assert_close(foreground, expected)


@pytest.mark.parametrize("feature_size", [(5, 7), (8, 8), (1, 3)])
def test_agrees_with_loops(feature_size):
    boxes = []
    for count in (3, 0, 12, 1):
        corners = torch.rand(count, 2, 2) * torch.tensor([70.0, 50.0])
        boxes.append(torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1))
    expected = masks_by_loops(boxes, (50, 70), feature_size)
    torch.testing.assert_close(fgd_masks(boxes, (50, 70), feature_size), expected)
    assert torch.equal(foreground_mask(boxes, (50, 70), feature_size), (expected[0] > 0).float())


def test_bf16_boxes_give_float32_masks():
    boxes = [torch.tensor([[0.0, 0, 16, 8]], dtype=torch.bfloat16)]
    for mask in (*fgd_masks(boxes, (32, 32), (4, 4)), foreground_mask(boxes, (32, 32), (4, 4))):
        assert mask.dtype == torch.float32 and mask.isfinite().all()


def test_whole_numbers_are_pixels_too():
    boxes = torch.tensor([[0, 0, 16, 8], [8, 8, 9, 9]])
    whole, others = fgd_masks([boxes, boxes[:1]], (32, 32), (4, 4)), [boxes.float(), boxes[:1].float()]
    torch.testing.assert_close(whole, fgd_masks(others, (32, 32), (4, 4)))


def test_boxes_are_checked():
    for masks in (fgd_masks, foreground_mask):
        with pytest.raises(ValueError, match="no images"):
            masks([], (32, 32), (4, 4))
        for shape in [(4,), (2, 5)]:
            with pytest.raises(ValueError, match=r"must be \(N, 4\)") as error:
                masks([torch.zeros(shape)], (32, 32), (4, 4))
            assert str(shape) in str(error.value)
        with pytest.raises(ValueError, match=r"image 1's have shape \(1, 5\)"):
            masks([torch.zeros(3, 4), torch.zeros(1, 5)], (32, 32), (4, 4))
