"""What a user can get wrong is told in one line, with status 2, before anything is written."""

import json
import shutil
import sys

import pytest
import yaml

import students
import train


@pytest.fixture
def run(settings, tmp_path, monkeypatch, capsys):
    """`python train.py CONFIG ARGUMENTS` in this process: (status, standard output, standard error)."""

    def run(*arguments, config=None):
        path = tmp_path / "a.yaml"
        path.write_text(yaml.safe_dump(settings))
        monkeypatch.setattr(sys, "argv", ["train.py", *([str(path)] if config is None else config), *arguments])
        capsys.readouterr()
        status = train.main()
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def refused(run, tmp_path):
    """Runs it and expects one line that holds all of `parts`, and no output folder."""

    def refused(*arguments, parts, config=None):
        before = sorted(tmp_path.rglob("*"))
        status, out, err = run(*arguments, config=config)
        assert status == 2
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
        assert [part for part in parts if part not in err] == [], err
        assert "Traceback" not in err + out
        assert not (tmp_path / "run").exists()
        assert set(tmp_path.rglob("*")) - set(before) <= {tmp_path / "a.yaml"}

    return refused


@pytest.fixture
def own_scenes(scenes, settings, tmp_path):
    """A copy of the scenes that may be spoilt."""
    root = tmp_path / "scenes"
    shutil.copytree(scenes, root)
    settings["data"]["root"] = str(root)
    return root


def edit_annotations(root, change):
    path = root / "annotations" / "train.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_unknown_key(refused):
    refused("student.bakbone=resnet18", parts=["a.yaml: student.bakbone: no such key; did you mean student.backbone?"])


def test_wrong_type(refused):
    refused("train.epochs=many", parts=["train.epochs: input should be a valid integer", "found 'many'"])


def test_no_config_file(refused, tmp_path):
    refused(config=[str(tmp_path / "nowhere.yaml")], parts=["nowhere.yaml: no such config file"])


def test_an_override_in_place_of_the_config(refused):
    refused(config=["train.epochs=3"], parts=["train.epochs=3: no such config file"])


def test_no_data_folder(refused, tmp_path):
    refused(f"data.root={tmp_path}/nowhere", parts=["data.root: ", "nowhere does not exist"])


def test_no_annotations(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(
        f"data.root={tmp_path}/empty", parts=["data.root: no annotations found in", "COCO: annotations/<split>.json"]
    )


def test_no_such_split(refused):
    refused("data.val=vall", parts=["has no split 'vall' (did you mean 'val'?)"])


def test_annotation_of_an_image_that_is_missing(refused, own_scenes):
    (own_scenes / "images/train/000003.jpg").unlink()
    refused(parts=["000003.jpg: the image does not exist", "train.json names it", "data.unreadable=skip"])


def test_annotation_of_an_image_id_that_is_missing(refused, own_scenes):
    edit_annotations(own_scenes, lambda content: content["annotations"][1].update(image_id=77))
    refused(parts=["train.json: annotations[1]: image_id 77 is not among the ids of 'images'"])


def test_truncated_image(refused, run, own_scenes):
    path = own_scenes / "images/train/000003.jpg"
    path.write_bytes(path.read_bytes()[:500])
    refused(parts=["000003.jpg: cannot be read as an image", "data.unreadable=skip"])
    status, out, _ = run("data.unreadable=skip", "--dry-run")
    assert status == 0
    assert ", train: 1 images skipped (000003.jpg)" in out and "7 train, 4 val" in out


def test_class_that_the_class_map_does_not_know(refused):
    refused("data.class_map={disk: round}", parts=["data.class_map: ", "has no class 'disk' (did you mean 'disc'?)"])


def test_class_that_the_detector_does_not_know(refused):
    refused("data.classes=[disc, ring]", parts=["is not a class of the detector; allowed are disc, ring"])


def test_no_classes(refused):
    refused("data.classes=[]", parts=["data.classes: the list of classes for", "is empty; at least one class is"])


@pytest.fixture
def teacher(build_tiny, tmp_path):
    students.save(build_tiny(), tmp_path / "teacher")
    return tmp_path / "teacher"


def test_teacher_of_other_classes(refused, teacher):
    unlike = "losses.box.name: box_mimic goes by class scores, and its teacher knows none of the student's 8"
    refused(f"teacher.path={teacher}", parts=[unlike, "disc, ", "in its class_map"])
    refused(
        f"teacher.path={teacher}",
        "teacher.class_map={c: disc}",
        parts=["teacher.class_map: it has no class 'c'", "a, b"],
    )
    refused(
        f"teacher.path={teacher}",
        "teacher.class_map={a: disk}",
        parts=["teacher.class_map.a: 'disk' is not a class of the student (did you mean 'disc'?)"],
    )


def test_several_teachers(refused, settings):
    one = settings.pop("teacher")
    settings["teachers"] = {"big": one, "small": one}
    refused(parts=["losses.box.teacher: is missing; say whose loss it is: big, small"])
    for loss in settings["losses"].values():
        loss["teacher"] = "big"
    refused("losses.box.teacher=bigg", parts=["losses.box.teacher: found 'bigg'; there is big, small"])
    refused("teacher={path: x}", parts=["teacher and teachers are both given; name them all under teachers"])
    refused("teachers.a/b={path: x}", parts=["teachers.a/b: is no name; give letters, digits, - and _"])
    refused("teachers.big.detector.chanels=8", parts=["did you mean teachers.big.detector.channels?"])
    refused("teachers.small.path=nowhere", parts=["teachers.small.path: nowhere: is no detector folder"])


def test_unlabelled_images(refused, settings, scenes, tmp_path):
    settings["data"]["unlabelled"] = {"root": str(tmp_path / "images")}
    refused(parts=["data.unlabelled.root: ", "images does not exist; give a folder of images"])
    (tmp_path / "images").mkdir()
    refused(parts=["data.unlabelled.root: ", "images has no images; looked for .jpg, "])
    (tmp_path / "images/a.jpg").write_bytes(b"no image")
    refused(parts=["a.jpg: cannot be read as an image", "data.unreadable=skip"])
    root = f"data.unlabelled.root={scenes}/images/val"
    refused(root, "data.unlabelled.ratio=1.0", parts=["data.unlabelled.ratio: found 1; it goes from 0.01 to 0.99"])
    refused(root, "data.unlabelled.split=vall", parts=["data.unlabelled.root: no annotations found in"])
    refused(f"data.unlabelled={{root: {scenes}, split: vall}}", parts=["data.unlabelled: ", "did you mean 'val'?"])
    refused(root, "losses={}", parts=["data.unlabelled is given but no losses", "add a teacher and losses"])
    refused(root, "data.train=null", parts=["teacher: cannot be trained first without labelled images"])
    refused(
        root, "data.train=null", "teacher.path=x", parts=["balance: gradient goes by the task's gradient", "say none"]
    )
    refused("data.train=null", "data.unlabelled=null", parts=["data: train is null and there are no unlabelled images"])


def test_teacher_folder_that_is_none(refused, tmp_path):
    refused(f"teacher.path={tmp_path}", parts=["teacher.path: ", "is no detector folder, it has no detector.json"])


def test_levels_that_do_not_meet(refused):
    refused(
        "student.levels=[2, 3]",
        "teacher.detector.levels=[4, 5]",
        parts=["strides [4, 8]", "([16, 32]) have none in common"],
    )


def test_unknown_backbone(refused):
    refused("student.backbone=resnet19", parts=["student.backbone: timm knows no model 'resnet19'; near it: "])
    refused("teacher.detector.backbone=resnet19", parts=["teacher.detector.backbone: timm knows no model 'resnet19'"])


def test_weights_that_are_not_there(refused):
    refused(
        "student.weights=nowhere.pth",
        parts=["student.weights: no file nowhere.pth; give the path of one that is there"],
    )


def test_target_out_of_reach(refused):
    refused("pruning.target=0.001", parts=["pruning.target: 0.001 cannot be reached", "raise the target"])


def test_backbone_of_another_image_size(refused, settings):
    settings["pruning"] = None
    swin = "swin_tiny_patch4_window7_224"
    refused(f"student.backbone={swin}", parts=[f"student: {swin} does not take images of 64x64 px", "(224)"])


def test_finished_run(run, settings, tmp_path):
    settings.update(teacher=None, losses={}, pruning=None)
    settings["train"]["epochs"] = 1
    assert run()[0] == 0
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for arguments in ((), ("train.epochs=2",)):
        status, _, err = run(*arguments)
        assert status == 2 and err.count("\n") == 1
        assert "output_dir: " in err and "already holds a finished run" in err and "overwrite=true" in err
    status, _, err = run("--resume", str(tmp_path / "run"), config=[])
    assert status == 2 and err.count("\n") == 1 and "is finished" in err
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == files
    assert run("overwrite=true", "train.epochs=2")[0] == 0
    assert len((tmp_path / "run/results.csv").read_text().splitlines()) == 3


def test_output_folder_of_something_else(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("years of work")
    status, _, err = run()
    assert status == 2 and "holds no run but other files (thesis.tex)" in err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_nothing_to_resume(refused, tmp_path):
    refused("--resume", str(tmp_path / "nowhere"), config=[], parts=["resume: ", "nowhere does not exist"])
    (tmp_path / "empty").mkdir()
    refused("--resume", str(tmp_path / "empty"), config=[], parts=["resume: ", "holds no run: no config.yaml"])
    refused("--resume", str(tmp_path / "empty"), parts=["--resume goes on with the settings of"])


def test_nothing_asked_for(run, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(config=[])
    assert stopped.value.code == 2
    assert "name a config, such as configs/quickstart.yaml" in capsys.readouterr().err


def test_list_names_what_a_config_can(run, monkeypatch, repository):
    monkeypatch.chdir(repository)
    status, out, err = run("--list", config=[])
    assert status == 0 and err == ""
    entries = [line.strip() for line in out.splitlines()]
    for name in ("configs/quickstart.yaml  Drawn scenes", "dense", "fpn", "pan", "none", "imagenet", "dense_sigmoid",
                 "faster_rcnn", "coco", "roi_kd", "plain_mimic", "pkd", "attention_transfer", "group_l1"):  # fmt: skip
        assert any(entry.startswith(name) for entry in entries), name


def test_dry_run_builds_everything_and_writes_nothing(run, tmp_path):
    status, out, err = run("--dry-run")
    assert status == 0 and err == ""
    assert "dry run: everything was built and fits together; nothing was trained, no run folder written" in out
    for part in (
        "8 train, 4 val",
        "8 classes; 64x64 px",
        "test_resnet: ",
        "pkd x 0.5 of the task's gradient (warm-up 1.5 epochs, cosine to 0)",
        "attention_transfer x 0.2 of the task's gradient (for the first 4 epochs)",
        "to 50% of the MACs, by taylor, ranking global, 2 cuts",
    ):
        assert part in out, part
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]


def test_the_banner_says_which_levels_meet(run):
    assert "Levels         P3-P5 by stride\n" in run("--dry-run")[1]
    # seen at twice the size, the teacher's strides of 8, 16 and 32 are 4, 8 and 16 of the student's pixels
    _, out, _ = run("--dry-run", "teacher.image_size=128", "losses.boxes={name: pseudo_label}")
    assert "(trained first, sees 128x128 px)" in out
    assert "Levels         box, soft_label: P3, P4 by stride; P5 without a partner\n" in out
    last = "feature_mimic, fpn_attention: P3, P4 by stride; P5 from the teacher's P4, interpolated\n"
    assert f"\n{15 * ' '}{last}" in out


def test_dry_run_finds_what_a_run_would(refused):
    refused("pruning.target=0.001", "--dry-run", parts=["pruning.target: 0.001 cannot be reached"])
