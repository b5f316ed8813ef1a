"""Images without annotations: how they are found, and how they are mixed with labelled ones."""

import json
from fractions import Fraction

import pytest
import torch
from accelerate.data_loader import prepare_data_loader

from distill.data import (
    DetectionDataset,
    MixedDataset,
    MixedSampler,
    UnreadableImageError,
    build_augmentation,
    build_loader,
    open_index,
    open_unlabelled,
    set_epoch,
)
from distill.data.sampler import mixed_places
from distill.errors import UserError


def test_places_are_as_even_as_whole_images_can_be():
    assert mixed_places(6, Fraction(1, 2)) == [0, 1, 0, 1, 0, 1]
    assert mixed_places(6, Fraction(1, 3)) == [0, 0, 1, 0, 0, 1]
    assert mixed_places(4, Fraction(3, 4)) == [0, 1, 1, 1]
    places = mixed_places(1000, Fraction(29, 100))
    assert all(sum(places[i : i + 100]) == 29 for i in range(0, 1000, 100))


def test_unlabelled_images_go_on_where_they_stopped():
    sampler = MixedSampler(4, 3, Fraction(1, 2), shuffle=False)
    assert len(sampler) == 8
    first = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 2, 0), (1, 2, 0), (0, 3, 0), (1, 0, 1)]
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) == [(0, 0, 1), (1, 1, 1), (0, 1, 1), (1, 2, 1), (0, 2, 1), (1, 0, 2), (0, 3, 1), (1, 1, 2)]
    sampler.set_epoch(0)
    assert list(sampler) == first


@pytest.mark.parametrize(("labelled", "ratio"), [(5, "1/2"), (7, "1/3"), (10, "3/4"), (9, "99/100"), (50, "1/100")])
def test_every_labelled_image_comes_once(labelled, ratio):
    sampler = MixedSampler(labelled, 6, Fraction(ratio), shuffle=True, seed=3)
    drawn = list(sampler)
    assert len(drawn) == len(sampler)
    assert sorted(position for source, position, _ in drawn if source == 0) == list(range(labelled))
    others = [address[1:] for address in drawn if address[0] == 1]
    assert len(set(others)) == len(others)  # the same image again is of another epoch, and so another view
    assert abs(len(others) - float(Fraction(ratio)) * len(drawn)) < 1


@pytest.fixture
def mixed(tmp_path, write_image):
    """Seven labelled and five unlabelled images, two of which lie a folder deeper."""
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(7)],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": [2, 2, 20, 20]} for i in range(7)],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "train.json").write_text(json.dumps(content))
    for i in range(7):
        write_image(tmp_path / "images" / f"{i}.jpg")
    for name in ("a", "b", "c", "deep/d", "deep/e"):
        write_image(tmp_path / "more" / f"{name}.png", width=80)
    (tmp_path / "more" / "._a.png").write_bytes(b"a finder's leftover")
    view = build_augmentation((48, 64), vertical_flip=0.5)
    labelled = open_index(tmp_path, "train")
    unlabelled = open_unlabelled(tmp_path / "more", None, labelled.class_names)

    def build(ratio):
        return MixedDataset(DetectionDataset(labelled, view, 0), DetectionDataset(unlabelled, view, 1), ratio)

    return build


def test_a_folder_of_images(mixed):
    index = mixed(0.5).sources[1].index
    assert [index.file(i) for i in range(5)] == ["a.png", "b.png", "c.png", "deep/d.png", "deep/e.png"]
    assert (index.labelled, index.class_names, index.format, index.split) == (False, ("thing",), "folder", "more")
    assert len(index.boxes) == 0 and index.sizes[0].tolist() == [48, 80]


def test_unlabelled_images_of_a_batch_come_last_and_have_no_target(mixed):
    loader = build_loader(mixed(0.5), 4, shuffle=True, drop_last=True)
    assert len(loader) == 3  # of 14 images
    for batch in loader:
        assert [target is None for target in batch.targets] == [False, False, True, True]
        assert [meta.file.endswith("png") for meta in batch.metas] == [False, False, True, True]
        assert all(target["boxes"].shape == (1, 4) for target in batch.targets[:2])


@pytest.mark.parametrize("ratio", [0.5, 0.3])
def test_processes_share_the_batch_that_one_would_have(mixed, ratio):
    def steps(processes):
        """The files of each global batch of four, in epoch 3."""
        shards = []
        for rank in range(processes):
            loader = build_loader(mixed(ratio), 4 // processes, shuffle=True, seed=5, drop_last=True)
            shard = prepare_data_loader(loader, num_processes=processes, process_index=rank, put_on_device=False)
            set_epoch(shard, 3)
            shards.append([sorted(meta.file for meta in batch.metas) for batch in shard])
        return [sorted(file for files in parts for file in files) for parts in zip(*shards)]

    assert steps(1) == steps(2) == steps(4)
    assert len(steps(1)) == int(7 / (1 - ratio)) // 4


def test_views_depend_on_the_address_alone(mixed):
    def load(workers):
        loader = build_loader(mixed(0.5), 4, workers=workers, shuffle=True, seed=5)
        set_epoch(loader, 1)
        return list(loader)

    for alone, helped in zip(load(0), load(1), strict=True):
        assert alone.metas == helped.metas and torch.equal(alone.images, helped.images)


def test_a_spread_lies_evenly_over_both_kinds(mixed):
    # 7 labelled images by 2: positions 0 and 3; 5 unlabelled by 2: 0 and 2
    assert mixed(0.5).spread(4) == [(0, 0, 0), (1, 0, 0), (0, 3, 0), (1, 2, 0)]


def test_splits_without_annotations(tmp_path, write_image):
    for name in ("a", "b", "c"):
        write_image(tmp_path / "voc/JPEGImages" / f"{name}.jpg")
        write_image(tmp_path / "coco/images" / f"{name}.jpg")
        write_image(tmp_path / "yolo/images/pool" / f"{name}.jpg")
    (tmp_path / "voc/ImageSets/Main").mkdir(parents=True)
    (tmp_path / "voc/ImageSets/Main/pool.txt").write_text("c\na\n")
    (tmp_path / "coco/annotations").mkdir()
    (tmp_path / "coco/annotations/pool.json").write_text('{"images": [{"file_name": "b.jpg"}, {"file_name": "a.jpg"}]}')
    (tmp_path / "yolo/data.yaml").write_text("names: [x]\npool: images/pool\n")
    found = {}
    for name in ("voc", "coco", "yolo"):
        index = open_unlabelled(tmp_path / name, "pool", ["x"])
        assert (index.format, index.split, index.labelled) == (name.upper(), "pool", False)
        found[name] = [index.path(i).stem for i in range(len(index))]
    assert found == {"voc": ["c", "a"], "coco": ["b", "a"], "yolo": ["a", "b", "c"]}
    with pytest.raises(UserError, match=r"data.unlabelled: .*coco has no split 'pol' \(did you mean 'pool'\?\)"):
        open_unlabelled(tmp_path / "coco", "pol", ["x"])


def test_images_that_cannot_be_read(tmp_path, write_image, cut_short):
    with pytest.raises(
        UserError, match=r"data.unlabelled.root: .* has no images; looked for .jpg, .*, also further down"
    ):
        open_unlabelled(tmp_path, None, ["x"])
    with pytest.raises(UserError, match=r"data.unlabelled.root: .*nowhere does not exist; give a folder of images"):
        open_unlabelled(tmp_path / "nowhere", None, ["x"])
    cut_short(write_image(tmp_path / "a.jpg"))
    with pytest.raises(UnreadableImageError, match=r"a.jpg: cannot be read as an image .* data.unreadable=skip"):
        open_unlabelled(tmp_path, None, ["x"])
    with pytest.raises(UserError, match="all 1 images were skipped"):
        open_unlabelled(tmp_path, None, ["x"], "skip")
    write_image(tmp_path / "b.jpg")
    index = open_unlabelled(tmp_path, None, ["x"], "skip")
    assert [index.file(0)] == ["b.jpg"] and list(index.notes.skipped) == ["a.jpg"]
