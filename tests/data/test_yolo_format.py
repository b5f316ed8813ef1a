import pytest
import yaml

from distill.data import open_index
from distill.errors import UserError


@pytest.fixture
def write(tmp_path, write_image):
    """Writes images below `images/train` with their label files' text, None for no file."""

    def write(texts, **settings):
        for name, text in texts.items():
            write_image(tmp_path / "images" / "train" / f"{name}.jpg")
            path = tmp_path / "labels" / "train" / f"{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            if text is not None:
                path.write_text(text)
        settings = {"train": "images/train", "names": ["king", "ace"], **settings}
        (tmp_path / "data.yaml").write_text(yaml.safe_dump(settings))
        return tmp_path

    return write


BOX = "1 0.5 0.5 0.25 0.5\n"  # of a 64x48 image: 24, 12, 40, 36


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"names": {0: "king", 1: "ace"}},
        {"path": "."},
        {"path": "/of/another/machine"},
        {"train": ["images/train"]},
        {"train": "../images/train"},
        {"nc": 2, "download": "https://example.org/x.zip"},
    ],
)
def test_layouts(write, settings):
    root = write({"a": BOX, "b": None, "c": ""}, **settings)
    index = open_index(root, "train")
    assert (index.format, index.class_names) == ("YOLO", ("king", "ace"))
    assert [index.path(i) for i in range(3)] == [
        root / "images" / "train" / name for name in ("a.jpg", "b.jpg", "c.jpg")
    ]
    assert index.boxes.tolist() == [[24, 12, 40, 36]]
    assert index.labels.tolist() == [1]
    assert index.offsets.tolist() == [0, 1, 1, 1]


def test_split_as_a_list_of_images(write):
    root = write({"a": BOX, "b": BOX}, train="train.txt")
    (root / "train.txt").write_text("./images/train/b.jpg\n")
    index = open_index(root, "train")
    assert [index.file(i) for i in range(len(index))] == ["images/train/b.jpg"]
    assert index.boxes.tolist() == [[24, 12, 40, 36]]


def test_images_and_labels_in_each_splits_folder(tmp_path, write_image):
    write_image(tmp_path / "train" / "images" / "a.jpg")
    (tmp_path / "train" / "labels").mkdir()
    (tmp_path / "train" / "labels" / "a.txt").write_text(BOX)
    (tmp_path / "data.yaml").write_text("train: train/images\nnames: [king, ace]\n")
    assert open_index(tmp_path, "train").boxes.tolist() == [[24, 12, 40, 36]]


@pytest.mark.parametrize("line", ["1 0.5 0.5 0.25", "1 0.5 0.5 0.25 0.5 0.9", "x 0.5 0.5 0.25 0.5", "1 32 24 16 24"])
def test_malformed_line(write, line):
    root = write({"a": BOX + line})
    with pytest.raises(UserError, match=rf"a\.txt: line 2: found '{line}'"):
        open_index(root, "train")


@pytest.mark.parametrize("label", [2, -1])
def test_class_index_without_a_name(write, label):
    root = write({"a": BOX.replace("1", str(label), 1)})
    with pytest.raises(
        UserError, match=rf"a\.txt: line 1: class index {label}, but .*data\.yaml names 2 classes \(0 to 1\)"
    ):
        open_index(root, "train")


def test_names_with_a_gap(write):
    with pytest.raises(UserError, match=r"data\.yaml: names is \{0: 'king', 2: 'ace'\}"):
        open_index(write({"a": BOX}, names={0: "king", 2: "ace"}), "train")


def test_malformed_yaml_names_the_line(write):
    root = write({"a": BOX})
    (root / "data.yaml").write_text("train: images/train\nnames: [king\n")
    with pytest.raises(UserError, match=r"data\.yaml: line 3: not valid YAML"):
        open_index(root, "train")


def test_missing_folder(write):
    with pytest.raises(UserError, match=r"data\.yaml: val: .*images/val does not exist"):
        open_index(write({"a": BOX}, val="images/val"), "val")


def test_missing_split(write):
    with pytest.raises(UserError, match=r"no split 'test'; it has train$"):
        open_index(write({"a": BOX}), "test")


def test_folder_without_images(write):
    root = write({"a": BOX}, val="images/val")
    (root / "images" / "val").mkdir()
    with pytest.raises(UserError, match=r"data\.yaml: val: the split has no images"):
        open_index(root, "val")


def test_label_file_without_an_image(write):
    root = write({"a": BOX, "b": BOX})
    (root / "images" / "train" / "b.jpg").unlink()
    with pytest.raises(UserError, match=r"images/train/b: the image does not exist; .*labels/train/b\.txt names it"):
        open_index(root, "train")
    index = open_index(root, "train", unreadable="skip")
    assert len(index) == len(index.boxes) == 1
    assert list(index.notes.skipped) == ["images/train/b"]


def test_classes_txt_of_a_labelling_tool_is_no_label_file(write):
    root = write({"a": BOX})
    (root / "labels" / "train" / "classes.txt").write_text("king\nace\n")
    assert len(open_index(root, "train")) == 1


def test_real_cards(shared_data):
    train, val = open_index(shared_data / "cards", "train"), open_index(shared_data / "cards", "val")
    assert (len(train), len(val)) == (296, 67)
    assert train.class_names == ("king", "ace", "nine", "ten", "jack", "queen")
    sample = [val.file(i) for i in range(len(val))].index("images/test/IMG_2391.jpg")
    assert val.labels_of(sample).tolist() == [2]
    height, width = val.sizes[sample]
    center = (val.boxes_of(sample)[0, :2] + val.boxes_of(sample)[0, 2:]) / 2
    assert center.tolist() == pytest.approx([0.525132 * width, 0.581349 * height], abs=1e-3)
