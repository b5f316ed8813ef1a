import copy

import pytest
import torch
from torch import nn

from distill.distiller import Distiller
from distill.measure import count_macs, count_parameters
from distill.pruning.budget import make_plan
from distill.pruning.cost import Cost
from distill.pruning.graph import ChannelGroup, Member, find_groups
from students.plan import apply_plan, named_tensors

SIZE = (64, 64)


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 2, stride=2)
        self.b = nn.Conv2d(4, 5, 1, bias=False)

    def forward(self, images):
        return self.b(self.a(images))


GROUP = ChannelGroup(
    "student.a",
    2,
    tuple(
        Member(name, dim, (0, 1, 2, 3), (0, 0, 1, 1))  # two filters a channel
        for name, dim in [("student.a.weight", 0), ("student.a.bias", 0), ("student.b.weight", 1)]
    ),
)


@pytest.mark.parametrize(
    ("currency", "now", "each"),
    [
        # 2x2 positions of 4 filters of 3x2x2 entries, and of 5 filters of 4
        ("macs", 4 * 4 * 12 + 4 * 5 * 4, 4 * 2 * 12 + 4 * 5 * 2),
        ("params", 4 * 12 + 4 + 5 * 4, 2 * 12 + 2 + 5 * 2),
        ("memory", 4 * 4 + 4 * 5, 2 * 4),
    ],
)
def test_costs_by_hand(currency, now, each):
    unit = Distiller(TwoLayers())
    cost = Cost(unit, currency, (4, 4))
    assert cost.now() == now
    assert cost.by_channel(GROUP).tolist() == [each, each]
    plan = make_plan([GROUP], [torch.tensor([0.0, 1])], [1], named_tensors(unit))
    assert cost.after(plan) == now - each
    apply_plan([(unit, plan)])
    assert Cost(unit, currency, (4, 4)).now() == now - each


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet"])
def test_a_planned_cut_costs_what_it_costs_when_made(build_unit, backbone):
    unit = build_unit(backbone=backbone, channels=32)  # its head is shared by three levels
    groups = find_groups(unit, SIZE)
    scores = [torch.arange(float(group.width)) for group in groups]
    plan = make_plan(groups, scores, [max(1, 2 * group.width // 3) for group in groups], named_tensors(unit))
    trial = copy.deepcopy(unit.student)
    apply_plan([(trial, plan.below("student."))])
    assert Cost(unit, "macs", SIZE).now() == count_macs(unit.student, SIZE)
    assert Cost(unit, "macs", SIZE).after(plan) == count_macs(trial, SIZE)
    assert Cost(unit, "params", SIZE).after(plan) == count_parameters(trial)
    assert Cost(unit, "memory", SIZE).after(plan) == Cost(Distiller(trial), "memory", SIZE).now()
