import json

import pytest
import torch
from torch import nn

from students import plan as plan_module
from students.plan import Cut, Plan, apply_plan, named_tensors


class Net(nn.Module):
    """Convolution, batch norm, depthwise convolution and linear layer, whose four channels belong together."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        return self.linear(self.depthwise(self.norm(self.conv(x))).mean(dim=(2, 3)))


KEEP = (0, 2, 3)
PLAN = Plan(
    (
        Cut(
            4,
            KEEP,
            tuple((f"conv.{leaf}", 0) for leaf in ("weight", "bias"))
            + tuple((f"norm.{leaf}", 0) for leaf in ("weight", "bias", "running_mean", "running_var"))
            + (("depthwise.weight", 0), ("depthwise.bias", 0), ("linear.weight", 1)),
        ),
    )
)


def trained_net():
    """A net after one step of AdamW, with fresh gradients."""
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, amsgrad=True)
    for step in range(2):
        net(torch.rand(2, 3, 6, 6)).square().sum().backward()
        if step == 0:
            optimizer.step()
            optimizer.zero_grad()
    return net, optimizer


def snapshot(net, optimizer):
    """All that a cut may change: tensors, identities, gradients, optimizer state and width attributes."""
    tensors = {name: (id(p), p.detach().clone(), p.grad.clone()) for name, p in net.named_parameters()}
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    state = [{key: value.clone() for key, value in optimizer.state[p].items()} for p in net.parameters()]
    widths = [{k: v for k, v in vars(m).items() if isinstance(v, int | tuple | bool)} for m in net.modules()]
    return tensors, buffers, state, widths


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_slices_are_literal():
    net, optimizer = trained_net()
    before = {name: tensor.detach().clone() for name, tensor in named_tensors(net).items()}
    moments = {name: {k: v.clone() for k, v in optimizer.state[p].items()} for name, p in net.named_parameters()}
    identities = {name: id(p) for name, p in net.named_parameters()}
    net.conv.bias.requires_grad_(False)
    apply_plan([(net, PLAN)], [optimizer])

    assert (net.conv.in_channels, net.conv.out_channels, net.conv.groups) == (3, 3, 1)
    assert net.norm.num_features == 3
    assert (net.depthwise.in_channels, net.depthwise.out_channels, net.depthwise.groups) == (3, 3, 3)
    assert (net.linear.in_features, net.linear.out_features) == (3, 2)
    cut_dims = dict(PLAN.cuts[0].slices)
    for name, tensor in named_tensors(net).items():
        wanted = before[name].index_select(cut_dims[name], torch.tensor(KEEP)) if name in cut_dims else before[name]
        assert torch.equal(tensor, wanted), name
    for name, parameter in net.named_parameters():
        assert id(parameter) == identities[name] and isinstance(parameter, nn.Parameter)
        assert parameter.requires_grad == (name != "conv.bias")
        assert (parameter.grad is None) == (name in cut_dims)
        state = optimizer.state[parameter]
        assert state["step"] == 1
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            wanted = moments[name][key]
            wanted = wanted.index_select(cut_dims[name], torch.tensor(KEEP)) if name in cut_dims else wanted
            assert torch.equal(state[key], wanted), (name, key)
    assert net(torch.rand(2, 3, 6, 6)).shape == (2, 2)


def test_both_dimensions_of_one_tensor():
    conv = nn.Conv2d(4, 6, 1, bias=False)
    conv.weight.data = torch.arange(24.0).view(6, 4, 1, 1)
    apply_plan([(conv, Plan((Cut(6, (1, 5), (("weight", 0),)), Cut(4, (0, 3), (("weight", 1),)))))])
    assert conv.weight.flatten().tolist() == [4, 7, 20, 23]
    assert (conv.out_channels, conv.in_channels) == (2, 2)


def test_memory_format_stays():
    net = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.rand(1, 8, 4, 4)).sum().backward()
    optimizer.step()
    keep = (0, 1, 2)
    cut = Plan((Cut(8, keep, (("weight", 0), ("bias", 0))), Cut(8, keep, (("weight", 1),))))
    apply_plan([(net, cut)], [optimizer])
    for tensor in (net.weight, optimizer.state[net.weight]["exp_avg"]):
        assert tensor.shape == (3, 3, 3, 3)
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()


def test_other_normalisations():
    group, layer = nn.GroupNorm(4, 8), nn.LayerNorm(8)
    slices = (("weight", 0), ("bias", 0))
    apply_plan([(group, Plan((Cut(8, (0, 1, 6, 7), slices),))), (layer, Plan((Cut(8, (1, 2, 3), slices),)))])
    assert (group.num_groups, group.num_channels) == (2, 4)
    assert layer.normalized_shape == (3,)
    assert group(torch.rand(1, 4, 2, 2)).shape == (1, 4, 2, 2) and layer(torch.rand(2, 3)).shape == (2, 3)
    with pytest.raises(ValueError, match="leaves 3 channels to a group norm with groups of 2"):
        apply_plan([(nn.GroupNorm(4, 8), Plan((Cut(8, (0, 1, 2), slices),)))])


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (Cut(3, (0,), (("linear.bias", 0),)), "was made for 'linear.bias' of width 3; here it is 2"),
        (Cut(2, (0,), (("linear.scale", 0),)), "cuts 'linear.scale', which this network does not have"),
    ],
)
def test_a_plan_whose_last_tensor_is_wrong_changes_nothing(last, message):
    net, optimizer = trained_net()
    before = snapshot(net, optimizer)
    with pytest.raises(ValueError, match=message):
        apply_plan([(net, Plan((*PLAN.cuts, last)))], [optimizer])
    assert same(before, snapshot(net, optimizer))


def test_a_plan_that_does_not_fit_the_last_module_changes_none():
    net, optimizer = trained_net()
    before = snapshot(net, optimizer)
    with pytest.raises(ValueError, match=r"cuts 'conv.weight', which this network does not have"):
        apply_plan([(net, PLAN), (nn.Linear(2, 2), PLAN)], [optimizer])
    assert same(before, snapshot(net, optimizer))


def test_a_failure_while_the_plan_is_being_applied_changes_nothing(monkeypatch):
    set_value, calls = plan_module._set, []
    net, optimizer = trained_net()
    before = snapshot(net, optimizer)

    def fail_at(number):
        def set_or_fail(owner, key, value):
            calls.append(key)
            if len(calls) == number:
                raise MemoryError
            set_value(owner, key, value)

        return set_or_fail

    for number in range(1, 100):
        calls.clear()
        monkeypatch.setattr(plan_module, "_set", fail_at(number))
        try:
            apply_plan([(net, PLAN)], [optimizer])
        except RuntimeError as error:
            assert isinstance(error.__cause__, MemoryError)
            assert same(before, snapshot(net, optimizer)), f"after a failure at change {number}"
        else:
            break
    # weight, gradient and three moments of 7 parameters, 2 buffers, and the widths
    assert number > 7 * 5 + 2
    assert net.linear.in_features == 3


def test_grouped_convolutions_lose_groups_or_places():
    narrow, wide = nn.Conv2d(8, 12, 1, groups=4), nn.Conv2d(64, 8, 1, groups=2)  # groups of 2 and of 32
    apply_plan([(narrow, Plan((Cut(12, (0, 1, 2, 9, 10, 11), (("weight", 0), ("bias", 0))),)))])
    assert (narrow.groups, narrow.in_channels, narrow.out_channels) == (2, 4, 6)
    assert narrow(torch.rand(1, 4, 2, 2)).shape == (1, 6, 2, 2)
    outputs = Cut(8, (0, 1, 2, 4, 5, 6), (("weight", 0), ("bias", 0)))
    apply_plan([(wide, Plan((outputs, Cut(32, tuple(range(30)), (("weight", 1),)))))])
    assert (wide.groups, wide.in_channels, wide.out_channels) == (2, 60, 6)
    assert wide(torch.rand(1, 60, 2, 2)).shape == (1, 6, 2, 2)


def test_transposed_convolutions():
    conv = nn.ConvTranspose2d(4, 6, 2, 2)
    cuts = (Cut(4, (0, 3), (("weight", 0),)), Cut(6, (1, 2, 5), (("weight", 1), ("bias", 0))))
    apply_plan([(conv, Plan(cuts))])
    assert (conv.in_channels, conv.out_channels) == (2, 3)
    assert conv(torch.rand(1, 2, 2, 2)).shape == (1, 3, 4, 4)


def test_a_group_norm_of_one_group_loses_single_channels():
    norm = nn.GroupNorm(1, 8)
    apply_plan([(norm, Plan((Cut(8, (0, 4, 5), (("weight", 0), ("bias", 0))),)))])
    assert (norm.num_groups, norm.num_channels) == (1, 3)


def test_numbers_become_less():
    net = nn.Sequential(nn.Identity(), nn.Identity())
    net[0].width, net[1].parts, net[1].pair = 8, [4, 12], (3, 5)
    apply_plan([(net, Plan((), (("0.width", 3), ("1.parts.1", 2), ("1.parts.0", 1), ("1.pair.0", 1))))])
    assert (net[0].width, net[1].parts, net[1].pair) == (5, [3, 10], (2, 5))
    for name in ("0.height", "2.width", "1.parts.7", "0.training.1"):
        with pytest.raises(ValueError, match=f"changes the number '{name}', which this network does not have"):
            apply_plan([(net, Plan((), (("0.width", 1), (name, 1))))])
    assert net[0].width == 5


def test_numbers_in_json_and_below_a_prefix():
    plan = Plan((Cut(2, (0,), (("a.b", 0),)),), (("a.width", 3), ("terms.width", 1)))
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert plan.below("a.") == Plan((Cut(2, (0,), (("b", 0),)),), (("width", 3),))
    assert Plan.from_removed({("n", None): {4, 7}, ("m", None): set()}, {}) == Plan((), (("n", 2),))


def test_json_round_trip():
    assert Plan.from_json(json.loads(json.dumps(PLAN.to_json()))) == PLAN
    assert Plan.from_json([]) == Plan(()) and not Plan(()) and PLAN


def test_from_removed_joins_what_loses_the_same_channels():
    tensors = {"a": torch.zeros(4, 3), "b": torch.zeros(4), "c": torch.zeros(2, 3)}
    removed = {("a", 0): {1}, ("b", 0): {1}, ("a", 1): {0, 2}, ("c", 0): set()}
    assert Plan.from_removed(removed, tensors) == Plan(
        (Cut(4, (0, 2, 3), (("a", 0), ("b", 0))), Cut(3, (1,), (("a", 1),)))
    )


def test_below_keeps_only_what_lies_under_the_prefix():
    plan = Plan((Cut(4, KEEP, (("student.a", 0), ("terms.b", 1))), Cut(2, (0,), (("terms.b", 0),))))
    assert plan.below("student.") == Plan((Cut(4, KEEP, (("a", 0),)),))


def test_what_fails_on_the_way_names_layer_and_group_and_changes_nothing():
    class Stubborn(nn.Conv2d):
        def __setattr__(self, key, value):
            if key == "in_channels" and value == 2:
                raise MemoryError("no room")
            super().__setattr__(key, value)

    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Stubborn(4, 2, 1))
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.rand(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    norm = tuple((f"1.{leaf}", 0) for leaf in ("weight", "bias", "running_mean", "running_var"))
    plan = Plan((Cut(4, (0, 2), (("0.weight", 0), ("0.bias", 0), *norm, ("2.weight", 1))),))
    before = snapshot(net, optimizer)
    with pytest.raises(RuntimeError, match=r"^plan: cutting 2, of the group of 0, failed: no room; nothing was cut$"):
        apply_plan([(net, plan)], [optimizer])
    assert same(before, snapshot(net, optimizer))
    assert net[0].out_channels == 4 and net[1].num_features == 4
