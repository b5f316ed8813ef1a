import pytest
import torch
from torch import nn

from distill.distiller import Distiller
from distill.pruning.graph import ChannelGroup, Member, trace_channels
from distill.pruning.importance import bn_scale
from distill.pruning.pruner import Pruner, cut_everywhere
from distill.pruning.sparsity import GroupPenalty, SparsityPenalty, small_scales
from students.plan import named_tensors

SIZE = (64, 64)


def following(unit, **settings):
    penalty = SparsityPenalty(**{"end": 4} | settings)
    penalty.follow(unit, SIZE)
    return penalty


def gradients(unit, penalty, epoch=0.0):
    unit.zero_grad()
    penalty(epoch).backward()
    return {name: p.grad for name, p in unit.named_parameters() if p.grad is not None}


@pytest.fixture
def unit(build_unit):
    unit = build_unit()
    with torch.no_grad():
        for norm in (m for m in unit.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.uniform_(-1, 1)
    return unit


def test_rates_go_down_in_a_straight_line_and_end():
    penalty = SparsityPenalty(end=4, scales=1.0, final=0.1)
    # 1 - 0.9 epoch / epochs, as it was published
    assert [penalty.rate_at(epoch) for epoch in (0, 1, 2, 3.5, 4, 7)] == pytest.approx([1, 0.775, 0.55, 0.2125, 0, 0])


def test_scales_get_their_signs(unit):
    penalty = following(unit, scales=0.01)
    scales = {
        n: p for n, p in unit.named_parameters() if f"{n.removesuffix('weight')}running_mean" in named_tensors(unit)
    }
    scales = {name: scale for name, scale in scales.items() if name.endswith("weight")}
    found = gradients(unit, penalty, epoch=2)
    assert found.keys() == scales.keys() and len(scales) > 10
    assert all(torch.allclose(found[name], 0.01 * 0.55 * scale.sign()) for name, scale in scales.items())
    assert float(penalty(2).detach()) == pytest.approx(
        0.0055 * sum(float(scale.detach().abs().sum()) for scale in scales.values())
    )


def test_weights_get_their_signs_and_norms_and_adapters_nothing(unit):
    found = gradients(unit, following(unit, weights=0.5))
    layers = {f"student.{n}.weight" for n, m in unit.student.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert found.keys() == layers
    assert all(torch.equal(gradient, 0.5 * unit.get_parameter(name).sign()) for name, gradient in found.items())


def test_the_less_a_channel_owns_the_more_it_is_drawn(unit):
    penalty, wanted = following(unit, groups=2.0), 0.0
    tensors = {name: x.detach() for name, x in named_tensors(unit).items() if isinstance(x, nn.Parameter)}
    for group in trace_channels(unit, SIZE).groups:
        owned = [0.0] * group.width
        for member in group.members:
            if member.name.startswith("student.") and member.name in tensors:
                for position, channel in zip(member.positions, member.channels):
                    owned[channel] += float(tensors[member.name].select(member.dim, position).square().sum())
        least, most = min(owned), max(owned)
        wanted += sum(2 ** (4 * (most - each) / (most - least)) * each for each in owned)
    assert float(penalty(0).detach()) == pytest.approx(2 * wanted, rel=1e-4)


def test_the_strength_itself_is_not_drawn():
    # channels that own 1 and 4: the first is drawn 2^4 times as strongly; gradients are 2 w times the strength
    weight = nn.Parameter(torch.tensor([[1.0], [2.0]]))
    group = ChannelGroup("a", 2, (Member("a", 0, (0, 1), (0, 1)),))
    penalty = GroupPenalty(group, {"a": weight})()
    assert float(penalty.detach()) == 16 * 1 + 1 * 4
    penalty.backward()
    assert weight.grad.flatten().tolist() == [32.0, 4.0]


def test_scales_of_shortcuts_are_spared_if_asked(build_tiny):
    unit = Distiller(build_tiny(backbone="resnet18"))
    found = gradients(unit, following(unit, scales=1.0, spare_shortcuts=True))
    body = {name.removeprefix("student.backbone.body.") for name in found if ".body." in name}
    # only the first of each block's two; the second, those of projections, and the stem meet in sums
    assert body == {f"layer{stage}.{block}.bn1.weight" for stage in (1, 2, 3, 4) for block in (0, 1)}


def test_inverted_residuals_have_shortcuts_too(build_tiny):
    unit = Distiller(build_tiny(backbone="mobilenetv3_small_100"))
    every = gradients(unit, following(unit, scales=1.0))
    left = gradients(unit, following(unit, scales=1.0, spare_shortcuts=True))
    spared = {name.partition("blocks.")[2] for name in every.keys() - left.keys() if "blocks." in name}
    # squeeze-and-excitation multiplies, which is no sum: bn1 and bn2 of each block, its depthwise one, are drawn.
    # Blocks without a shortcut whose channels a later one adds to, or the pyramid reads, are spared with it.
    assert spared == {"1.0.bn3.weight", "1.1.bn3.weight"} | {
        f"{s}.{b}.bn3.weight" for s, n in ((2, 3), (3, 2), (4, 3)) for b in range(n)
    }


def test_a_student_that_trains_no_batch_norms_is_refused(build_tiny):
    unit = Distiller(build_tiny())
    for module in unit.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"^scales: test_resnet trains no batch norms; draw groups or weights instead"):
        following(unit, scales=1.0)


def test_it_follows_a_cut(make_trained):
    unit, ema, optimizer, _ = make_trained()
    penalty = following(unit, scales=1.0, weights=1.0, groups=1.0)
    pruner = Pruner(SIZE, target=0.7, epochs=[0], ranking="global")
    pruner.check(unit)
    cut_everywhere(pruner.plan(unit, 0), unit, ema, optimizer)
    penalty.follow(unit, SIZE)
    fresh = following(unit, scales=1.0, weights=1.0, groups=1.0)
    assert torch.equal(penalty(1), fresh(1)) and penalty(1) > 0


def test_small_scales_are_counted(unit):
    norms = [m for m in unit.student.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.ones_(norm.weight)
    total = sum(norm.num_features for norm in norms)
    with torch.no_grad():
        norms[0].weight[:3] = torch.tensor([0.0, -0.009, 0.011])
    assert small_scales(unit.student) == pytest.approx(2 / total)
    assert small_scales(nn.Conv2d(1, 1, 1)) is None


@pytest.mark.parametrize("scaled", [1.0, 2.0**16])
def test_mixed_precision_and_accumulation_leave_it_what_it_is(unit, images, targets, scaled):
    """Of a loss that is scaled, in lower precision and made in two parts, it is a term like any other."""
    penalty, rate = following(unit, scales=0.125), 0.125

    def found(term):
        unit.zero_grad()
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = unit.task_loss(unit.student(images), targets)
            ((loss + term()) / 2 * scaled).backward()
        return {name: p.grad / scaled for name, p in unit.student.named_parameters() if p.grad is not None}

    unit.eval()
    plain, drawn = found(lambda: 0.0), found(lambda: penalty(0))
    norms = {f"{name}.weight": m for name, m in unit.student.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, gradient in drawn.items():
        wanted = plain[name] + (rate * norms[name].weight.sign() if name in norms else 0.0)
        assert torch.allclose(gradient, wanted, atol=1e-4), name


def test_scales_that_nothing_holds_fall_and_show_which_channels_can_go(make_trained):
    """Sparse training by the penalty alone: what falls under the threshold is what the importance takes first."""
    unit, *_ = make_trained()
    penalty, optimizer = following(unit, scales=0.1, final=1.0, end=99), torch.optim.SGD(unit.parameters(), lr=0.1)
    group = next(g for g in trace_channels(unit, SIZE).groups if g.name.endswith("body.layer1.0.conv1"))
    with torch.no_grad():
        unit.student.backbone.body.layer1[0].bn1.weight[:2] = 0.05
    before = bn_scale(group, named_tensors(unit))
    for _ in range(4):  # 0.01 a step
        optimizer.zero_grad()
        penalty(0).backward()
        optimizer.step()
    after = bn_scale(group, named_tensors(unit))
    assert torch.allclose(before - after, torch.full_like(after, 0.04), atol=1e-5)
    assert after.argsort()[:2].sort().values.tolist() == [0, 1]
