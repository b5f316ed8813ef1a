import copy

import pytest
import torch

from distill.data import Batch
from distill.distiller import Distiller
from distill.measure import count_macs, count_uses
from distill.pruning.graph import ChannelGroup, Member, find_groups
from distill.pruning.importance import macs_by_channel, taylor
from distill.pruning.pruner import Pruner, cut_everywhere
from distill.pruning.saliency import measure_saliency
from students.plan import Plan, apply_plan, named_tensors

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


def test_taylor_sums_over_all_that_a_channel_owns():
    saliency = {
        "a.weight": torch.tensor([[1.0, 2], [3, 4]]),
        "a.bias": torch.tensor([10.0, 20]),
        "b.weight": torch.tensor([[100.0, 0, 0, 200]]),
    }
    # 1 + 2 + 10 + 100 and 3 + 4 + 20 + 200
    assert taylor(GROUP, {}, saliency).tolist() == [113, 227]


def test_macs_of_a_channel_are_those_of_its_slices():
    tensors = {"a.weight": torch.zeros(2, 2), "a.bias": torch.zeros(2), "b.weight": torch.zeros(3, 4)}
    # two entries of a, used 5 times, and two inputs to three filters of b, used 7 times; biases are free
    assert macs_by_channel(GROUP, tensors, {"a.weight": 5, "b.weight": 7}).tolist() == [52, 52]


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet"])
def test_uses_times_weights_are_the_macs(build_tiny, backbone):
    detector = build_tiny(backbone=backbone)  # its head is shared by three levels
    uses, tensors = count_uses(detector, SIZE), named_tensors(detector)
    assert sum(n * tensors[name].numel() for name, n in uses.items()) == count_macs(detector, SIZE)


def test_macs_of_a_channel_are_what_cutting_it_saves(build_unit):
    unit = build_unit(channels=32)
    uses = {f"student.{name}": n for name, n in count_uses(unit.student, SIZE).items()}
    group = next(g for g in find_groups(unit, SIZE) if "head.class_tower" in g.name)
    promised = macs_by_channel(group, named_tensors(unit), uses)[0].item()
    before = count_macs(unit.student, SIZE)
    removed = {}
    for member in group.members:
        gone = {p for p, channel in zip(member.positions, member.channels) if channel == 0}
        removed.setdefault((member.name, member.dim), set()).update(gone)
    cut_everywhere(Plan.from_removed(removed, named_tensors(unit)), unit, None, torch.optim.SGD(unit.parameters(), 0.1))
    assert before - count_macs(unit.student, SIZE) == promised


def test_saliency_is_the_squared_product_of_weight_and_gradient(build_tiny, images, targets):
    unit = Distiller(build_tiny()).train()
    frozen = next(unit.student.backbone.parameters()).requires_grad_(False)
    batches = [Batch(images, targets, [], []), Batch(images.flip(0), targets, [], [])]
    buffers = {name: b.clone() for name, b in unit.named_buffers()}
    saliency = measure_saliency(unit, None, batches)
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
    assert saliency.keys() == expected.keys()
    for name, value in saliency.items():
        torch.testing.assert_close(value, expected[name])
    assert saliency[next(n for n, p in unit.named_parameters() if p is frozen)].sum() == 0


def test_channels_that_do_nothing_go_first(build_unit, images, targets):
    unit = build_unit(channels=32)
    dead = [1, 4, 9, 17, 18, 22, 23, 30]
    norm = unit.student.head.class_tower[0]
    with torch.no_grad():  # large filters, whose outputs are nevertheless silenced
        norm.conv.weight[dead] *= 50
        for level in norm.norms:
            level.weight[dead], level.bias[dead] = 0.0, 0.0
    unit.combiner.weights["feature_mimic"] = 0.0
    saliency = measure_saliency(unit, None, [Batch(images, targets, [], [])])
    group = next(g for g in find_groups(unit, SIZE) if "head.class_tower" in g.name)
    scores = taylor(group, named_tensors(unit), saliency)
    assert scores.argsort()[:8].sort().values.tolist() == dead


def test_what_is_dear_goes_first_where_costs_count(build_unit):
    unit = build_unit(channels=32)
    torch.manual_seed(0)
    # only norms and biases matter: each belongs to one channel, cheap or dear
    saliency = {name: torch.rand(len(t)) for name, t in named_tensors(unit).items() if t.dim() == 1}
    channels_left = {}
    for per_macs in (False, True):
        settings = {"target": 0.8, "start": 0, "end": 0, "importance": "taylor", "ranking": "global"}
        pruner = Pruner(count_macs(unit.student, SIZE), SIZE, per_macs=per_macs, floor=0.25, **settings)
        pruner.check(unit)
        plan = pruner.plan(unit, 0, saliency)
        assert plan and all(len(cut.keep) >= cut.width * 0.25 for cut in plan.cuts)
        trial = copy.deepcopy(unit.student)
        apply_plan([(trial, plan.below("student."))])
        channels_left[per_macs] = sum(len(t) for t in named_tensors(trial).values() if t.dim() == 1)
    assert channels_left[True] > channels_left[False]
