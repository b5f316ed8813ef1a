import pytest

from distill.data import open_index
from distill.errors import UserError

OBJECT = """
  <object><name>{name}</name><difficult>{difficult}</difficult>
    <bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"""


@pytest.fixture
def write(tmp_path, write_image):
    """Writes images with their objects, (name, difficult, x1, y1, x2, y2) each, and the list of a split."""

    def write(objects_of, split="train"):
        for name, objects in objects_of.items():
            write_image(tmp_path / "JPEGImages" / f"{name}.jpg")
            keys = ("name", "difficult", "x1", "y1", "x2", "y2")
            text = "".join(OBJECT.format(**dict(zip(keys, values))) for values in objects)
            path = tmp_path / "Annotations" / f"{name}.xml"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"<annotation>{text}\n</annotation>")
        path = tmp_path / "ImageSets" / "Main" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(objects_of) + "\n")
        return tmp_path

    return write


def test_boxes_count_from_one_and_include_both_corners(write):
    root = write({"a": [("dog", 0, 1, 1, 64, 48), ("cat", 1, 11, 12, 20, 30)], "b": []})
    index = open_index(root, "train")
    assert (index.format, index.class_names) == ("VOC", ("cat", "dog"))
    assert index.boxes.tolist() == [[0, 0, 64, 48], [10, 11, 20, 30]]
    assert index.labels.tolist() == [1, 0]
    assert index.ignored.tolist() == [False, True]
    assert index.offsets.tolist() == [0, 2, 2]
    assert index.notes.summary() == []


def test_boxes_that_count_from_zero_are_clipped_without_a_note(write):
    index = open_index(write({"a": [("dog", 0, 0, 0, 64, 48)]}), "train")
    assert index.boxes.tolist() == [[0, 0, 64, 48]]
    assert index.notes.clipped == {}


def test_classes_are_those_of_all_splits(write):
    write({"a": [("dog", 0, 1, 1, 9, 9)]}, "train")
    root = write({"b": [("cat", 0, 1, 1, 9, 9)]}, "val")
    index = open_index(root, "train")
    assert index.class_names == ("cat", "dog")
    assert index.labels.tolist() == [1]


def test_lists_of_classes_are_no_splits(write):
    root = write({"a": []}, "train")
    (root / "ImageSets" / "Main" / "dog_train.txt").write_text("a -1\n")
    with pytest.raises(UserError, match=r"no split 'val'; it has train$"):
        open_index(root, "val")


def test_malformed_xml_names_the_line(write):
    root = write({"a": []})
    (root / "Annotations" / "a.xml").write_text("<annotation>\n<object></annotation>")
    with pytest.raises(UserError, match=r"a\.xml: line 2: not valid XML"):
        open_index(root, "train")


@pytest.mark.parametrize(
    "values, message",
    [
        (("", 0, 1, 1, 9, 9), r"a\.xml: object 1 has no <name>"),
        (("dog", 0, 1, "x", 9, 9), r"a\.xml: object 1 \(dog\): bndbox is \['1', 'x', '9', '9'\]"),
        (("dog", 0, 1, "nan", 9, 9), r"a\.xml: object 1 \(dog\): bndbox is"),
    ],
)
def test_malformed_objects(write, values, message):
    with pytest.raises(UserError, match=message):
        open_index(write({"a": [values]}), "train")


def test_missing_xml(write):
    root = write({"a": [("dog", 0, 1, 1, 9, 9)], "b": []})
    (root / "Annotations" / "b.xml").unlink()
    with pytest.raises(UserError, match=r"train\.txt: names 'b', but .*b\.xml does not exist"):
        open_index(root, "train")


def test_missing_image(write):
    root = write({"a": [("dog", 0, 1, 1, 9, 9)]})
    (root / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(
        UserError, match=r"a\.jpg: the image does not exist; .*a\.xml names it; .*data\.unreadable=skip"
    ):
        open_index(root, "train")


def test_real_blood_cells(shared_data):
    splits = {split: open_index(shared_data / "bccd", split) for split in ("train", "val", "test")}
    assert [len(index) for index in splits.values()] == [205, 87, 72]
    assert all(index.class_names == ("Platelets", "RBC", "WBC") for index in splits.values())
    assert splits["train"].notes.zero_area == {"BloodImage_00343.jpg": 1}
    assert splits["val"].notes.zero_area == {"BloodImage_00338.jpg": 1}
    assert splits["test"].notes.zero_area == {}
    assert sum(len(index.boxes) for index in splits.values()) == 4888 - 2
