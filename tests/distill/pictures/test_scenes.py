import numpy as np
import pytest
import torch

from distill.data import Batch, DetectionDataset, build_resize, open_index
from distill.pictures import sheets
from distill.pictures.scenes import Look, Scene, choose_samples, look, make_scenes, pack, read_scenes, with_looks
from distill.pictures.style import CLASSES
from students import DenseOutput, Detections


@pytest.fixture
def samples(scenes):
    """Four images of 64x64 pixels, in inputs of 64x96, so that a third is padding."""
    return choose_samples(DetectionDataset(open_index(scenes, "val"), build_resize((64, 96))))


class Known(torch.nn.Module):
    """Sees what it is told to, and its pyramid is the image's own first channel, negated, and a level of ones."""

    strides = (8, 16)

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        fine = -images[:, :1, ::8, ::8].expand(-1, 4, -1, -1)
        return DenseOutput((fine, torch.ones(1, 4, 4, 6)), (), ())

    def decode(self, output, image_sizes):
        self.image_sizes = image_sizes
        return [
            Detections(torch.tensor([[1.0, 2, 30, 40], [0, 0, 9, 9]]), torch.tensor([0.9, 0.29]), torch.tensor([1, 0]))
        ]


def test_images_with_objects_are_spread_over_the_split(samples, scenes):
    assert len(samples) == 4 and all(len(sample.boxes) for sample in samples)
    dataset = DetectionDataset(open_index(scenes, "train"), build_resize((64, 64)))  # 8 images
    assert [s.meta.file for s in choose_samples(dataset, 2)] == [dataset[i].meta.file for i in (0, 4)]


@pytest.mark.parametrize("strides", [(8, 16), (8.0, 16.0)])  # whole ones, and those of a teacher of another image size
def test_a_look_is_what_is_sure_and_where_the_pyramid_is_active(samples, strides, tmp_path):
    detector = Known().train()
    detector.strides = strides
    seen = look(detector, samples[:1])[0]
    assert seen.boxes.tolist() == [[1, 2, 30, 40]] and seen.scores.tolist() == pytest.approx([0.9])
    assert seen.labels.tolist() == [1]
    # without the padding: 64 of 96 columns are image, 8 of 12 cells and 4 of 6
    expected = samples[0].image[:64:8, :64:8, 0] / 255
    assert np.allclose(seen.attention[8], expected, atol=1e-6)
    assert np.array_equal(seen.attention[16], np.ones((4, 4)))
    assert detector.training and detector.image_sizes == [(64, 64)]
    np.savez(tmp_path / "scenes.npz", **pack(with_looks(make_scenes(samples[:1]), "teacher", [seen]), []))
    ((kept,), _) = read_scenes(tmp_path / "scenes.npz")
    assert list(kept.looks["teacher"].attention) == [8, 16]


def test_scenes_come_back_from_their_file(samples, tmp_path):
    scenes = with_looks(make_scenes(samples), "teacher", look(Known(), samples))
    scenes = with_looks(scenes, "student", look(Known(), samples))
    np.savez_compressed(tmp_path / "scenes.npz", **pack(scenes, ["a", "b"]))
    read, class_names = read_scenes(tmp_path / "scenes.npz")
    assert class_names == ["a", "b"] and len(read) == 4
    for one, other in zip(scenes, read):
        assert one.image.shape == (64, 64, 3) and np.array_equal(one.image, other.image)
        assert np.array_equal(one.boxes, other.boxes) and np.array_equal(one.labels, other.labels)
        assert list(one.looks) == list(other.looks) == ["teacher", "student"]
        for name, seen in one.looks.items():
            assert np.array_equal(seen.boxes, other.looks[name].boxes)
            assert all(np.array_equal(seen.attention[s], other.looks[name].attention[s]) for s in (8, 16))


def scene(**looks):
    image = np.full((40, 60, 3), 200, np.uint8)
    return Scene(image, np.array([[0, 0, 10, 10], [5, 5, 20, 30.0]], np.float32), np.array([0, 1]), looks)


def seen(*strides):
    return Look(np.array([[0, 0, 10, 10.0]]), np.array([0.9]), np.array([1]), {s: np.ones((3, 4)) for s in strides})


def test_mosaic_shows_truth_teacher_and_student():
    figure = sheets.draw_mosaic([scene(student=seen(8), teacher=seen(8))] * 2, ["a", "b"])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["truth", "teacher", "student", "", "", ""]
    # two edges a box, the dark one below: two boxes are true, each detector sees one
    assert [len(axes.patches) for axes in figure.axes] == [4, 2, 2, 4, 2, 2]
    assert figure.axes[1].patches[1].get_edgecolor()[:3] == pytest.approx(
        [int(CLASSES[1][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    )
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_more_classes_than_colours_are_named_at_their_boxes():
    names = [f"class {i}" for i in range(9)]
    figure = sheets.draw_mosaic([scene(student=seen(8))], names)
    assert not figure.legends
    assert [text.get_text() for text in figure.axes[0].texts] == ["class 0", "class 1"]


def test_attention_of_every_level_side_by_side():
    # the teacher has a level more; where the student has none, its image is left bare
    figure = sheets.draw_attention([scene(student=seen(8), teacher=seen(8, 16))])
    assert [axes.get_title() for axes in figure.axes[:3]] == ["image", "stride 8", "stride 16"]
    assert [len(axes.images) for axes in figure.axes] == [1, 2, 2, 1, 2, 1]
    # a cell covers its stride in pixels, beyond the image's edge too
    assert figure.axes[1].images[1].get_extent() == [-0.5, 31.5, 23.5, -0.5]
    assert figure.axes[1].get_xlim() == (-0.5, 59.5)


def test_a_batch_with_its_boxes():
    boxes = [{"boxes": torch.tensor([[0.0, 0, 9, 9]]), "labels": torch.tensor([0])}] * 2 + [
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    ]
    figure = sheets.draw_batch(Batch(torch.rand(3, 3, 32, 64), boxes, [], []), ["a"])
    assert [len(axes.patches) for axes in figure.axes] == [2, 2, 0, 0]
    assert sheets.draw_batch(Batch(torch.rand(0, 3, 32, 64), [], [], []), ["a"]) is None


def test_no_images_no_sheets():
    assert sheets.draw_mosaic([], []) is None and sheets.draw_attention([]) is None
