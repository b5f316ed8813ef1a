"""A teacher that is remembered teaches what a live one does, whatever its family and whatever the loss goes by."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

import students
from distill import teacher_cache
from distill.config import check_config
from distill.distiller import Distiller
from distill.errors import UserError
from distill.factory import build_data, teacher_run_config
from distill.terms import TERMS
from teachers import FeatureTeacher, ScaledDetector, Teacher, TeacherCache

DENSE = ("dense_sigmoid", "box_mimic", "score_weighted_mimic", "pseudo_label", "masked_mimic")


def build_detector(build_tiny, family):
    torch.manual_seed(3)
    if family in ("task_aligned", "gfl", "retinanet_head"):
        return build_tiny(seed=3, head=family.removesuffix("_head"))
    if family == "scaled":
        return ScaledDetector(build_tiny(seed=3), 2.0)
    kinds = {
        "fcos": {"name": "fcos", "backbone": "resnet18", "channels": 32, "head_depth": 1},
        "retinanet": {"name": "retinanet", "backbone": "resnet18", "channels": 16},
        "ssdlite320": {"name": "ssdlite320"},
        "faster_rcnn": {"name": "faster_rcnn", "backbone": "resnet18", "channels": 16},
        "yolov5": {"name": "yolov5", "width": 0.125},
    }
    return students.build(class_names=["a", "b"], **kinds[family])


CASES = [
    *((name, "task_aligned") for name in sorted(set(TERMS) - {"roi_kd", "ld"})),
    ("ld", "gfl"),
    ("cross_kd", "gfl"),
    ("box_mimic", "retinanet_head"),
    *(("pseudo_label", family) for family in ("fcos", "retinanet", "ssdlite320", "faster_rcnn", "yolov5", "scaled")),
    *(("masked_mimic", family) for family in ("fcos", "faster_rcnn", "yolov5")),  # its detections stand in for boxes
    ("dense_sigmoid", "fcos"),
    ("roi_kd", "faster_rcnn"),
    ("score_weighted_mimic", "faster_rcnn"),
]


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_every_loss_finds_what_it_goes_by(kind, family, build_tiny, targets, tmp_path):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    head = family.removesuffix("_head") if family in ("gfl", "retinanet_head") else "task_aligned"
    expert = build_detector(build_tiny, family)
    learner = build_detector(build_tiny, family) if kind == "roi_kd" or family == "fcos" else build_tiny(head=head)
    with torch.no_grad():
        for layer in expert.output_layers:  # of untrained heads all locations say the same
            layer.weight.mul_(20)
    teacher = Teacher(expert)
    unit = Distiller(learner, {"it": TERMS[kind](learner, expert)}, score_threshold=0.0).train()
    unit.bind({"teacher": expert})
    targets = [targets[0], None]  # the second image has no labels
    output, wanted = teacher(images), unit.reads("teacher", expert, unlabelled=True)
    shown = [SimpleNamespace(number=i, view=0, pixels=i, file="x") for i in range(2)]
    cache = TeacherCache(tmp_path / "c", {}, output, wanted, 2, 1, pytest.fail)
    cache.create()
    cache.open()

    def losses(*metas):
        torch.manual_seed(0)  # of what a loss draws
        lessons = unit.ask({"teacher": teacher}, images, targets, *metas)
        return lessons["teacher"].output, unit.losses(images, targets, lessons)[1]["it"].item()

    _, live = losses()
    teacher.cache = cache
    losses(shown)
    remembered, cached = losses(shown)
    assert live > 0 and cached == pytest.approx(live, rel=0.02)
    # all that is gone by is kept and nothing else, in place of which there are shapes
    wanted = {id(getattr(output, field)[level]) for field, level in wanted if getattr(output, field)}
    for full, found in zip(sum(output, ()), sum(remembered, ()), strict=True):
        assert full.shape == found.shape
        assert found.is_meta == (id(full) not in wanted and full.dim() == 4)


def test_a_network_of_features_alone(build_tiny, images, targets, tmp_path, monkeypatch):
    monkeypatch.setattr("teachers.features._create", lambda name, *_, **more: timm.create_model(name, **more))
    expert = FeatureTeacher("test_vit")
    learner, teacher = build_tiny(), Teacher(expert)
    unit = Distiller(learner, {"it": TERMS["fgd"](learner, expert)})
    cache = TeacherCache(tmp_path / "c", {}, teacher(images), unit.reads("teacher", expert, False), 2, 1, print)
    cache.create()
    cache.open()
    shown = [SimpleNamespace(number=i, view=0, pixels=i, file="x") for i in range(2)]
    live = unit.losses(images, targets, unit.ask({"teacher": teacher}, images, targets))[1]["it"]
    teacher.cache = cache
    for _ in range(2):
        lessons = unit.ask({"teacher": teacher}, images, targets, shown)
    assert unit.losses(images, targets, lessons)[1]["it"].item() == pytest.approx(live.item(), rel=0.01)


@pytest.fixture
def parts(settings, build_tiny, tmp_path):
    """Settings, data, and a unit with the teacher that they are prepared for."""
    settings["data"]["augment"] = {"views": 3}
    settings["teacher"] |= {"cache": str(tmp_path / "bank")}
    config = check_config(settings, "here")
    data = build_data(config.data)
    learner, expert = build_tiny(), build_tiny(seed=1, channels=24)
    unit = Distiller(learner, {"it": TERMS["plain_mimic"](learner, expert, levels=["P4"])})
    return config, data, unit, {"teacher": expert}


def test_what_it_costs_is_said_before_it_is_written(parts, tmp_path, monkeypatch):
    cache = teacher_cache.prepare_caches(*parts, pytest.fail)["teacher"]
    # P4 of 64x64 pixels is a map of 4x4 with 24 channels, of 2 bytes each; 8 images in 3 views
    assert cache.record_bytes == 768
    assert teacher_cache.cost(cache) == f"{tmp_path}/bank: 8 images x 3 views x 768 B = 18 kB, 0 of 24 records there"
    assert not (tmp_path / "bank").exists()

    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=24 * (768 + 8) - 1))
    with pytest.raises(UserError) as refused:
        teacher_cache.prepare_caches(*parts, pytest.fail)
    assert str(refused.value).startswith(
        "teacher.cache: "
    ) and "= 18 kB, 0 of 24 records there, and 19 kB are free th" in (str(refused.value))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=24 * (768 + 8)))
    assert teacher_cache.prepare_caches(*parts, pytest.fail)


def test_a_teacher_or_pictures_that_differ_are_named(parts, tmp_path, build_tiny):
    config, data, unit, detectors = parts
    cache = teacher_cache.prepare_caches(*parts, pytest.fail)["teacher"]
    cache.create()
    teacher_cache.prepare_caches(*parts, pytest.fail)

    def refused(config, detectors, untrained=()):
        with pytest.raises(UserError) as raised:
            teacher_cache.prepare_caches(config, build_data(config.data), unit, detectors, pytest.fail, untrained)
        return str(raised.value)

    other = {"teacher": build_tiny(seed=2, channels=24)}
    start = f"teacher.cache: {tmp_path}/bank is of other settings: "
    way_out = "; name another folder, or remove this one"
    assert refused(config, other) == f"{start}its teacher's weights differ{way_out}"
    teacher_cache.prepare_caches(config, data, unit, other, pytest.fail, untrained=["teacher"])

    def changed(**data):
        return check_config(config.model_dump() | {"data": config.data.model_dump() | data}, "here")

    augment = config.data.augment.model_dump()
    found = refused(changed(augment=augment | {"crop": 0.5, "mosaic": 0.2}), detectors)
    assert found == f"{start}data.augment.crop 0.0, now 0.5; data.augment.mosaic 0.0, now 0.2{way_out}"
    assert "data.resize letterbox, now stretch" in refused(changed(resize="stretch"), detectors)
    assert "its image files differ; images 8, now 4" in refused(changed(train="val"), detectors)
    assert "views 3, now 2" in refused(changed(augment=augment | {"views": 2}), detectors)
    assert "seed 0, now 4" in refused(config.model_copy(update={"seed": 4}), detectors)
    assert Path(config.teacher.cache).is_dir()


def test_a_teacher_that_is_trained_first_sees_other_views_in_every_epoch(parts):
    config = parts[0]
    augment = teacher_run_config(config, config.teacher, Path("teacher_run")).data.augment
    assert config.data.augment.views == 3 and augment.views is None


def test_a_teacher_without_losses_has_nothing_to_remember(parts):
    config, data, unit, detectors = parts
    with pytest.raises(UserError, match=r"teacher.cache: no loss goes by this teacher; leave it out, or add one"):
        teacher_cache.prepare_caches(config, data, Distiller(unit.student), detectors, pytest.fail)
