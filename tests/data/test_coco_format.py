import json

import pytest

from distill.data import open_index
from distill.errors import UserError


@pytest.fixture
def content():
    """Two images, the second without boxes; category ids are neither dense nor in order."""
    return {
        "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 3, "file_name": "b.jpg"}],
        "categories": [{"id": 9, "name": "cat"}, {"id": 4, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 9, "bbox": [1, 2, 10, 20], "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 4, "bbox": [5, 6, 7, 8], "iscrowd": 1},
        ],
    }


@pytest.fixture
def write(tmp_path, write_image):
    def write(content, json_file="annotations/train.json", images="train"):
        path = tmp_path / json_file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        for name in ("a.jpg", "b.jpg"):
            write_image(tmp_path / images / name)
        return tmp_path

    return write


@pytest.mark.parametrize(
    "json_file, images",
    [
        ("annotations/train.json", "train"),
        ("annotations/train.json", "images/train"),
        ("annotations/train.json", "images"),
        ("annotations/train.json", "."),
        ("annotations/instances_train.json", "train"),
        ("train/_annotations.coco.json", "train"),
    ],
)
def test_layouts(content, write, json_file, images):
    root = write(content, json_file, images)
    index = open_index(root, "train")
    assert (index.format, index.split, len(index)) == ("COCO", "train", 2)
    assert index.path(0) == root / images / "a.jpg"
    assert index.class_names == ("dog", "cat")
    assert index.boxes.tolist() == [[1, 2, 11, 22], [5, 6, 12, 14]]
    assert index.labels.tolist() == [1, 0]
    assert index.ignored.tolist() == [False, True]
    assert index.offsets.tolist() == [0, 2, 2]
    assert index.image_ids.tolist() == [7, 3]
    assert index.sizes.tolist() == [[48, 64], [48, 64]]


def test_other_tasks_are_no_splits(content, write):
    root = write(content)
    (root / "annotations" / "captions_train.json").write_text("{}")
    with pytest.raises(UserError, match=r"no split 'trian' \(did you mean 'train'\?\); it has train$"):
        open_index(root, "trian")


def test_malformed_json_names_the_line(content, write):
    root = write(content)
    (root / "annotations" / "train.json").write_text('{"images": [],\n "annotations": [}')
    with pytest.raises(UserError, match=r"train\.json: line 2: not valid JSON"):
        open_index(root, "train")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.pop("categories"), "lacks the required field 'categories'; a COCO file"),
        (lambda c: c["images"][1].pop("file_name"), r"images\[1\]: lacks the required field 'file_name'"),
        (lambda c: c["images"][1].update(id=7), r"images\[1\]\.id 7 occurs twice"),
        (lambda c: c["images"][1].update(id="x"), r"images\[1\]\.id: expected 'int', got 'str'"),
        (lambda c: c["categories"][0].pop("name"), r"categories\[0\]: lacks the required field 'name'"),
        (lambda c: c["annotations"][1].update(image_id=8), r"annotations\[1\]: image_id 8 is not among"),
        (lambda c: c["annotations"][1].update(image_id=[8]), r"annotations\[1\].image_id: expected 'int', got 'array'"),
        (lambda c: c["annotations"][1].update(category_id=1), r"annotations\[1\]: category_id 1 is not among"),
        (lambda c: c["annotations"][1].pop("image_id"), r"annotations\[1\]: lacks the required field 'image_id'"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, 3]), r"annotations\[1\].bbox: expected 'array' of length 4"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, 3, float("nan")]), r"annotations\[1\]: bbox is"),
        (lambda c: c["annotations"].append("x"), r"annotations\[2\]: expected 'object', got 'str'"),
    ],
)
def test_malformed_entries(content, write, change, message):
    change(content)
    root = write(content)
    with pytest.raises(UserError, match=message) as caught:
        open_index(root, "train")
    assert "train.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_split_without_images(content, write):
    content["images"] = content["annotations"] = []
    root = write(content)
    with pytest.raises(UserError, match=r"train\.json: train: the split has no images"):
        open_index(root, "train")


def test_data_set_without_classes(content, write):
    content["categories"] = content["annotations"] = []
    root = write(content)
    with pytest.raises(UserError, match="is empty; at least one class is needed"):
        open_index(root, "train")


def test_real_debris(shared_data):
    train, val = open_index(shared_data / "fod", "train"), open_index(shared_data / "fod", "val")
    assert (len(train), len(val)) == (2475, 825)
    assert (len(train.boxes), len(val.boxes), len(train.class_names)) == (2520, 840, 31)
    assert train.class_names[:2] == ("AdjustableClamp", "AdjustableWrench")
