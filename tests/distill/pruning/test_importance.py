import copy

import pytest
import torch

from distill.data import Batch
from distill.distiller import Distiller
from distill.errors import UserError
from distill.measure import count_macs
from distill.pruning.graph import ChannelGroup, Member, find_groups
from distill.pruning.importance import (
    IMPORTANCES,
    bn_scale,
    fpgm,
    group_l2,
    lamp,
    mean_activation,
    measured,
    random,
    taylor,
)
from distill.pruning.pruner import Pruner, cut_everywhere
from distill.pruning.saliency import measure_saliency, trained_loss
from distill.schema import PruningConfig
from students.plan import apply_plan, named_tensors
from teachers import Teacher

SIZE = (64, 64)
GROUP = ChannelGroup(
    "a",
    2,
    (
        Member("a.weight", 0, (0, 1), (0, 1)),
        Member("a.bias", 0, (0, 1), (0, 1)),
        Member("b.weight", 1, (0, 1, 2, 3), (0, 0, 1, 1)),
    ),
)


WEIGHTS = {
    "a.weight": torch.tensor([[3.0, -4], [0, 0]]),
    "a.bias": torch.tensor([100.0, 100]),
    "b.weight": torch.tensor([[1.0, 0, 5, 0], [0, 1, 0, 0]]),
}


def test_l2_is_one_norm_over_all_that_a_channel_owns():
    # sqrt(9 + 16 + 1 + 1) and sqrt(25), divided by their mean
    expected = torch.tensor([27**0.5, 5.0])
    torch.testing.assert_close(group_l2(GROUP, WEIGHTS), expected / expected.mean())


def test_fpgm_spares_what_is_unlike_the_others():
    group = ChannelGroup("a", 3, (Member("a.weight", 0, (0, 1, 2), (0, 1, 2)), Member("b.weight", 1, (0,), (0,))))
    tensors = {"a.weight": torch.tensor([[1.0], [-1], [5]]), "b.weight": torch.tensor([[9.0]])}
    # distances 2, 6 and 4 apart: 2 + 4, 2 + 6, 4 + 6, divided by the mean 8; signs count, the next layer does not
    torch.testing.assert_close(fpgm(group, tensors), torch.tensor([6.0, 8, 10]) / 8)


def test_scales_are_those_of_batch_norms_alone():
    group = ChannelGroup("a", 2, (*GROUP.members, *(Member(f"n.{x}", 0, (0, 1), (0, 1)) for x in ("weight", "bias"))))
    tensors = WEIGHTS | {"n.weight": torch.tensor([-2.0, 1]), "n.bias": torch.tensor([7.0, 7])}
    with pytest.raises(ValueError, match="no batch norm follows a, so it has no scale to go by"):
        bn_scale(group, tensors)  # a layer norm, for all one can see
    assert bn_scale(group, tensors | {"n.running_mean": torch.zeros(2)}).tolist() == [2, 1]


def test_lamp_compares_with_all_that_are_no_smaller():
    group = ChannelGroup("a", 3, (Member("a.weight", 0, (0, 1, 2), (0, 1, 2)),))
    # squared norms 1, 9 and 4: 1 / 14, 9 / 9 and 4 / 13
    scores = lamp(group, {"a.weight": torch.tensor([[1.0], [-3], [2]])})
    torch.testing.assert_close(scores, torch.tensor([1 / 14, 1, 4 / 13]))


def test_random_repeats_itself():
    assert torch.equal(random(GROUP, {}), random(GROUP, WEIGHTS))
    other = ChannelGroup("b", 2, ())
    assert not torch.equal(random(GROUP, {}), random(other, {}))


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_every_importance_cuts_a_student(build_unit, build_tiny, images, targets, importance):
    unit, teacher = build_unit(channels=32), Teacher(build_tiny(seed=1, channels=24), torch.device("cpu"))
    pruner = Pruner(SIZE, target=0.6, epochs=[0], importance=importance)
    pruner.check(unit)
    evidence = pruner.measure(unit, {"teacher": teacher}, [Batch(images, targets, [], [])])
    cut_everywhere(pruner.plan(unit, 0, evidence), unit, None, torch.optim.SGD(unit.parameters(), 0.1))
    assert count_macs(unit.student, SIZE) <= 0.6 * pruner.uncut


def test_taylor_sums_over_all_that_a_channel_owns():
    saliency = {
        "a.weight": torch.tensor([[1.0, 2], [3, 4]]),
        "a.bias": torch.tensor([10.0, 20]),
        "b.weight": torch.tensor([[100.0, 0, 0, 200]]),
    }
    # 1 + 2 + 10 + 100 and 3 + 4 + 20 + 200
    assert taylor(GROUP, {}, saliency).tolist() == [113, 227]
    with pytest.raises(ValueError, match="taylor needs gradients, but a is frozen"):
        taylor(GROUP, {}, {"c.weight": torch.ones(2)})


def test_what_was_measured_is_the_score():
    evidence = {"a": torch.tensor([1.0, 3]), "b": torch.tensor([9.0])}
    assert measured(GROUP, {}, evidence).tolist() == [1, 3]
    assert mean_activation(GROUP, {}, evidence).tolist() == [0.5, 1.5]


def test_what_a_setting_names_exists():
    assert set(PruningConfig.model_fields["importance"].annotation.__args__) == set(IMPORTANCES)


def test_importances_that_do_not_fit_are_told_at_once(build_unit):
    unit = build_unit(channels=32)
    pruner = Pruner(SIZE, target=0.6, epochs=[0], importance="taylor")
    unit.student.backbone.requires_grad_(False)
    with pytest.raises(UserError, match=r"^pruning.importance: taylor needs gradients, but backbone\S+ is frozen"):
        pruner.check(unit)


def test_saliency_is_the_squared_product_of_weight_and_gradient(build_tiny, images, targets):
    unit = Distiller(build_tiny()).train()
    frozen = next(unit.student.backbone.parameters()).requires_grad_(False)
    batches = [Batch(images, targets, [], []), Batch(images.flip(0), targets, [], [])]
    buffers = {name: b.clone() for name, b in unit.named_buffers()}
    saliency = measure_saliency(unit, [], batches, lambda batch: trained_loss(unit, {}, batch))
    assert unit.training and all(p.grad is None for p in unit.parameters())
    assert all(torch.equal(b, buffers[name]) for name, b in unit.named_buffers())

    unit.eval()
    expected = {name: torch.zeros_like(p) for name, p in unit.named_parameters()}
    for batch in batches:
        unit.zero_grad()
        unit(batch.images, batch.targets)[0].backward()
        for name, p in unit.named_parameters():
            if p.grad is not None:
                expected[name] += (p.detach() * p.grad) ** 2 / 2
    assert saliency.keys() == {name for name, p in unit.named_parameters() if p is not frozen}
    for name, value in saliency.items():
        torch.testing.assert_close(value, expected[name])


def test_channels_that_do_nothing_go_first(build_unit, images, targets):
    unit = build_unit(channels=32)
    dead = [1, 4, 9, 17, 18, 22, 23, 30]
    norm = unit.student.head.class_tower[0]
    with torch.no_grad():  # large filters, whose outputs are nevertheless silenced
        norm.conv.weight[dead] *= 50
        for level in norm.norms:
            level.weight[dead], level.bias[dead] = 0.0, 0.0
    batches = [Batch(images, targets, [], [])]
    saliency = measure_saliency(unit, [], batches, lambda batch: trained_loss(unit, {}, batch, knowledge=False))
    group = next(g for g in find_groups(unit, SIZE) if "head.class_tower" in g.name)
    scores = taylor(group, named_tensors(unit), saliency)
    assert scores.argsort()[:8].sort().values.tolist() == dead


def test_what_is_dear_goes_first_where_costs_count(build_unit):
    unit = build_unit(channels=32)
    torch.manual_seed(0)
    # only norms and biases matter: each belongs to one channel, cheap or dear
    saliency = {name: torch.rand(len(t)) for name, t in named_tensors(unit).items() if t.dim() == 1}
    channels_left = {}
    for per in ("none", "macs"):
        settings = {"target": 0.8, "epochs": [0], "importance": "taylor", "ranking": "global"}
        pruner = Pruner(SIZE, per=per, floor=0.25, **settings)
        pruner.check(unit)
        plan = pruner.plan(unit, 0, saliency)
        assert plan and all(len(cut.keep) >= cut.width * 0.25 for cut in plan.cuts)
        trial = copy.deepcopy(unit.student)
        apply_plan([(trial, plan.below("student."))])
        channels_left[per] = sum(len(t) for t in named_tensors(trial).values() if t.dim() == 1)
    assert channels_left["macs"] > channels_left["none"]
