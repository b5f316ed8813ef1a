import json

import pytest
from pycocotools.coco import COCO

from distill.data import open_index
from distill.errors import UserError


@pytest.fixture
def root(tmp_path, write_image):
    """Three 64x48 images of cats and dogs; boxes of image b reach outside or have no area."""
    boxes = [
        (1, 1, [1, 2, 10, 20], 0),
        (1, 2, [5, 6, 7, 8], 1),
        (2, 1, [-5, -6, 25, 26], 0),  # clipped
        (2, 1, [50, 40, 14.5, 8.5], 0),  # half a pixel outside: rounding, no note
        (2, 2, [10, 10, 0, 5], 0),  # no area
        (2, 2, [70, 10, 5, 5], 0),  # no area once clipped
        (2, 2, [20, 20, -3, 5], 0),  # turned round: no area
        (3, 2, [0, 0, 64, 48], 0),
    ]
    content = {
        "images": [{"id": number, "file_name": f"{name}.png"} for number, name in enumerate("abc", 1)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"id": number, "image_id": image, "category_id": category, "bbox": box, "iscrowd": crowd}
            for number, (image, category, box, crowd) in enumerate(boxes)
        ],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "train.json").write_text(json.dumps(content))
    for name in "abc":
        write_image(tmp_path / "images" / f"{name}.png")
    return tmp_path


def test_boxes_are_clipped_and_those_without_area_dropped(root):
    index = open_index(root, "train")
    assert index.boxes_of(1).tolist() == [[0, 0, 20, 20], [50, 40, 64, 48]]
    assert index.labels_of(1).tolist() == [0, 0]
    assert index.ignored_of(0).tolist() == [False, True]
    assert index.notes.clipped == {"b.png": 1}
    assert index.notes.zero_area == {"b.png": 3}
    assert index.notes.summary() == ["3 boxes without area dropped (b.png: 3)", "1 boxes clipped (b.png: 1)"]


def test_to_coco_is_what_pycocotools_reads(root):
    index = open_index(root, "train")
    content = index.to_coco()
    assert content["categories"] == [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
    assert content["images"][2] == {"id": 3, "file_name": "c.png", "height": 48, "width": 64}
    assert content["annotations"][1] == {
        "id": 2, "image_id": 1, "category_id": 1, "bbox": [5.0, 6.0, 7.0, 8.0], "area": 56.0, "iscrowd": 1,
    }  # fmt: skip
    coco = COCO()
    coco.dataset = json.loads(json.dumps(content))
    coco.createIndex()
    assert coco.getAnnIds(imgIds=[2]) == [3, 4]


def test_classes_set_the_order_of_labels(root):
    index = open_index(root, "train", classes=["dog", "horse", "cat"])
    assert index.class_names == ("dog", "horse", "cat")
    assert index.labels.tolist() == [2, 0, 2, 2, 0]


def test_class_map_renames_merges_and_drops(root):
    index = open_index(root, "train", classes=["pet"], class_map={"cat": "pet", "dog": "pet"})
    assert index.labels.tolist() == [0, 0, 0, 0, 0]
    index = open_index(root, "train", class_map={"cat": None})
    assert index.class_names == ("dog",)
    assert index.offsets.tolist() == [0, 1, 1, 2]
    assert index.notes.clipped == {}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"classes": ["dog", "Cats"]},
            r"train\.json: image a\.png: class 'cat' is not a class of the detector \(did you mean 'Cats'\?\); "
            r"allowed are dog, Cats; name it in data\.classes, or give data\.class_map",
        ),
        ({"classes": []}, r"data\.classes: the list of classes for .* is empty"),
        ({"class_map": {"cat": None, "dog": None}}, r"data\.classes: the list of classes for .* is empty"),
        ({"classes": ["cat", "dog", "cat"]}, r"data\.classes: 'cat' is listed twice"),
        ({"class_map": {"kat": "cat"}}, r"data\.class_map: .* has no class 'kat' \(did you mean 'cat'\?\)"),
        (
            {"classes": ["feline", "dog"], "class_map": {"cat": "felin"}},
            r"data\.class_map\.cat: 'felin' is not a class of the detector \(did you mean 'feline'\?\)",
        ),
        ({"unreadable": "ignore"}, r"data\.unreadable: found 'ignore'; allowed are 'error' and 'skip'"),
    ],
)
def test_class_errors(root, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        open_index(root, "train", **arguments)
    assert "\n" not in str(caught.value)


def test_class_without_boxes_need_not_be_known(root):
    path = root / "annotations" / "train.json"
    content = json.loads(path.read_text())
    content["categories"].append({"id": 3, "name": "horse"})
    path.write_text(json.dumps(content))
    assert open_index(root, "train", classes=["cat", "dog"]).class_names == ("cat", "dog")


def test_root_errors(tmp_path):
    with pytest.raises(UserError, match=r"data\.root: .*nowhere does not exist"):
        open_index(tmp_path / "nowhere", "train")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.root: .*file is not a folder"):
        open_index(tmp_path / "file", "train")
    with pytest.raises(UserError, match=r"no annotations found in .*; looked for COCO: .*; VOC: .*; YOLO: "):
        open_index(tmp_path, "train")


def test_missing_images(root):
    (root / "images" / "b.png").unlink()
    with pytest.raises(UserError, match=r"b\.png: the image does not exist; .*train\.json names it"):
        open_index(root, "train")
    index = open_index(root, "train", unreadable="skip")
    assert index.image_ids.tolist() == [1, 3]
    assert [index.file(i) for i in range(2)] == ["a.png", "c.png"]
    assert index.boxes.tolist() == [[1, 2, 11, 22], [5, 6, 12, 14], [0, 0, 64, 48]]
    assert list(index.notes.skipped) == ["b.png"]
    assert index.notes.zero_area == {}
    assert index.notes.summary() == ["1 images skipped (b.png)"]


def test_truncated_image_is_found_at_opening(root, cut_short):
    cut_short(root / "images" / "a.png")
    with pytest.raises(UserError, match=r"a\.png: cannot be read as an image"):
        open_index(root, "train")
    assert len(open_index(root, "train", unreadable="skip")) == 2


def test_all_images_skipped(root):
    for name in "abc":
        (root / "images" / f"{name}.png").write_text("no image")
    with pytest.raises(UserError, match="train: all 3 images were skipped"):
        open_index(root, "train", unreadable="skip")
