"""What makes a GPU wait within a step: reading a value, or a shape that depends on values. Seen on the CPU, too."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import students
from distill.distiller import Distiller
from distill.footprint import blank
from distill.optimization import build_optimizer
from distill.terms import TERMS
from teachers import Teacher

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim"}
HEADS = {"ld": "gfl"}
FAMILIES = {
    "retinanet head": {"name": "dense", "backbone": "test_resnet", "channels": 16, "head": "retinanet"},
    "yolov5": {"name": "yolov5", "size": "n", "width": 0.125},
    "yolov7_tiny": {"name": "yolov7_tiny", "width": 0.125},
}


class Watch(TorchDispatchMode):
    """Notes every operation whose result a GPU's own queue cannot go on without."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype is torch.bool for index in arguments[1]
        )
        if name in WAITING or by_mask:
            self.found.append(name)
        return function(*arguments, **(keywords or {}))


def watch_step(student, teacher, terms):
    """The second step of training, as the first may fill caches."""
    unit = Distiller(student, {name: TERMS[name](student, teacher) for name in terms}).train()
    unit.to(memory_format=torch.channels_last)
    teachers = {"teacher": Teacher(teacher)}
    unit.bind({"teacher": teacher})
    unit.combiner.step = 20
    optimizer = build_optimizer(unit, 1e-4, 1.0, 0.05)
    images, targets = blank(2, (64, 64), torch.device("cpu"))
    for watch in (Watch(), Watch()):
        with watch:
            unit(images, targets, unit.ask(teachers, images, targets))[0].backward()
            torch.nn.utils.clip_grad_norm_(unit.parameters(), 10.0)
        # not watched: on a GPU the fused kernel counts its steps there, on a CPU it reads them
        optimizer.step()
        optimizer.zero_grad()
    return watch.found


@pytest.mark.parametrize("name", [name for name in TERMS if name not in ("roi_kd", "pseudo_label")])
def test_no_loss_waits(build_tiny, name):
    head = HEADS.get(name, "task_aligned")
    assert watch_step(build_tiny(head=head), build_tiny(seed=1, channels=24, head=head), [name]) == []


def test_the_nms_of_pseudo_labels_does(build_tiny):
    assert set(watch_step(build_tiny(), build_tiny(seed=1), ["pseudo_label"])) == {"index"}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_of_ours_waits(family):
    torch.manual_seed(0)
    student = students.build(class_names=["one", "two"], **FAMILIES[family])
    assert watch_step(student, copy.deepcopy(student), []) == []
