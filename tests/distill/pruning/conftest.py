import pytest
import torch

from distill.distiller import Distiller, Lesson
from distill.ema import EMA
from distill.optimization import build_optimizer
from distill.terms import PlainMimicTerm


@pytest.fixture
def build_unit(build_tiny):
    """A student with the adapters of a wider teacher."""

    def build(**changes):
        student = build_tiny(**changes)
        levels = changes.get("levels", (3, 4, 5))
        teacher = build_tiny(seed=1, channels=24, levels=levels)
        return Distiller(student, {"feature_mimic": PlainMimicTerm(student, teacher)})

    return build


@pytest.fixture
def make_trained(build_unit, build_tiny, images, targets):
    """A unit, its averaged copy and its optimizer after two steps; `step` makes another."""

    def make(before_training=lambda unit: None, **changes):
        unit = build_unit(**changes)
        before_training(unit)
        optimizer = build_optimizer(unit, lr=1e-3, backbone_lr=1.0, weight_decay=0.05)
        teacher = build_tiny(seed=1, channels=24).eval()
        with torch.no_grad():
            taught = teacher(images)
        ema = EMA(unit.student, decay=0.9)

        def step():
            unit.train()
            unit(images, targets, {"teacher": Lesson(taught, targets)})[0].backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update(unit.student)

        step()
        step()
        return unit, ema, optimizer, step

    return make
