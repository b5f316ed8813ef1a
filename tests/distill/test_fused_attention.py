"""Losses on attention that compare the mean of all levels with that of the teacher's."""

import math

import pytest
import torch
from torch import nn

import students
from distill import factory
from distill.config import check_config
from distill.distiller import Distiller, Lesson
from distill.errors import UserError
from distill.pruning.pruner import Pruner, cut_everywhere
from distill.terms import TERMS, AttentionGuidedTerm, AttentionTransferTerm, FGDAttentionTerm
from losses import attention_transfer, fuse_levels
from students import DenseOutput

NAMES = ["attention_transfer", "fgd_attention", "attention_guided"]
CHANNELS, THREE = 16, math.log(3)


@pytest.fixture
def same(build_tiny):
    """A detector of levels P4 and P5, which plays both parts."""
    return build_tiny(levels=(4, 5))


@pytest.fixture
def outputs():
    """A silent student's, and a teacher's that is strong at one location of the finer level, in all channels alike.

    Fused at the coarser level, the student's is (0, 0), the teacher's the mean of the maxima (0, 2 ln 3) and of (0, 0),
    which is (0, ln 3).
    """
    fine, coarse = torch.zeros(1, CHANNELS, 2, 4), torch.zeros(1, CHANNELS, 1, 2)
    strong = fine.clone()
    strong[:, :, 1, 2] = 2 * THREE
    return DenseOutput((fine, coarse), (), ()), DenseOutput((strong, coarse), (), ())


def test_attention_transfer_of_known_pyramids(same, outputs):
    # fused: a_S = (0, 0) against a_T = (0, 1); by levels: one of eight locations is 1, and nothing against nothing
    for match, expected in (("fused", 1 / 2), ("levels", 1 / 8)):
        loss = AttentionTransferTerm(same, same, match=match)(*outputs, [], (32, 64))
        torch.testing.assert_close(loss, torch.tensor(expected))


def test_fgd_attention_of_known_pyramids(same, outputs):
    # T = 1/2, channels alike. Fused: 2 softmax(0, ln 9) = (0.2, 1.8) against (1, 1).
    # By levels: 8 softmax of seven times 0 and ln 81 = 8 / 88 and 648 / 88: 7 * (1 - 1/11) + 81/11 - 1.
    for match, expected in (("fused", 1.6), ("levels", 140 / 11)):
        term = FGDAttentionTerm(same, same, adapter="identity", match=match, temperature=0.5)
        torch.testing.assert_close(term(*outputs, [], (32, 64)), torch.tensor(expected))


def test_attention_guided_of_known_pyramids(same, outputs):
    term = AttentionGuidedTerm(same, same, match="fused", mask_weight=1.0, pooled_weight=10.0, relation_weight=100.0)
    assert list(term.levels) == ["fused"]
    for layer in term.levels.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.zeros_(layer.bias)  # of silence every layer makes silence
    # Spatial attention (1, 1) and (0.2, 1.8), their mean (0.6, 1.4): sqrt(1.4 C) ln 3. The means of C channels differ
    # by ln 3 / 2, of the second location by ln 3. Relations: both blocks still are the identity.
    root = math.sqrt(CHANNELS)
    expected = THREE * (math.sqrt(1.4) * root + 10 * (root / 2 + 1) + 100 * root)
    torch.testing.assert_close(term(*outputs, [], (32, 64)), torch.tensor(expected))


@torch.no_grad()
def test_one_map_is_compared(build_tiny, images):
    student, teacher = build_tiny(), build_tiny(seed=1, channels=24)
    ours, theirs = student(images), teacher(images)
    fused = AttentionTransferTerm(student, teacher, match="fused")(ours, theirs, [], (64, 64))
    assert torch.equal(fused, attention_transfer(fuse_levels(ours.features), fuse_levels(theirs.features)))


@pytest.mark.parametrize(
    ("name", "settings"), [*((name, {}) for name in NAMES), ("fgd_attention", {"adapter": "select"})]
)
def test_fused_terms_follow_a_cut(build_tiny, images, targets, name, settings):
    student = build_tiny(channels=32)
    teacher = build_tiny(seed=1, channels=32 if settings else 24).eval().requires_grad_(False)
    unit = Distiller(student, {"term": TERMS[name](student, teacher, match="fused", **settings)})
    optimizer, lessons = torch.optim.AdamW(unit.parameters()), {"teacher": Lesson(teacher(images), targets)}
    unit(images, targets, lessons)[0].backward()
    optimizer.step()
    pruner = Pruner((64, 64), target=0.5, epochs=[0])
    pruner.check(unit)
    cut_everywhere(pruner.plan(unit, 0), unit, None, optimizer)
    optimizer.zero_grad()
    unit(images, targets, lessons)[0].backward()
    assert max(student.feature_channels) < 32
    assert [n for n, p in unit.named_parameters() if p.grad is None or p.grad.shape != p.shape] == []


@pytest.mark.parametrize("name", NAMES)
def test_levels_of_unlike_widths_have_no_mean(build_tiny, name):
    widening = students.build("yolov5", class_names=["a", "b"], width=0.125)
    widths = ", ".join(map(str, widening.feature_channels))
    for pair, role in (((widening, build_tiny()), "student"), ((build_tiny(), widening), "teacher")):
        message = f"^match: fused .* the {role}'s, which meet at P3, P4, P5, have {widths} channels; choose levels$"
        with pytest.raises(ValueError, match=message):
            TERMS[name](*pair, match="fused")
        assert TERMS[name](*pair, levels=["P4"], match="fused").map_names == ["fused"]


@pytest.mark.parametrize("name", NAMES)
def test_a_config_chooses_how_levels_are_matched(settings, build_tiny, name):
    settings["losses"] = {"it": {"name": name, "match": "fused"}}
    config = check_config(settings, "here").losses["it"]
    term = factory.build_term(config, build_tiny(), build_tiny(seed=1, channels=24), "it")
    assert term.match == "fused"
    settings["losses"]["it"]["match"] = "fuse"
    with pytest.raises(UserError, match=r"losses.it.*match: 'fuse' is not allowed"):
        check_config(settings, "here")
