import hashlib
import json

import numpy as np
import pytest

from distill.data import open_index, synthetic
from distill.data.shapes import CLASSES
from distill.data.synthetic import draw_scene, draw_scenes, main
from distill.errors import UserError


def digest(root):
    """One number for all files, by name and content."""
    total = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file():
            total.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return total.hexdigest()


def times(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob("*.*")}


def test_scenes_open_as_a_data_set(tmp_path):
    root = draw_scenes(tmp_path / "scenes", train=12, val=5, image_size=96)
    train, val = open_index(root, "train"), open_index(root, "val")
    assert (train.format, len(train), len(val)) == ("COCO", 12, 5)
    assert train.class_names == val.class_names == tuple(CLASSES)
    assert (train.sizes == 96).all()
    assert train.notes.summary() == []
    assert 2 * 12 <= len(train.boxes) <= 8 * 12
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]  # nothing is left aside


def test_scenes_hold_every_class_at_many_sizes():
    scenes = [draw_scene(np.random.default_rng(seed), 128, 8, 5) for seed in range(60)]
    boxes, labels = (np.concatenate([scene[i] for scene in scenes]) for i in (1, 2))
    sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    assert set(labels.tolist()) == set(range(len(CLASSES)))
    assert sides.min() < 14
    assert 45 < sides.max() <= 67  # half the image, and a pixel for each smoothed edge
    assert boxes.min() >= 0
    assert boxes.max() <= 128


def test_same_settings_same_bytes(tmp_path):
    digests = [digest(draw_scenes(tmp_path / name, train=3, val=2, image_size=64, seed=4)) for name in "ab"]
    assert digests[0] == digests[1]
    assert digest(draw_scenes(tmp_path / "c", train=3, val=2, image_size=64, seed=5)) != digests[0]


def test_more_scenes_leave_the_first_ones_as_they_were(tmp_path):
    few, many = (draw_scenes(tmp_path / str(n), train=n, val=1, image_size=64) for n in (2, 4))
    image = "images/train/000002.jpg"
    assert (few / image).read_bytes() == (many / image).read_bytes()


def test_scenes_on_disk_are_reused(tmp_path):
    root = draw_scenes(tmp_path, train=2, val=1, image_size=64)
    before = times(root)
    draw_scenes(tmp_path, train=2, val=1, image_size=64)
    assert times(root) == before


def test_scenes_of_other_settings_are_left_alone(tmp_path):
    root = draw_scenes(tmp_path / "scenes", train=2, val=1, image_size=64)
    whole = digest(root)
    with pytest.raises(UserError, match=r"scenes: holds scenes drawn with train 2, not 3; give another folder"):
        draw_scenes(root, train=3, val=1, image_size=64)
    with pytest.raises(UserError, match="drawn with seed 0, not 1"):
        draw_scenes(root, train=2, val=1, image_size=64, seed=1)
    assert digest(root) == whole


def test_older_or_incomplete_scenes_are_redrawn(tmp_path, monkeypatch):
    root = draw_scenes(tmp_path / "scenes", train=2, val=1, image_size=64)
    with monkeypatch.context() as older:
        older.setattr(synthetic, "DRAWER", "distill.data.synthetic 0")
        draw_scenes(root, train=3, val=1, image_size=64)
    draw_scenes(root, train=2, val=1, image_size=64)
    assert len(open_index(root, "train")) == 2
    whole = digest(root)
    for lost in ("images/train/000002.jpg", "annotations/val.json", "annotations/train.json"):
        (root / lost).unlink()
        draw_scenes(root, train=2, val=1, image_size=64)
        assert digest(root) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "train.json").write_text(json.dumps({"info": {"description": "mine"}}))
    before = digest(tmp_path)
    with pytest.raises(UserError, match="holds something other than drawn scenes"):
        draw_scenes(tmp_path, train=2, val=1)
    assert digest(tmp_path) == before
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: holds something other"):
        draw_scenes(tmp_path / "file", train=2, val=1)


@pytest.mark.parametrize("setting, least", [("train", 1), ("val", 1), ("image_size", 42), ("seed", 0)])
def test_numbers_that_are_too_small(tmp_path, setting, least):
    with pytest.raises(UserError, match=rf"{setting}: found {least - 1}; at least {least} is needed"):
        draw_scenes(tmp_path / "scenes", **{setting: least - 1})


def test_command_line(tmp_path, capsys):
    command = [str(tmp_path / "scenes"), "--val", "1", "--image-size", "64"]
    assert main([*command, "--train", "2"]) == 0
    assert "2 training and 1 validation scenes of disc, ring" in capsys.readouterr().out
    assert len(open_index(tmp_path / "scenes", "train")) == 2
    assert main([*command, "--train", "0"]) == 2
    assert capsys.readouterr().err == "train: found 0; at least 1 is needed\n"
