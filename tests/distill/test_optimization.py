import math

import pytest
import torch
from torch import nn

from distill.optimization import build_optimizer, rate_at, set_rate
from students import Plan, apply_plan
from students.plan import Cut


def rates(**changes):
    arguments = {"total": 12, "warmup": 4, "final": 0.1} | changes
    return [rate_at(step, **arguments) for step in range(arguments["total"])]


def test_rate_warms_up_and_falls_on_a_cosine():
    found = rates()
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4] == 1.0
    assert found[8] == pytest.approx(0.1 + 0.9 / 2)  # half way
    assert found[6] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert rate_at(12, 12, 4, 0.1) == pytest.approx(0.1)
    assert rates(warmup=0)[0] == 1.0
    assert rate_at(4, 4, 4, 0.1) == 1.0  # all warm-up: nothing to divide by


def test_rate_ramps_up_again_after_a_cut():
    plain, cut = rates(), rates(cut_step=6, rewarm=3)
    shares = [b / a for a, b in zip(plain, cut)]
    assert shares[6:] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert rates(cut_step=6, rewarm=0)[6:] == plain[6:]


@pytest.fixture
def net():
    backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    net = nn.ModuleDict({"backbone": backbone, "head": nn.Conv2d(4, 2, 1)})
    net["head"].bias.requires_grad_(False)
    return net


def test_norms_and_biases_do_not_decay_and_the_backbone_has_its_rate(net):
    optimizer = build_optimizer(net, lr=0.1, backbone_lr=0.5, weight_decay=0.02)
    names = {id(p): name for name, p in net.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found == {
        "backbone.0.weight": (0.05, 0.02),
        "backbone.0.bias": (0.05, 0.0),
        "backbone.1.weight": (0.05, 0.0),
        "backbone.1.bias": (0.05, 0.0),
        "head.weight": (0.1, 0.02),  # its bias is frozen
    }


def test_set_rate_is_a_share_of_each_group_s_own_peak(net):
    optimizer = build_optimizer(net, lr=0.1, backbone_lr=0.5, weight_decay=0.0)
    for share in (0.5, 0.25):
        set_rate(optimizer, share)
        assert {g["lr"] for g in optimizer.param_groups} == {0.05 * share, 0.1 * share}
    again = build_optimizer(net, lr=9.0, backbone_lr=1.0, weight_decay=0.0)
    again.load_state_dict(optimizer.state_dict())
    set_rate(again, 1.0)  # the peak comes back with the state
    assert {g["lr"] for g in again.param_groups} == {0.05, 0.1}


def test_decay_acts_on_weights_alone(net):
    optimizer = build_optimizer(net, lr=0.1, backbone_lr=1.0, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = dict(net.named_parameters())
    assert torch.allclose(after["head.weight"], before["head.weight"] * 0.95)
    assert torch.equal(after["backbone.1.weight"], before["backbone.1.weight"])
    assert torch.equal(after["backbone.0.bias"], before["backbone.0.bias"])


def test_a_pyramid_that_torchvision_keeps_in_the_backbone_has_the_whole_rate():
    module = nn.ModuleDict({"backbone": nn.ModuleDict({"body": nn.Linear(2, 2), "fpn": nn.Linear(2, 2)})})
    optimizer = build_optimizer(module, lr=1.0, backbone_lr=0.1, weight_decay=0.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: rates[id(p)] for name, p in module.named_parameters() if name.endswith("weight")}
    assert found == {"backbone.body.weight": 0.1, "backbone.fpn.weight": 1.0}


def test_the_fused_kernel_steps_as_the_plain_one_however_tensors_lie_in_memory():
    """Its CPU version does not look at strides: unaligned, it takes the step of one element for another."""
    torch.manual_seed(0)
    ours = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    theirs = nn.Conv2d(4, 6, 3)
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(ours, lr=0.1, backbone_lr=1.0, weight_decay=0.02)
    plain = torch.optim.AdamW([{"params": theirs.weight, "weight_decay": 0.02}], lr=0.1, foreach=False, fused=False)
    assert optimizer.defaults["fused"]

    def step():
        gradient = torch.randn_like(theirs.weight)
        ours.weight.grad, theirs.weight.grad = gradient.contiguous(), gradient.contiguous()
        optimizer.step()
        plain.step()
        torch.testing.assert_close(ours.weight, theirs.weight)

    step()
    step()
    cut = Plan((Cut(6, (0, 2, 3, 5), (("weight", 0), ("bias", 0))), Cut(4, (0, 1, 3), (("weight", 1),))))
    for module, of in ((ours, optimizer), (theirs, plain)):
        apply_plan([(module, cut)], [of])
    ours.to(memory_format=torch.channels_last)
    optimizer.state[ours.weight]["exp_avg"] = optimizer.state[ours.weight]["exp_avg"].contiguous()
    step()
    step()
    assert ours.weight.shape == (4, 3, 3, 3)
