import gc
import json
import os
import pickle
import zlib

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from PIL import Image

from distill.data import (
    DetectionDataset,
    EpochSampler,
    UnreadableImageError,
    build_augmentation,
    build_loader,
    build_resize,
    open_index,
    set_epoch,
)
from distill.errors import UserError

SIZE = (48, 64)


@pytest.fixture
def index(tmp_path, write_image):
    """Seven images; image i has i boxes, of which the last one is ignored."""
    content = {
        "images": [{"id": 10 + i, "file_name": f"{i}.jpg"} for i in range(7)],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            {
                "id": 10 * i + j,
                "image_id": 10 + i,
                "category_id": 1,
                "bbox": [j, j, 20, 20],
                "iscrowd": int(j == i - 1),
            }
            for i in range(7)
            for j in range(i)
        ],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "train.json").write_text(json.dumps(content))
    for i in range(7):
        write_image(tmp_path / "images" / f"{i}.jpg", width=96 + i, height=64)
    return open_index(tmp_path, "train")


@pytest.fixture
def augmentation():
    return build_augmentation(SIZE, vertical_flip=0.5, crop=0.5, zoom_out=0.3, brightness=0.3, contrast=0.3, hue=0.1)


def ids(loader):
    return [[meta.image_id for meta in batch.metas] for batch in loader]


def test_batches(index):
    batches = list(build_loader(DetectionDataset(index, build_resize(SIZE)), 3))
    assert [len(batch.metas) for batch in batches] == [3, 3, 1]
    batch = batches[1]
    assert batch.images.shape == (3, 3, 48, 64)
    assert batch.images.dtype == torch.float32
    assert 0 <= batch.images.min() < 0.1
    assert 0.9 < batch.images.max() <= 1
    assert batch.unreadable == []
    assert [len(target["boxes"]) for target in batch.targets] == [2, 3, 4]  # without the ignored ones
    scale = 64 / 99
    assert batch.targets[0]["boxes"][1].tolist() == pytest.approx([scale, 41 / 64, 21 * scale, 21 * 41 / 64])
    assert batch.targets[0]["labels"].dtype == torch.int64
    meta = batch.metas[0]
    assert (meta.image_id, meta.file, meta.original_size, meta.valid_size) == (13, "3.jpg", (64, 99), (41, 64))
    assert batches[0].targets[0]["boxes"].shape == (0, 4)


def test_drop_last(index):
    assert len(build_loader(DetectionDataset(index, build_resize(SIZE)), 3, drop_last=True)) == 2


def test_pixels_are_those_of_the_file(index):
    batch = next(iter(build_loader(DetectionDataset(index, build_resize((64, 96))), 1)))
    pixels = np.asarray(Image.open(index.path(0)))
    assert torch.equal((batch.images[0] * 255).round().byte(), torch.from_numpy(pixels.copy()).permute(2, 0, 1))


def test_sampler():
    sampler = EpochSampler(5, shuffle=False)
    assert list(sampler) == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0)]
    sampler = EpochSampler(50, shuffle=True, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == [(i, 0) for i in range(50)]
    assert sorted(second) == [(i, 1) for i in range(50)]
    assert [i for i, _ in first] != [i for i, _ in second]
    assert list(EpochSampler(50, shuffle=True, seed=3)) == first
    assert list(EpochSampler(50, shuffle=True, seed=4)) != first


def test_views_depend_on_seed_epoch_and_position_alone(index, augmentation):
    dataset = DetectionDataset(index, augmentation, seed=1)
    forth = [dataset[i, 2].image for i in range(7)]
    back = [dataset[i, 2].image for i in reversed(range(7))][::-1]
    assert all((a == b).all() for a, b in zip(forth, back))
    assert any((dataset[i, 3].image != forth[i]).any() for i in range(7))
    other = DetectionDataset(index, augmentation, seed=2)
    assert any((other[i, 2].image != forth[i]).any() for i in range(7))
    assert (dataset[4].image == dataset[4, 0].image).all()


def test_a_bank_of_views_comes_again_to_the_pixel(index, augmentation):
    endless, bank = (
        DetectionDataset(index, augmentation, seed=3),
        DetectionDataset(index, augmentation, seed=3, views=2),
    )
    shown = [[bank[position, epoch] for position in range(7)] for epoch in range(5)]
    for epoch, samples in enumerate(shown):
        for position, sample in enumerate(samples):
            assert np.array_equal(sample.image, endless[position, epoch % 2].image)
            assert np.array_equal(sample.boxes, shown[epoch % 2][position].boxes)
            meta = sample.meta
            assert (meta.number, meta.view, meta.pixels) == (position, epoch % 2, zlib.crc32(sample.image.tobytes()))
    assert len({sample.meta.pixels for samples in shown for sample in samples}) == 14
    assert endless[1, 4].meta.view == 4


def test_workers_change_nothing(index, augmentation):
    def load(workers):
        loader = build_loader(DetectionDataset(index, augmentation), 2, workers=workers, shuffle=True, seed=5)
        batches = []
        for epoch in (0, 1):
            set_epoch(loader, epoch)
            batches.append(list(loader))
        return batches

    alone, helped = load(0), load(2)
    for epoch in (0, 1):
        assert [b.metas for b in alone[epoch]] == [b.metas for b in helped[epoch]]
        for a, b in zip(alone[epoch], helped[epoch]):
            assert torch.equal(a.images, b.images)
            assert all(torch.equal(x["boxes"], y["boxes"]) for x, y in zip(a.targets, b.targets))
    assert [b.metas for b in alone[0]] != [b.metas for b in alone[1]]


def test_a_signal_to_the_group_of_a_run_leaves_its_workers_alone(index):
    batches = iter(build_loader(DetectionDataset(index, build_resize(SIZE)), 1, workers=2))
    next(batches), next(batches)  # a batch of each
    groups = [os.getpgid(worker.pid) for worker in batches._workers]
    assert os.getpgid(0) not in groups and len(set(groups)) == 2


def test_loading_draws_nothing_from_the_global_generator(index, augmentation):
    state = torch.get_rng_state()
    list(build_loader(DetectionDataset(index, augmentation), 2, shuffle=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_dataset_survives_pickling(index, augmentation):
    dataset = DetectionDataset(index, augmentation)
    assert (pickle.loads(pickle.dumps(dataset))[3, 1].image == dataset[3, 1].image).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_undecodable_image(index, cut_short, workers):
    cut_short(index.path(1))  # after opening: only decoding finds it
    loader = build_loader(DetectionDataset(index, build_resize(SIZE)), 3, workers=workers)
    with pytest.raises(UnreadableImageError) as caught:
        list(loader)
    assert str(caught.value).startswith(f"{index.path(1)}: cannot be read as an image (")
    assert "\n" not in str(caught.value)
    del loader, caught  # its workers stop with the last reference, of which the traceback has some
    gc.collect()

    batches = list(build_loader(DetectionDataset(index, build_resize(SIZE), unreadable="skip"), 3, workers=workers))
    assert ids(batches) == [[10, 12], [13, 14, 15], [16]]
    assert batches[0].unreadable == ["1.jpg"]
    assert batches[0].images.shape == (2, 3, 48, 64)


def test_batch_without_readable_images(index, cut_short):
    cut_short(index.path(0))
    batch = next(iter(build_loader(DetectionDataset(index, build_resize(SIZE), unreadable="skip"), 1)))
    assert batch.images.shape == (0, 3, 48, 64)
    assert (batch.targets, batch.metas, batch.unreadable) == ([], [], ["0.jpg"])


def test_image_that_changed_its_size(index, write_image):
    write_image(index.path(0), width=50, height=40)
    with pytest.raises(UserError, match=r"0\.jpg: is 50x40 now, but was 96x64"):
        DetectionDataset(index, build_resize(SIZE))[0]


def test_unknown_way_with_unreadable_images(index):
    with pytest.raises(UserError, match=r"data\.unreadable: found 'drop'"):
        DetectionDataset(index, build_resize(SIZE), unreadable="drop")


def test_accelerate_keeps_the_epoch(index, augmentation):
    dataset = DetectionDataset(index, augmentation)
    plain = build_loader(dataset, 2, shuffle=True, seed=5)
    prepared = Accelerator(cpu=True).prepare(build_loader(dataset, 2, shuffle=True, seed=5))
    for epoch in (3, 4):  # as after a resume
        set_epoch(plain, epoch)
        set_epoch(prepared, epoch)
        for a, b in zip(plain, prepared, strict=True):
            assert a.metas == b.metas
            assert torch.equal(a.images, b.images)
            assert type(b).__name__ == "Batch"


def test_accelerate_shards_an_epoch(index, augmentation):
    dataset = DetectionDataset(index, augmentation)
    plain = build_loader(dataset, 1, shuffle=True, seed=5)
    set_epoch(plain, 3)
    wanted = ids(plain)
    shards = []
    for rank in range(2):
        loader = build_loader(dataset, 1, shuffle=True, seed=5)
        shard = prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False)
        set_epoch(shard, 3)
        shards.append(ids(shard))
    assert shards[0] == wanted[0::2]
    assert shards[1] == [*wanted[1::2], wanted[0]]  # evened out: seven images on two ranks


def test_real_blood_cells(shared_data):
    index = open_index(shared_data / "bccd", "test")
    batch = next(iter(build_loader(DetectionDataset(index, build_resize((240, 320))), 4)))
    assert batch.images.shape == (4, 3, 240, 320)
    assert all(meta.scale == (0.5, 0.5) for meta in batch.metas)
    assert np.allclose(batch.targets[0]["boxes"] * 2, index.boxes_of(0))
