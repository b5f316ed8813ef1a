import numpy as np
import pytest
import torch

from distill.data import DetectionDataset, build_augmentation, build_loader, build_resize, open_index, set_epoch
from distill.data.augment import View
from distill.data.mosaic import compose_mosaic


class Scripted:
    """A source of chance that says what it is told."""

    def __init__(self, *values):
        self.values = list(values)

    def uniform(self, low, high, size=None):
        value = self.values.pop(0)
        assert (np.asarray(value) >= low).all() and (np.asarray(value) <= high).all()
        return np.array(value) if size else value


def plain(value, boxes=(), size=(40, 60), offset=(0, 0), valid_size=None):
    """A view of one brightness."""
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    image = np.full((*size, 3), value, dtype=np.uint8)
    return View(image, boxes, np.full(len(boxes), value), (2.0, 2.0), offset, valid_size or size)


def test_four_images_meet_in_a_corner():
    views = [plain(10), plain(20), plain(30), plain(40)]
    mosaic = compose_mosaic(views, Scripted(0.5, 0.25, [1.0, 1.0, 0.5, 0.5]))
    assert mosaic.image.shape == (40, 60, 3)
    # they meet at (30, 10)
    assert (mosaic.image[:10, :30] == 10).all() and (mosaic.image[:10, 30:] == 20).all()
    # the lower ones are 30 x 20: as wide as the quarter, and less high
    assert (mosaic.image[10:30, :30] == 30).all() and (mosaic.image[10:30, 30:] == 40).all()
    assert (mosaic.image[30:] == 114).all()
    assert mosaic.valid_size == (40, 60)
    assert mosaic.scale == (2.0, 2.0) and mosaic.offset == (-30, -30)  # the first one's: 60 x 40, ending at (30, 10)


def test_boxes_go_with_their_images_and_end_at_their_edges():
    # where they meet, at (30, 20), the first one's lower right corner lies: it begins at (-30, -20)
    views = [
        plain(1, [[40, 30, 50, 38], [20, 10, 40, 30], [0, 0, 20, 20]]),  # whole; 10 x 10 of it left, a quarter; outside
        plain(2, [[10, 0, 30, 40]]),
        plain(3, [[0, 0, 60, 40]]),
        plain(4, []),
    ]
    mosaic = compose_mosaic(views, Scripted(0.5, 0.5, [1.0, 1.0, 0.5, 0.5]))
    # the second begins at (30, -20) and is shown down to 20; the third is halved, and begins at (0, 20)
    assert mosaic.boxes.tolist() == [[10, 10, 20, 18], [40, 0, 60, 20], [0, 20, 30, 40]]
    assert mosaic.labels.tolist() == [1, 2, 3]
    assert mosaic.boxes.dtype == np.float32 and mosaic.labels.dtype == np.int64


def test_padding_is_left_behind():
    # of 40 x 60 pixels only 20 x 30 at (10, 5) show something
    view = plain(9, [[12, 7, 20, 15]], offset=(10, 5), valid_size=(25, 40))
    view.image[:5] = view.image[25:] = view.image[:, :10] = view.image[:, 40:] = 114
    mosaic = compose_mosaic([None, None, None, view], Scripted(0.5, 0.5, [1.0] * 4))
    assert (mosaic.image[20:40, 30:60] == 9).all() and (mosaic.image == 9).sum() == 20 * 30 * 3
    assert mosaic.boxes.tolist() == [[32, 22, 40, 30]]


@pytest.mark.parametrize("seed", range(8))
def test_boxes_lie_on_their_objects(seed):
    """White boxes on black, in four images: what is white in the mosaic is in a box, and the other way round."""
    rng = np.random.default_rng(seed)
    augmentation = build_augmentation((120, 160), vertical_flip=0.5, zoom_out=0.5)
    views = []
    for _ in range(4):
        image = np.zeros((90, 130, 3), dtype=np.uint8)
        box = np.array([[30, 20, 100, 70]], dtype=np.float32)
        image[20:70, 30:100] = 255
        views.append(augmentation(image, box, np.zeros(1, dtype=np.int64), rng))
    mosaic = compose_mosaic(views, rng)
    white = mosaic.image[..., 0] > 200
    for x1, y1, x2, y2 in mosaic.boxes.round().astype(int):
        assert white[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].all()
        white[max(0, y1 - 2) : y2 + 2, max(0, x1 - 2) : x2 + 2] = False
    assert len(mosaic.boxes) > 0
    assert white.mean() < 0.05  # slivers that were dropped


def test_mosaics_depend_on_seed_epoch_and_position_alone(scenes):
    index, augmentation = open_index(scenes, "train"), build_augmentation((64, 64), brightness=0.3)

    def load(workers):
        dataset = DetectionDataset(index, augmentation, seed=3, mosaic=0.5)
        loader, batches = build_loader(dataset, 2, workers=workers, shuffle=True, seed=5), []
        for epoch in (0, 1):
            set_epoch(loader, epoch)
            batches += list(loader)
        return batches

    for a, b in zip(load(0), load(2), strict=True):
        assert torch.equal(a.images, b.images)
        assert all(torch.equal(x["boxes"], y["boxes"]) for x, y in zip(a.targets, b.targets))
    always = DetectionDataset(index, augmentation, seed=3, mosaic=1.0)
    assert (always[2, 1].image == always[2, 1].image).all() and (always[2, 1].image != always[2, 0].image).any()


def test_a_probability_is_one(scenes):
    index, resize = open_index(scenes, "train"), build_resize((64, 64))
    never, always = DetectionDataset(index, resize), DetectionDataset(index, resize, mosaic=1.0)
    assert all((never[i].image != always[i].image).any() for i in range(len(index)))
    some = DetectionDataset(index, resize, mosaic=0.5)
    alone = sum((some[i, epoch].image == never[i].image).all() for i in range(len(index)) for epoch in range(10))
    assert 20 < alone < 60  # of 80
    assert all(len(always[i].boxes) == len(always[i].labels) for i in range(len(index)))


def test_an_image_that_cannot_be_read_leaves_its_quarter_grey(scenes, monkeypatch):
    from distill.data import UnreadableImageError
    from distill.data import dataset as module

    index, read = open_index(scenes, "train"), module.read_image

    def read_first(path):
        if path != index.path(0):
            raise UnreadableImageError(f"{path}: cannot be read")
        return read(path)

    monkeypatch.setattr(module, "read_image", read_first)
    dataset = DetectionDataset(index, build_resize((64, 64)), unreadable="skip", mosaic=1.0)
    assert (dataset[0].image == 114).all(axis=-1).mean() > 0.2
    assert dataset[1] == index.file(1)
    with pytest.raises(UnreadableImageError):
        DetectionDataset(index, build_resize((64, 64)), mosaic=1.0)[0]
