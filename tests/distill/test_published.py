import pytest

import students
from distill import factory
from distill.schema import Config, ScheduleConfig
from distill.summary import describe_schedule
from distill.terms.published import published

DENSE = {"name": "dense", "backbone": "test_resnet", "channels": 16, "head_depth": 1}
RESNET = {"backbone": "resnet18", "channels": 16}
# a student of each kind
STUDENTS = {
    "anchor-free": DENSE,
    "anchor-based": {**DENSE, "head": "retinanet"},
    "two-stage": {"name": "faster_rcnn", **RESNET},
}
KINDS = pytest.mark.parametrize(
    ("kind", "pkd", "mgd", "fgd", "gamma", "guided"),
    [
        ("anchor-free", 6.0, (2e-5, 0.65), (1.6e-3, 8e-4, 8e-4, 8e-6, 0.8), 8e-4, (4.2e-4, 2.4e-2, 4.2e-4, 0.5)),
        ("anchor-based", 10.0, (2e-5, 0.65), (1e-3, 5e-4, 5e-4, 5e-6, 0.5), 5e-4, (4.2e-4, 2.4e-2, 4.2e-4, 0.5)),
        ("two-stage", 6.0, (5e-7, 0.45), (5e-5, 2.5e-5, 5e-5, 5e-7, 0.5), 5e-5, (7e-5, 4e-3, 7e-5, 0.5)),
    ],
)


def build_unit(student, losses, **settings):
    config = Config(
        output_dir="x",
        data={"root": "y", "image_size": 64},
        student=student,
        teacher={"path": "z"},
        losses=losses,
        **settings,
    )
    built = students.build(class_names=["a", "b"], **student)
    return factory.build_unit(config, built, {"teacher": students.build(class_names=["a", "b"], **DENSE)})


@KINDS
def test_what_is_left_out_is_what_the_authors_set(kind, pkd, mgd, fgd, gamma, guided):
    names = ["pkd", "cwd", "masked_mimic", "plain_mimic", "mgd", "fgd", "fgd_attention", "attention_guided"]
    unit = build_unit(STUDENTS[kind], {name: {"name": name} for name in names}, balance="none")
    weights = unit.combiner.weights
    assert [weights[name] for name in names] == [pkd, 10.0, 0.01, 1.0, mgd[0], 1.0, gamma, 1.0]
    level = unit.terms["mgd"].levels["P3"]
    assert level.mask_ratio == mgd[1]
    level = unit.terms["fgd"].levels["P3"]
    assert (level.alpha, level.beta, level.gamma, level.lambda_, level.temperature) == fgd
    level = unit.terms["attention_guided"].levels["P3"]
    assert (level.mask_weight, level.pooled_weight, level.relation_weight, level.temperature) == guided


def test_what_is_given_stays():
    losses = {"fgd": {"name": "fgd", "weight": 0.5, "gamma": 0.0}, "mgd": {"name": "mgd", "mask_ratio": 0.0}}
    unit = build_unit(STUDENTS["two-stage"], losses, balance="none")
    assert unit.combiner.weights == {"fgd": 0.5, "mgd": 5e-7}
    level = unit.terms["fgd"].levels["P3"]
    assert (level.alpha, level.gamma) == (5e-5, 0.0) and unit.terms["mgd"].levels["P3"].mask_ratio == 0.0


def test_a_balanced_weight_that_is_left_out_is_the_whole_share():
    losses = {"a": {"name": "cwd"}, "b": {"name": "mgd"}, "c": {"name": "pkd", "weight": 0.5}}
    assert build_unit(DENSE, losses).combiner.weights == {"a": 1.0, "b": 1.0, "c": 0.5}


def test_the_kind_of_student():
    ssd = students.build(class_names=["a"], name="ssdlite320")
    fcos = students.build(class_names=["a"], name="fcos", backbone="resnet18", channels=32, head_depth=1)
    gfl = students.build(class_names=["a"], **DENSE, head="gfl")
    assert [published("pkd", student)["weight"] for student in (ssd, fcos, gfl)] == [10.0, 6.0, 6.0]


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({}, ""),
        ({"warmup_epochs": 2, "shape": "cosine"}, " (warm-up 2 epochs, cosine to 0)"),
        ({"shape": "linear", "final": 0.1, "stop_epoch": 1}, " (linear to 0.1, for the first 1 epoch)"),
        ({"warmup_epochs": 50.5}, " (warm-up 50.5 epochs, of which the run has 10)"),
    ],
)
def test_a_schedule_in_words(schedule, words):
    assert describe_schedule(ScheduleConfig(**schedule), 10) == words
