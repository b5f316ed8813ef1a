import os
import resource
import signal
import zlib
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from students import DenseOutput
from teachers import CacheError, TeacherCache

KEY = {"teacher's weights": "a" * 64, "data.augment.crop": 0.5}
WANTED = {("features", 1), ("class_logits", 0)}


@dataclass
class Picture:
    number: int
    view: int = 0
    pixels: int = 7
    file: str = "a.jpg"


def say(images, factor=1.0):
    """A teacher without weights: two pyramid levels and one level of scores, of the images' own pixels."""
    x = images * factor
    return DenseOutput((x, x[:, :2, ::2, ::2]), (x[:, :1],), (x,))


@pytest.fixture
def pictures():
    return torch.rand(3, 3, 4, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def make(tmp_path, pictures):
    """A cache of five images in two views, in the folder of that name; opened unless told otherwise."""

    def make(key=KEY, wanted=WANTED, name="bank", warn=pytest.fail, opened=True):
        cache = TeacherCache(tmp_path / name, key, say(pictures[:1]), wanted, images=5, views=2, warn=warn)
        if opened:
            cache.create()
            cache.open()
        return cache

    return make


def refuse(images):
    raise AssertionError("the teacher was asked")


def same(one, other):
    return all(
        torch.equal(x, y) for a, b in zip(one, other) for x, y in zip(a, b) if not (x.is_meta or y.is_meta)
    ) and [x.is_meta for levels in one for x in levels] == [x.is_meta for levels in other for x in levels]


def test_what_was_said_is_remembered_in_half_precision(make, pictures):
    shown = [Picture(4), Picture(0, view=1), Picture(2)]
    first = make().recall(shown, pictures, say)
    again = make().recall(shown, pictures, refuse)
    assert type(again) is DenseOutput and same(first, again)
    live = say(pictures)
    for remembered, asked in ((again.features[1], live.features[1]), (again.class_logits[0], live.class_logits[0])):
        assert remembered.dtype == torch.float32 and torch.equal(remembered, asked.half().float())
    assert not torch.equal(again.class_logits[0], live.class_logits[0])
    # what no loss goes by has its shape, and no values that one could go by
    assert again.features[0].is_meta and again.features[0].shape == live.features[0].shape
    assert again.box_distances[0].is_meta and again.box_logits == ()
    assert make().recall(shown[::-1], pictures, refuse).features[1].equal(first.features[1].flip(0))


def test_the_files_by_hand(tmp_path):
    # (1, 2, 1, 2): two channels, two locations; a record holds one location after the other
    maps = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    output = DenseOutput((maps,), (), ())
    cache = TeacherCache(tmp_path / "c", {}, output, {("features", 0)}, images=3, views=2, warn=pytest.fail)
    assert (cache.record_bytes, cache.records, cache.missing_bytes) == (8, 6, 6 * (8 + 8))
    assert not (tmp_path / "c").exists() and cache.free_bytes > 0
    cache.create()
    cache.open()
    cache.recall([Picture(1, view=1, pixels=99)], maps, lambda images: output)
    values = np.fromfile(tmp_path / "c/values.bin", "<f2").reshape(6, 4)
    assert values.tolist() == [[0.0] * 4] * 3 + [[1, 3, 2, 4]] + [[0.0] * 4] * 2
    index = np.fromfile(tmp_path / "c/index.bin", "<u4").reshape(6, 2)
    assert index[3].tolist() == [zlib.crc32(np.array([1, 3, 2, 4], "<f2").tobytes()), 99]
    assert not index[[0, 1, 2, 4, 5]].any()
    assert (cache.filled, cache.missing_bytes) == (1, 5 * 16)


def test_where_one_is_new_all_are_looked_at_and_the_known_stay(make, pictures):
    cache, seen = make(), []
    known = cache.recall([Picture(0)], pictures[:1], say)

    def ask(images):
        seen.append(len(images))
        return say(images, factor=0.5)

    found = cache.recall([Picture(1), Picture(0), Picture(2)], pictures, ask)
    assert seen == [3]
    assert torch.equal(found.class_logits[0][1], known.class_logits[0][0])
    assert torch.equal(found.class_logits[0][0], (pictures[0, :1] * 0.5).half().float())
    assert same(found, make().recall([Picture(1), Picture(0), Picture(2)], pictures, refuse))


@pytest.mark.parametrize("file", ["values.bin", "index.bin"])
def test_a_record_that_was_half_written_is_made_again(make, pictures, tmp_path, file):
    shown = [Picture(0), Picture(1)]
    first = make().recall(shown, pictures[:2], say)
    content = bytearray((tmp_path / "bank" / file).read_bytes())
    size = len(content) // 10
    content[2 * size : 2 * size + size // 2] = bytes(size // 2)  # of image 1, view 0: its first half is not there
    (tmp_path / "bank" / file).write_bytes(content)
    cache, seen = make(), []
    again = cache.recall(shown, pictures[:2], lambda images: seen.append(len(images)) or say(images))
    assert seen == [2] and same(first, again)
    assert same(first, make().recall(shown, pictures[:2], refuse))


def test_killed_while_it_writes(make, pictures, on_processes):
    """By SIGKILL, after half of the values of the second image."""
    shown = [Picture(0), Picture(1)]

    def act():
        cache, write = make(), []
        file = cache._files[0]

        class Killing:
            seek = file.seek

            def write(self, data):
                write.append(data)
                if len(write) == 2:
                    file.write(data[: len(data) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return file.write(data)

        cache._files = Killing(), cache._files[1]
        cache.recall(shown, pictures[:2], say)

    assert [one.status for one in on_processes(1, act)] == [-signal.SIGKILL]
    cache = make()
    assert cache.filled == 1
    cache.recall(shown[:1], pictures[:1], refuse)
    cache.recall(shown, pictures[:2], say)
    assert cache.filled == 2
    assert torch.equal(
        make().recall(shown[1:], pictures[1:2], refuse).class_logits[0], pictures[1:2, :1].half().float()
    )


def test_two_processes_fill_one_folder(make, pictures, on_processes):
    def act():
        # its own images, and one that both see
        rank, cache = int(os.environ["RANK"]), make()
        for image in (rank, 2 + rank, 4):
            cache.recall([Picture(image)], pictures[image % 3 : image % 3 + 1], say)
        return cache.filled

    ended = on_processes(2, act)
    assert [one.status for one in ended] == [0, 0], ended[0].said + ended[1].said
    cache = make()
    assert cache.filled == 5
    for image in range(5):
        found = cache.recall([Picture(image)], pictures[:1], refuse).class_logits[0]
        assert torch.equal(found, pictures[image % 3 : image % 3 + 1, :1].half().float())


def test_another_picture_is_refused(make, pictures):
    cache = make()
    cache.recall([Picture(3)], pictures[:1], say)
    with pytest.raises(CacheError, match=r"bank holds another picture of b.jpg \(view 0\): the file, or the library"):
        cache.recall([Picture(3, pixels=8, file="b.jpg")], pictures[:1], say)


@pytest.mark.parametrize("value", [7e4, float("nan")])
def test_what_half_precision_does_not_hold_is_not_kept(make, pictures, value):
    cache = make()
    pictures[1, 0, 0, 0] = value
    shown = [Picture(0), Picture(1, file="b.jpg")]
    with pytest.raises(CacheError, match=r"what the teacher says of b.jpg goes beyond half precision \(65504\)"):
        cache.recall(shown, pictures[:2], say)
    assert cache.filled == 0


@pytest.mark.parametrize(
    "key, wanted, said",
    [
        (
            KEY | {"data.augment.crop": 0.0},
            WANTED,
            "is of other settings: data.augment.crop 0.5, now 0.0; name another",
        ),
        (KEY | {"teacher's weights": "b" * 64}, WANTED, "is of other settings: its teacher's weights differ; name"),
        (KEY, WANTED | {("features", 0)}, "has no features 0, which these losses go by (it has features 1, class_log"),
        (KEY | {"teacher's weights": None}, {("features", 1)}, None),  # untrained so far, and fewer losses
        (KEY, {("features", 1)}, None),
    ],
)
def test_a_folder_of_something_else_is_refused(make, pictures, key, wanted, said):
    first = make().recall([Picture(0)], pictures[:1], say)
    if said:
        with pytest.raises(CacheError) as refused:
            make(key, wanted)
        assert said in str(refused.value) and "\n" not in str(refused.value)
    else:
        found = make(key, wanted).recall([Picture(0)], pictures[:1], refuse)
        assert torch.equal(found.features[1], first.features[1]) and found.class_logits[0].is_meta


def test_folders_that_are_no_caches(make, tmp_path):
    (tmp_path / "bank").mkdir()
    make(opened=False)
    (tmp_path / "bank" / "thesis.tex").write_text("x")
    with pytest.raises(CacheError, match=r"bank holds other files \(thesis.tex\); name another folder"):
        make(opened=False)
    (tmp_path / "bank" / "thesis.tex").unlink()
    (tmp_path / "bank" / "cache.json").write_text("{")
    with pytest.raises(CacheError, match=r"cache.json is not what a cache writes; name another folder, or remove this"):
        make(opened=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CacheError, match="file is a file; name a folder"):
        make(name="file", opened=False)
    with pytest.raises(CacheError, match=r"cannot write to .*file/bank \(Not a directory\); name another folder"):
        make(name="file/bank")


def test_a_full_disk_costs_no_training(make, pictures):
    told = []
    cache = make(warn=told.append)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    shown = [Picture(0), Picture(1), Picture(2)]
    # room for the first record and half of the third; what comes after is refused
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(2.5 * cache.record_bytes), hard))
    try:
        first = cache.recall(shown, pictures, say)
        second = cache.recall(shown, pictures, say)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert same(first, second)
    assert len(told) == 1 and "takes no more records (" in told[0] and "training goes on" in told[0]
    assert make().filled == 1 and same(first, make().recall(shown, pictures, say)) and make().filled == 3


@pytest.mark.parametrize("missing", [0, 1])
def test_a_cache_can_be_read_where_nothing_can_be_written(make, pictures, monkeypatch, missing):
    first = make()
    shown = [Picture(image, view) for image in range(5) for view in range(2)]
    for one in shown[missing:]:
        first.recall([one], pictures[:1], say)
    opened = type(first.folder).open

    def open_to_read(path, mode="r", *arguments, **more):
        if set(mode) & set("wa+"):
            raise PermissionError(13, "Permission denied")
        return opened(path, mode, *arguments, **more)

    monkeypatch.setattr(type(first.folder), "open", open_to_read)
    told = []
    cache = make(warn=told.append)
    expected = pictures[:1, :1].half().float()
    assert torch.equal(cache.recall([Picture(4, 1)], pictures[:1], refuse).class_logits[0], expected)
    assert [" and has 9 of 10 records; the teacher is asked for the others" in one for one in told] == [True] * missing
    for _ in range(2 * missing):
        assert torch.equal(cache.recall(shown[:1], pictures[:1], say).class_logits[0], expected)
    assert cache.filled == 10 - missing


@pytest.mark.parametrize(
    "other, said",
    [
        ({"key": KEY | {"seed": 1}}, "bank is of other settings: seed"),
        ({"wanted": {("class_logits", 0)}}, "other losses"),
    ],
)
def test_of_two_runs_that_start_together_one_makes_the_folder(make, pictures, other, said):
    first, second, same_again = make(opened=False), make(opened=False, **other), make(opened=False)
    first.create()
    first.open()
    kept = first.recall([Picture(0)], pictures[:1], say)
    with pytest.raises(CacheError, match=said):
        second.create()
    same_again.create()
    same_again.open()
    assert same(kept, same_again.recall([Picture(0)], pictures[:1], refuse))
