import json

import pytest
import torch

import students
from students.artifact import cut
from students.plan import Cut, Plan


def outputs(detector, images):
    with torch.no_grad():
        return [level for levels in detector.eval()(images) for level in levels]


def tower_cut(detector, keep):
    """Narrows the class tower, whose width nothing else shares."""
    width = detector.head.class_logits.in_channels
    conv, norms = "head.class_tower.0.conv.weight", range(len(detector.strides))
    leaves = ("weight", "bias", "running_mean", "running_var")
    slices = [(f"head.class_tower.0.norms.{n}.{leaf}", 0) for n in norms for leaf in leaves]
    return Plan((Cut(width, tuple(keep), ((conv, 0), ("head.class_logits.weight", 1), *slices)),))


def twice_cut(build_tiny, **changes):
    detector = build_tiny(**changes)
    cut(detector, tower_cut(detector, (0, 2, 4, 6, 8, 10, 12, 14)))
    cut(detector, tower_cut(detector, (1, 3, 5, 7)))
    return detector


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet"])
def test_a_loaded_detector_gives_the_same_bits(build_tiny, images, tmp_path, backbone):
    detector = build_tiny(backbone=backbone, neck="pan", levels=(3, 4, 5, 6))
    detector(images)  # moves the running statistics away from where they start
    students.save(detector, tmp_path / "student", {"epochs": 3})
    loaded = students.load(tmp_path / "student")
    assert not loaded.training
    assert loaded.class_names == ["a", "b"] and loaded.recipe == {**detector.recipe, "levels": [3, 4, 5, 6]}
    assert students.read_info(tmp_path / "student") == {"epochs": 3}
    assert all(map(torch.equal, outputs(loaded, images), outputs(detector, images)))


def test_a_cut_detector_gives_the_same_bits(build_tiny, images, tmp_path):
    detector = twice_cut(build_tiny)
    students.save(detector, tmp_path / "student")
    loaded = students.load(tmp_path / "student")
    assert loaded.head.class_logits.in_channels == 4
    assert loaded.plans == detector.plans and len(loaded.plans) == 2
    assert all(map(torch.equal, outputs(loaded, images), outputs(detector, images)))
    # and once more, from the loaded one
    students.save(loaded, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "student/model.safetensors").read_bytes()


def test_normalisation_and_first_weights_come_from_the_file(build_tiny, tmp_path):
    torch.save(build_tiny().backbone.body.state_dict(), tmp_path / "a.pth")
    detector = build_tiny(seed=1, weights=str(tmp_path / "a.pth"))
    detector.mean.fill_(0.25)
    students.save(detector, tmp_path / "student")
    (tmp_path / "a.pth").unlink()
    assert students.load(tmp_path / "student").normalization[0] == (0.25, 0.25, 0.25)


def test_nothing_is_pickled(build_tiny, tmp_path):
    students.save(twice_cut(build_tiny), tmp_path / "student")
    files = {path.name: path.read_bytes() for path in (tmp_path / "student").iterdir()}
    assert files.keys() == {"detector.json", "plans.json", "model.safetensors"}
    assert json.loads(files["detector.json"])["recipe"]["name"] == "dense"
    assert len(json.loads(files["plans.json"])) == 2
    entries = [line for line in files["plans.json"].decode().splitlines() if "{" in line]
    assert all(isinstance(json.loads(line.strip().rstrip(",")), dict) for line in entries)  # one a line
    header = int.from_bytes(files["model.safetensors"][:8], "little")
    assert json.loads(files["model.safetensors"][8 : 8 + header])


def test_saving_replaces_an_older_artifact_as_a_whole(build_tiny, tmp_path):
    students.save(twice_cut(build_tiny), tmp_path / "student", {"run": 1})
    (tmp_path / "student" / "stray").touch()
    students.save(build_tiny(backbone="test_efficientnet"), tmp_path / "student", {"run": 2})
    assert {path.name for path in (tmp_path / "student").iterdir()} == {
        "detector.json", "plans.json", "model.safetensors",
    }  # fmt: skip
    assert students.read_info(tmp_path / "student") == {"run": 2}
    assert students.load(tmp_path / "student").recipe["backbone"] == "test_efficientnet"
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_failing_save_leaves_the_older_artifact(build_tiny, tmp_path):
    students.save(build_tiny(), tmp_path / "student", {"run": 1})
    with pytest.raises(TypeError):
        students.save(build_tiny(), tmp_path / "student", {"run": object()})
    assert students.read_info(tmp_path / "student") == {"run": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_folders_that_do_not_hold_together(build_tiny, tmp_path):
    def refuse(message):
        with pytest.raises(ValueError, match=message) as caught:
            students.load(tmp_path / "student")
        assert "\n" not in str(caught.value)

    refuse("student: is no detector folder, it has no detector.json")

    def saved(name, content):
        students.save(twice_cut(build_tiny), tmp_path / "student")
        path = tmp_path / "student" / name
        path.unlink() if content is None else path.write_bytes(content)

    saved("model.safetensors", None)
    refuse("student: is no detector folder, it has no model.safetensors")
    saved("detector.json", b"{")
    refuse("student: does not hold together")
    saved("detector.json", b'{"info": {}}')
    refuse("student: does not hold together .*'recipe'")
    saved("detector.json", b'{"recipe": {"name": "dense", "colour": "red"}}')
    refuse("student: does not hold together .*'colour'")
    saved("detector.json", b'{"recipe": {"name": "sparse"}}')
    refuse("no family 'sparse'; there is dense")
    saved("plans.json", b"[]")
    refuse("student: does not hold together")
    saved("plans.json", json.dumps([[{"width": 3, "keep": [0], "slices": [["mean", 0]]}]]).encode())
    refuse("plan: was made for 'mean' of width 3; here it is 1")
    students.save(twice_cut(build_tiny), tmp_path / "student")
    whole = (tmp_path / "student/model.safetensors").read_bytes()
    saved("model.safetensors", whole[: len(whole) // 2])
    refuse("student: does not hold together")
    students.save(build_tiny(channels=24), tmp_path / "wider")
    saved("model.safetensors", (tmp_path / "wider/model.safetensors").read_bytes())
    refuse(r"does not hold together \(size mismatch for .*laterals.0.0.weight: .*\[24, 48, 1, 1\].*; was it written")


def test_a_new_detector_can_start_as_narrow_as_a_saved_one(build_tiny, images, tmp_path):
    students.save(twice_cut(build_tiny), tmp_path / "student")
    new = build_tiny(seed=1)
    weight = new.head.class_logits.weight.detach().clone()
    students.narrow(new, tmp_path / "student")
    # of the even ones that stayed first, every other one stayed then
    assert torch.equal(new.head.class_logits.weight, weight[:, [2, 6, 10, 14]])
    students.save(new, tmp_path / "new")
    assert all(map(torch.equal, outputs(students.load(tmp_path / "new"), images), outputs(new, images)))

    with pytest.raises(ValueError, match=r"nowhere: is no detector folder, it has no plans\.json"):
        students.narrow(build_tiny(), tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"student: was cut from a detector of another recipe .*of width 16; here it is 8"
    ):
        students.narrow(build_tiny(channels=8), tmp_path / "student")
