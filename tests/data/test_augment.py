import numpy as np
import pytest
import torch

from distill.data import ImageMeta, build_augmentation, build_resize, to_original
from distill.errors import UserError


def picture(height, width, box=None):
    """A black image with one white box."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    if box is not None:
        image[box[1] : box[3], box[0] : box[2]] = 255
    return image


def look(transform, image, boxes, seed=0):
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    return transform(image, boxes, np.arange(len(boxes)), np.random.default_rng(seed))


def meta_of(view, original_size):
    return ImageMeta(1, "a.jpg", original_size, view.scale, view.offset, view.valid_size)


def test_letterbox_geometry():
    view = look(build_resize((100, 100)), picture(50, 200), [[20, 10, 60, 30]])
    assert view.image.shape == (100, 100, 3)
    assert view.image.dtype == np.uint8
    assert view.scale == (0.5, 0.5)
    assert view.offset == (0, 0)
    assert view.valid_size == (25, 100)
    assert view.boxes.tolist() == [[10, 5, 30, 15]]
    assert (view.image[:25] == 0).all()
    assert (view.image[25:] == 114).all()


def test_stretch_geometry():
    view = look(build_resize((100, 100), "stretch"), picture(50, 200), [[20, 10, 60, 30]])
    assert view.scale == (0.5, 2)
    assert view.valid_size == (100, 100)
    assert view.boxes.tolist() == [[10, 20, 30, 60]]


@pytest.mark.parametrize("resize", ["letterbox", "stretch"])
@pytest.mark.parametrize("size", [(48, 64), (480, 640), (333, 517), (7, 900), (224, 320)])
def test_boxes_return_to_the_original(resize, size):
    height, width = size
    boxes = [[0, 0, width, height], [1.5, 2.25, width / 2, height / 2]]
    view = look(build_resize((224, 320), resize), picture(*size), boxes)
    original = to_original(torch.from_numpy(view.boxes), meta_of(view, size))
    torch.testing.assert_close(original, torch.tensor(boxes), atol=1e-3, rtol=0)


def test_to_original_clips():
    meta = ImageMeta(1, "a.jpg", original_size=(50, 200), scale=(0.5, 0.5), offset=(10, 20), valid_size=(45, 110))
    boxes = torch.tensor([[0.0, 0.0, 500.0, 500.0], [20.0, 25.0, 30.0, 35.0]])
    assert to_original(boxes, meta).tolist() == [[0, 0, 200, 50], [20, 10, 40, 30]]
    assert to_original(torch.zeros(0, 4), meta).shape == (0, 4)


def test_flips_move_boxes_with_pixels():
    box = [10, 20, 30, 25]
    flip = build_augmentation((50, 100), horizontal_flip=1.0, vertical_flip=1.0)
    view = look(flip, picture(50, 100, box), [box])
    assert view.boxes.tolist() == [[70, 25, 90, 30]]
    assert (view.image[25:30, 70:90] == 255).all()


def test_flips_are_drawn_independently():
    flip = build_augmentation((50, 100), horizontal_flip=0.5, vertical_flip=0.5)
    views = [look(flip, picture(50, 100), [[10, 20, 30, 25]], seed).boxes[0] for seed in range(60)]
    outcomes = {(float(view[0]), float(view[1])) for view in views}
    assert outcomes == {(10, 20), (70, 20), (10, 25), (70, 25)}


@pytest.mark.parametrize("seed", range(8))
def test_crop_and_zoom_move_boxes_with_pixels(seed):
    box = [40, 30, 80, 60]
    augmentation = build_augmentation((120, 160), crop=1.0, crop_scale=(0.3, 0.6), zoom_out=0.5)
    view = look(augmentation, picture(120, 160, box), [box], seed)
    white = view.image[..., 0] > 128
    if not len(view.boxes):
        assert white.mean() < 0.1
        return
    x1, y1, x2, y2 = np.round(view.boxes[0]).astype(int)
    assert white[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].all()
    white[max(0, y1 - 2) : y2 + 2, max(0, x1 - 2) : x2 + 2] = False
    assert not white.any()


def test_crop_drops_boxes_that_are_hardly_visible():
    boxes = np.array([[x, y, x + 10, y + 10] for x in range(0, 90, 10) for y in range(0, 90, 10)], dtype=np.float32)
    augmentation = build_augmentation((100, 100), "stretch", horizontal_flip=0, crop=1.0, crop_scale=(0.2, 0.5))
    dropped = 0
    for seed in range(10):
        view = look(augmentation, picture(100, 100), boxes, seed)
        # in pixels of the crop, where a whole box has area 100
        areas = (view.boxes[:, 2:] - view.boxes[:, :2]).prod(axis=1) / np.prod(view.scale)
        assert areas.min() >= 25 - 1e-2
        dropped += (areas < 50).any()
        assert len(view.boxes) == len(view.labels) < len(boxes)
    assert dropped > 3  # partly visible boxes do occur


def test_labels_stay_with_their_boxes():
    boxes = [[x, y, x + 4 + 2 * x // 10, y + 4] for x in range(0, 80, 10) for y in range(0, 90, 10)]
    widths = np.array([box[2] - box[0] for box in boxes])
    augmentation = build_augmentation((100, 100), horizontal_flip=1.0, crop=1.0, crop_scale=(0.3, 0.3))
    for seed in range(10):
        view = look(augmentation, picture(100, 100), boxes, seed)
        found = view.boxes / view.scale[0]
        whole = (found[:, 0] > 0.1) & (found[:, 2] < view.valid_size[1] / view.scale[0] - 0.1)  # not cut by the crop
        assert 5 < whole.sum() < len(boxes) / 2
        np.testing.assert_allclose((found[:, 2] - found[:, 0])[whole], widths[view.labels][whole], atol=1e-2)


def test_zoom_out_leaves_a_grey_ground():
    view = look(build_augmentation((100, 100), horizontal_flip=0, zoom_out=1.0), picture(100, 100), [[0, 0, 100, 100]])
    x1, y1, x2, y2 = view.boxes[0].astype(int)
    assert 50 <= x2 - x1 < 100
    assert view.offset == (x1, y1)
    assert view.valid_size == (y2, x2)
    assert (view.image[y1:y2, x1:x2] == 0).all()
    assert (view.image == 114).sum() == view.image.size - 3 * (x2 - x1) * (y2 - y1)


def test_color_leaves_padding_and_boxes_alone():
    image = np.full((50, 100, 3), 100, dtype=np.uint8)
    augmentation = build_augmentation((100, 100), horizontal_flip=0, brightness=0.5)
    views = [look(augmentation, image, [[1, 2, 3, 4]], seed) for seed in range(5)]
    assert len({int(view.image[0, 0, 0]) for view in views}) > 1
    assert all((view.image[50:] == 114).all() for view in views)
    assert all(view.boxes.tolist() == [[1, 2, 3, 4]] for view in views)


def test_image_without_boxes():
    augmentation = build_augmentation((60, 60), crop=1.0, zoom_out=1.0, brightness=0.2, hue=0.1)
    view = look(augmentation, picture(50, 100), [])
    assert view.boxes.shape == (0, 4)
    assert view.boxes.dtype == np.float32
    assert view.labels.shape == (0,)


def test_same_generator_state_same_view():
    everything = build_augmentation(
        (60, 60), vertical_flip=0.5, crop=0.5, zoom_out=0.5, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1
    )
    image = np.random.default_rng(0).integers(0, 256, (50, 100, 3), dtype=np.uint8)
    first = [look(everything, image, [[10, 10, 60, 40]], seed).image for seed in range(6)]
    again = [look(everything, image, [[10, 10, 60, 40]], seed).image for seed in reversed(range(6))][::-1]
    assert all((a == b).all() for a, b in zip(first, again))
    assert all((a != first[0]).any() for a in first[1:])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"resize": "crop"}, r"data\.resize: found 'crop'"),
        ({"crop_scale": (0.8, 0.5)}, r"data\.augment\.crop_scale: found \(0\.8, 0\.5\)"),
        ({"crop_scale": (0.0, 0.5)}, r"data\.augment\.crop_scale: found"),
        ({"hue": 0.6}, r"data\.augment\.hue: found 0\.6"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        build_augmentation((32, 32), **arguments)
