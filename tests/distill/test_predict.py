"""Boxes come back in the pixels of the image that was given, and what cannot be done is one line."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import students
from distill import predict as command
from distill.errors import UserError
from distill.predict import class_color, draw, predict
from students import Detections, Detector


class Oracle(Detector):
    """Finds the same two boxes in every 64x64 input, and keeps what it saw."""

    strides = feature_channels = output_layers = ()
    normalization = ((0.0,) * 3, (1.0,) * 3)

    def __init__(self, **info):
        super().__init__()
        self.class_names = ["cat", "dog"]
        self.info = {"image_size": [64, 64], **info}
        self.sizes = None

    def forward(self, images):
        self.images = images
        return images

    def loss(self, output, targets):
        raise NotImplementedError

    def decode(self, output, image_sizes):
        self.sizes = image_sizes
        boxes = torch.tensor([[16.0, 8, 32, 24], [0, 0, 64, 64]])
        return [Detections(boxes, torch.tensor([0.75, 0.25]), torch.tensor([1, 0]))]


def test_boxes_are_in_pixels_of_the_original():
    # 200x100 letterboxed into 64x64: 0.32 of its size, 64x32, the rest padding
    pixels = np.full((100, 200, 3), 255, np.uint8)
    detector = Oracle().train()
    found = predict(detector, pixels, threshold=0.2)
    assert detector.sizes == [(32, 64)] and detector.training
    assert detector.images[0, 0, :32].min() == 1 and detector.images[0, 0, 32:].max() < 0.5
    torch.testing.assert_close(found.boxes, torch.tensor([[50.0, 25, 100, 75], [0, 0, 200, 100]]))
    assert found.labels.tolist() == [1, 0]
    assert predict(detector, pixels).scores.tolist() == [0.75]  # 0.3 otherwise


def test_the_fit_is_that_of_the_training():
    detector = Oracle(resize="stretch")
    found = predict(detector, np.zeros((100, 200, 3), np.uint8))
    assert detector.sizes == [(64, 64)]
    torch.testing.assert_close(found.boxes, torch.tensor([[50.0, 12.5, 100, 37.5]]))


def test_a_file_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (200, 100)).save(tmp_path / "a.jpg", exif=exif)
    found = predict(Oracle(), tmp_path / "a.jpg")
    torch.testing.assert_close(found.boxes, torch.tensor([[50.0, 25, 100, 75]]))  # of 100x200: by 1 / 0.32 again
    assert predict(Oracle(), str(tmp_path / "a.jpg"), threshold=0).boxes[1].tolist() == [0, 0, 100, 200]


@pytest.mark.parametrize("pixels", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32)])
def test_pixels_of_another_kind(pixels):
    with pytest.raises(ValueError, match=r"image: found .*; \(H, W, 3\) uint8 RGB is needed"):
        predict(Oracle(), pixels)


def test_a_detector_that_does_not_know_its_size(build_tiny):
    with pytest.raises(UserError, match="image_size: nothing beside the detector tells it"):
        predict(build_tiny(), np.zeros((8, 8, 3), np.uint8))


def test_drawing():
    pixels = np.full((120, 160, 3), 128, np.uint8)
    boxes = torch.tensor([[20.0, 40, 120, 100], [100, 0, 159, 30]])
    drawn = np.asarray(draw(pixels, Detections(boxes, torch.tensor([0.5, 0.9]), torch.tensor([0, 1])), ["cat", "dog"]))
    assert (pixels == 128).all()
    assert tuple(drawn[99, 70]) == tuple(drawn[70, 20]) == class_color(0)
    assert (drawn[70, 70] == 128).all() and (drawn[110, 70] == 128).all()
    assert tuple(drawn[29, 130]) == class_color(1)
    label = drawn[24:40, 20:60].reshape(-1, 3)  # above the box: its colour, and letters on it
    assert len(np.unique(label, axis=0)) > 2


def test_neighbouring_classes_differ():
    colors = np.array([class_color(label) for label in range(8)]).astype(int)
    apart = np.abs(colors[:, None] - colors).sum(-1) + 999 * np.eye(8, dtype=int)
    assert apart.min() > 60


@pytest.fixture
def student(build_tiny, tmp_path):
    students.save(build_tiny(), tmp_path / "student", {"image_size": [64, 64], "resize": "letterbox"})
    return tmp_path / "student"


@pytest.fixture
def photos(tmp_path):
    """Two images at different depths, one cut short, one file that is none."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (50, 100, 3), np.uint8)
    Image.fromarray(noise).save(folder / "b.png")
    Image.fromarray(noise).save(folder / "more/a.JPG")
    (folder / "more/cut.jpg").write_bytes((folder / "more/a.JPG").read_bytes()[:600])
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
        capsys.readouterr()
        status = command.main()
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_a_folder(run, student, photos, tmp_path):
    output = photos / "found"  # inside: a second run must not take drawings for images
    for _ in range(2):
        status, out, err = run(student, photos, "--output", output, "--threshold", 0)
        assert status == 0 and err == "", err
        assert out.startswith("2 images, ") and "skipped 1 file of other kinds than .jpg, " in out
        assert "warning: 1 image cannot be read: more/cut.jpg" in out
    results = json.loads((output / "detections.json").read_text())
    assert [(entry["file"], entry["width"], entry["height"]) for entry in results["images"]] == [
        ("b.png", 100, 50),
        ("more/a.JPG", 100, 50),
    ]
    assert results["unreadable"] == ["more/cut.jpg"] and results["threshold"] == 0
    first = results["images"][0]["detections"][0]
    assert f"{sum(len(entry['detections']) for entry in results['images'])} detections (" in out
    whole = predict(students.load(student), photos / "b.png", threshold=0)
    assert first["class"] == ["a", "b"][whole.labels[0]]
    assert first["box"] == pytest.approx(whole.boxes[0].tolist(), abs=0.01)
    assert Image.open(output / "b.png").size == Image.open(output / "more/a.JPG").size == (100, 50)


def test_what_a_user_can_get_wrong(run, student, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("no image")
    before = sorted(tmp_path.rglob("*"))

    def refused(*arguments, part, output=tmp_path / "found"):
        status, _, err = run(*arguments, "--output", output)
        assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and part in err, err
        assert sorted(tmp_path.rglob("*")) == before

    refused(student, tmp_path / "nowhere.jpg", part="nowhere.jpg: no such image or folder")
    refused(student, tmp_path / "empty", part="empty: holds no images (.jpg, ")
    refused(student, tmp_path / "texts", part=", but 1 other file")
    refused(student, photos / "notes.txt", part="notes.txt: cannot be read as an image")
    refused(student, photos / "more/cut.jpg", part="cut.jpg: cannot be read as an image")
    refused(photos, photos, part="is no detector folder, it has no detector.json")
    refused(tmp_path / "a.onnx", photos, part="a.onnx: no such file; make it with python -m distill.export")
    refused(student, photos, "--threshold", 30, part="--threshold: found 30; a score from 0 to 1 is needed")
    refused(student, photos, output=photos / "b.png", part="b.png is a file; a folder is needed")
    refused(student, photos, output=photos, part="photos holds other files; give a new folder")
