import copy

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from distill.pruning.folding import add_offsets, measure_offsets
from distill.pruning.pruner import cut_everywhere
from students.plan import Cut, Plan, apply_plan


def blocked(reader):
    """Channels 1 and 3 of four give beta behind the activation, 2 and 0.25, whatever comes in."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), *reader).eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([1.0, 0, 1, 0]))
        net[1].bias.copy_(torch.tensor([0.5, 2, -0.5, 0.25]))
    return net


def plan_of(*more):
    norm = tuple((f"1.{leaf}", 0) for leaf in ("weight", "bias", "running_mean", "running_var"))
    return Plan((Cut(4, (0, 2), (("0.weight", 0), *norm, ("3.weight", 1))), *more))


def cut(net, plan, images, fold=True):
    small = copy.deepcopy(net)
    offsets = measure_offsets(net, plan, [images[:1], images[1:]]) if fold else {}
    apply_plan([(small, plan)])
    add_offsets(small, plan, offsets)
    return small


@pytest.fixture
def maps():
    return torch.rand(3, 3, 5, 6, generator=torch.Generator().manual_seed(1))


def test_what_a_constant_channel_gave_goes_into_the_next_bias():
    net = blocked([nn.Conv2d(4, 1, 1)])
    with torch.no_grad():
        net[3].weight.copy_(torch.tensor([1.0, 3, 5, 8]).view(1, 4, 1, 1))
    offsets = measure_offsets(net, plan_of(), [torch.rand(2, 3, 4, 4)])
    assert {name: offset.tolist() for name, offset in offsets.items()} == {"3.bias": [8.0]}  # 3 * 2 + 8 * 0.25


@pytest.mark.parametrize(
    "reader",
    [
        [nn.Conv2d(4, 5, 1)],
        [nn.Conv2d(4, 5, 3, stride=2)],
        [nn.Conv2d(4, 5, 1, bias=False), nn.BatchNorm2d(5)],
        [nn.Conv2d(4, 5, 1, bias=False), FrozenBatchNorm2d(5)],
    ],
)
def test_cutting_constant_channels_changes_nothing(reader, maps):
    net = blocked(reader)
    assert torch.allclose(cut(net, plan_of(), maps)(maps), net(maps), atol=1e-5)
    assert not torch.allclose(cut(net, plan_of(), maps, fold=False)(maps), net(maps), atol=1e-2)


def test_only_borders_that_zeros_pad_change(maps):
    net = blocked([nn.Conv2d(4, 5, 3, padding=1)])
    before, after = net(maps), cut(net, plan_of(), maps)(maps)
    assert torch.allclose(after[..., 1:-1, 1:-1], before[..., 1:-1, 1:-1], atol=1e-5)
    assert not torch.allclose(after[..., 0, :], before[..., 0, :], atol=1e-2)


def test_outputs_that_go_too_take_their_share_along(maps):
    net = blocked([nn.Conv2d(4, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1)])
    with torch.no_grad():
        net[3].weight[1] = 0  # so that channel 1 is constant here, too
    outputs = Cut(5, (0, 2, 3, 4), (("3.weight", 0), ("3.bias", 0), ("5.weight", 1)))
    small = cut(net, plan_of(outputs), maps)
    assert small[3].bias.shape == (4,)
    assert torch.allclose(small(maps), net(maps), atol=1e-5)


def test_a_layer_of_several_norms_gives_each_its_own():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norms = (
                nn.Conv2d(2, 1, 1, bias=False),
                nn.ModuleList([nn.BatchNorm2d(1), nn.BatchNorm2d(1)]),
            )

        def forward(self, x):
            return [norm(self.conv(x * scale)) for norm, scale in zip(self.norms, (1, 10))]

    net = Shared().eval()
    nn.init.constant_(net.conv.weight, 2.0)
    plan = Plan((Cut(2, (0,), (("conv.weight", 1),)),))
    offsets = measure_offsets(net, plan, [torch.full((1, 2, 2, 2), 3.0)])
    assert {name: offset.tolist() for name, offset in offsets.items()} == {
        "norms.0.running_mean": [-6.0],
        "norms.1.running_mean": [-60.0],
    }


def test_a_channel_that_varies_leaves_its_mean():
    net = nn.Sequential(nn.Linear(2, 1))
    plan = Plan((Cut(2, (0,), (("0.weight", 1),)),))
    nn.init.constant_(net[0].weight, 2.0)
    offsets = measure_offsets(net, plan, [torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 2.0], [0.0, 6.0]])])
    assert offsets["0.bias"].tolist() == [6.0]  # 2 * (1 + 2 + 6) / 3


def test_student_and_average_keep_what_a_slimmed_channel_gave(make_trained, images):
    unit, ema, optimizer, _ = make_trained()
    width, conv = unit.student.head.class_logits.in_channels, "student.head.class_tower.0"
    leaves = ("weight", "bias", "running_mean", "running_var")
    norms = [(f"{conv}.norms.{n}.{leaf}", 0) for n in range(3) for leaf in leaves]
    slices = ((f"{conv}.conv.weight", 0), *norms, ("student.head.class_logits.weight", 1))
    plan = Plan((Cut(width, tuple(range(0, width, 2)), slices),))
    with torch.no_grad():
        for detector in (unit.student, ema.module):
            for norm in detector.head.class_tower[0].norms:
                norm.weight[1::2], norm.bias[1::2] = 0, 1.0
    before = [detector.eval()(images).class_logits[0] for detector in (unit.student, ema.module)]
    offsets = measure_offsets(ema.module, plan.below("student."), [images])
    bias = unit.student.head.class_logits.bias
    cut_everywhere(plan, unit, ema, optimizer)
    for detector in (unit.student, ema.module):
        add_offsets(detector, plan.below("student."), offsets)
    assert unit.student.head.class_logits.bias is bias and bias.requires_grad
    after = [detector(images).class_logits[0] for detector in (unit.student, ema.module)]
    assert torch.allclose(after[1][..., 1:-1, 1:-1], before[1][..., 1:-1, 1:-1], atol=1e-4)
    # the student's weights differ a little from the copy's, that the offsets were measured on
    assert torch.allclose(after[0][..., 1:-1, 1:-1], before[0][..., 1:-1, 1:-1], atol=2e-2)


class Residual(nn.Module):
    """Its input plus as much again, behind an activation."""

    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(4, 4, 1, bias=False), nn.ReLU()
        nn.init.dirac_(self.conv.weight)

    def forward(self, x):
        return self.act(x + self.conv(x))


def test_what_is_given_is_measured_without_the_blocks_that_go(maps):
    net = blocked([Residual(), nn.Conv2d(4, 5, 1)])
    slices = (*plan_of().cuts[0].slices[:-1], ("4.weight", 1))
    plan = Plan((Cut(4, (0, 2), slices),), blocks=(("3", "act"),))
    without = copy.deepcopy(net)
    apply_plan([(without, Plan((), blocks=plan.blocks))])
    assert isinstance(without[3], nn.ReLU)
    assert torch.allclose(cut(net, plan, maps)(maps), without(maps), atol=1e-5)
    assert isinstance(net[3], Residual)
    assert measure_offsets(net, Plan((), blocks=plan.blocks), [maps]) == {}
