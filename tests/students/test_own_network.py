"""Networks from elsewhere as detectors: what an adapter adds to them, by docs/adapters.md's own, and a whole run."""

import json
import re
import sys

import pytest
import torch
import yaml
from safetensors.torch import save_file

import students
import train
from distill.data.shapes import CLASSES


@pytest.fixture
def page(repository, tmp_path, monkeypatch):
    """docs/adapters.md: its modules importable, its YAML as settings."""
    text = (repository / "docs" / "adapters.md").read_text()
    files: dict[str, str] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        name = re.match(r"# (\w+\.py)", block)[1]
        files[name] = files.get(name, "") + block
    for name, code in files.items():
        (tmp_path / name).write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    yield settings
    for name in files:
        sys.modules.pop(name.removesuffix(".py"), None)


def build(kind, class_names=("a", "b"), seed=0, **others):
    torch.manual_seed(seed)
    return students.build("adapter", class_names=list(class_names), code=f"my_detectors:{kind}", **others)


def test_images_come_as_the_network_takes_them(page):
    teacher = build("MyTeacher")
    pixel = torch.tensor([0.2, 0.4, 1.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(teacher.prepare(pixel).flatten(), torch.tensor([255.0, 102, 51]))
    mean, std = teacher.normalization
    assert mean == (0, 0, 0) and std == pytest.approx([1 / 255] * 3)


def test_a_teacher_tells_what_its_network_tells(page, images):
    teacher = build("MyTeacher").eval()
    with torch.no_grad():
        output = teacher(images)
        (fine, fine_scores), (coarse, coarse_scores) = teacher.network(images.flip(1) * 255)
    boxes, scores = teacher.candidates(output)
    torch.testing.assert_close(boxes, torch.cat((fine, coarse), dim=1), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(scores, torch.cat((fine_scores, coarse_scores), dim=1), rtol=1e-4, atol=1e-4)
    assert [x.shape[1] for x in output.features] == list(teacher.feature_channels) == [16, 32]
    best = teacher.decode(output, [(64, 64), (64, 48)])[0]
    assert best.scores[0] == pytest.approx(float(scores[0].max()))
    with pytest.raises(ValueError, match="MyTeacher: has no loss, so it can only teach"):
        teacher.loss(output, [])


def test_a_dense_student_says_the_same_in_strides(page, images):
    """The same weights behind both kinds of adapter detect the same."""
    teacher, student = build("MyTeacher").eval(), build("MyStudent", seed=1).eval()
    student.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        theirs, ours = teacher.candidates(teacher(images)), student.candidates(student(images))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_weights_of_other_classes_are_found_by_name(page, tmp_path, images):
    many = build("MyStudent", ["x", "b", "y", "a"])
    file = tmp_path / "many.pt"
    torch.save({"model": many.network.state_dict(), "names": {0: "x", 1: "b", 2: "y", 3: "a"}}, file)
    few = build("MyStudent", seed=1, weights=str(file))
    with torch.no_grad():
        wanted = [level[:, [3, 1]] for level in many.eval()(images).class_logits]
        torch.testing.assert_close(list(few.eval()(images).class_logits), wanted)
    assert few.recipe["weights"] == "none" and list(few.notes) == []

    with pytest.raises(ValueError, match=r"has 4 classes, none of them 'c', here there are 2; say new_head: true"):
        build("MyStudent", ["a", "c"], weights=str(file))
    anew = build("MyStudent", ["a", "c"], seed=1, weights=str(file), new_head=True)
    assert torch.equal(anew.network.stem[0].weight, many.network.stem[0].weight)
    assert not torch.equal(anew.network.classes[0].weight, many.network.classes[0].weight[:2])
    assert anew.notes[0].startswith("its class layers start anew")

    save_file(many.network.state_dict(), tmp_path / "many.safetensors")
    unnamed = build("MyStudent", ["p", "q", "r", "s"], weights=str(tmp_path / "many.safetensors"))
    assert torch.equal(unnamed.network.classes[0].weight, many.network.classes[0].weight)
    assert unnamed.notes[0].startswith("its 4 classes are taken for those of")


def test_a_module_in_two_places_is_saved(page, tmp_path, images):
    (tmp_path / "my_tied.py").write_text(
        "from my_detectors import MyStudent\n\n\n"
        "class Tied(MyStudent):\n"
        "    def __init__(self, *args, **kwargs):\n"
        "        super().__init__(*args, **kwargs)\n"
        "        self.network.again = self.network.stem\n"
    )
    torch.manual_seed(0)
    detector = students.build("adapter", class_names=["a", "b"], code="my_tied:Tied").eval()
    students.save(detector, tmp_path / "student")
    loaded = students.load(tmp_path / "student")
    assert loaded.network.again is loaded.network.stem
    assert all(map(torch.equal, loaded(images).class_logits, detector(images).class_logits))
    sys.modules.pop("my_tied")


def test_weights_of_another_network_are_refused(page, tmp_path):
    file = tmp_path / "wide.pt"
    torch.save(build("MyTeacher", arguments={"width": 24}).network.state_dict(), file)
    with pytest.raises(
        ValueError, match=r"wide.pt is of another network: stem.0.weight is \(24, 3, 8, 8\), here \(16,"
    ):
        build("MyTeacher", weights=str(file))
    (tmp_path / "text.pt").write_text("weights")
    with pytest.raises(ValueError, match=r"text.pt is no checkpoint of PyTorch's"):
        build("MyTeacher", weights=str(tmp_path / "text.pt"))


@pytest.mark.parametrize(
    ("code", "arguments", "message"),
    [
        ("my_detectors", {}, "code: found 'my_detectors'; give package.module:Class"),
        ("none_such:A", {}, r"code: none_such:A cannot be imported \(No module named 'none_such'\)"),
        ("my_detectors:Other", {}, "cannot be imported .*has no attribute 'Other'"),
        ("os:system", {}, "code: os:system is no detector; it has to be a class below students.Adapter"),
        ("my_network:Network", {}, "is no detector"),
        ("my_detectors:MyTeacher", {"depth": 3}, "arguments: .* cannot be made with {'depth': 3} .*'depth'"),
    ],
)
def test_what_is_no_adapter_is_refused(page, code, arguments, message):
    with pytest.raises(ValueError, match=message):
        students.build("adapter", class_names=["a"], code=code, arguments=arguments)


def test_the_page_in_a_whole_run(page, settings, tmp_path, monkeypatch, images, capsys):
    """Its teacher, from weights by path, teaches its student, which is cut, saved and loaded."""
    first, second, _ = page
    weights = tmp_path / "my_network.pt"
    torch.save({"model": build("MyTeacher", CLASSES, arguments={"width": 24}).network.state_dict()}, weights)
    first["teacher"]["detector"]["weights"] = str(weights)
    first["losses"]["labels"]["score_threshold"] = 0.0
    path = tmp_path / "run.yaml"
    data = {"data": settings["data"], "train": {"epochs": 2}, "output_dir": str(tmp_path / "run")}
    path.write_text(yaml.safe_dump(data | first | second))
    monkeypatch.setattr(sys, "argv", ["train.py", str(path)])
    assert train.main() == 0
    told = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "Teacher MyTeacher" in told and f"({weights})" in told and "Student MyStudent" in told

    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["student"]["macs"] <= 0.5 * summary["student_before"]["macs"]
    student, teacher = students.load(tmp_path / "run" / "student"), students.load(tmp_path / "run" / "teacher")
    assert student.feature_channels < (24, 48) and teacher.feature_channels == (24, 48)
    output = student(images)
    assert [x.shape[1] for x in output.features] == list(student.feature_channels)
    assert student.recipe["code"] == "my_detectors:MyStudent" and student.recipe["arguments"] == {"width": 24}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"student": "MyTeacher"},
            "student: MyTeacher has no loss here, so it can only teach; name it as teacher.detector",
        ),
        (
            {"loss": "dense_sigmoid"},
            "needs two dense heads, .* the teacher, MyTeacher, has none; pseudo_label fits any pair",
        ),
        ({"loss": "score_weighted_mimic"}, "the teacher, MyTeacher, tells detections only; choose masked_mimic"),
        ({"train": True}, "teacher.detector: MyTeacher has no loss here"),
        (
            {"weights": "none"},
            "teacher: train is missing, and adapter with weights: none detects nothing yet; give train",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(page, settings, tmp_path, monkeypatch, capsys, changes, message):
    first, second, _ = page
    weights = tmp_path / "my_network.pt"
    torch.save(build("MyTeacher", CLASSES, arguments={"width": 24}).network.state_dict(), weights)
    first["teacher"]["detector"]["weights"] = changes.get("weights", str(weights))
    second["student"]["code"] = f"my_detectors:{changes.get('student', 'MyStudent')}"
    first["losses"] = {"it": {"name": changes.get("loss", "pkd")}}
    if "train" in changes:
        first["teacher"] |= {"train": {"epochs": 1}}
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump({"data": settings["data"], "train": {"epochs": 2}, "output_dir": "x"} | first | second)
    )
    monkeypatch.setattr(sys, "argv", ["train.py", str(path), "--dry-run"])
    assert train.main() == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1, said
