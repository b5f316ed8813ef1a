import pytest
import torch
from torch import nn

from distill.data import Batch
from distill.distiller import Distiller
from distill.measure import count_nonzero, count_parameters
from distill.pruning.masks import Masks, set_to_zero
from distill.pruning.pruner import Pruner, cut_everywhere


def masks_for(unit, **settings):
    masks = Masks(
        **{"kind": "weights", "epochs": [0], "sparsity": None if ":" in settings.get("kind", "") else 0.5} | settings
    )
    masks.check(unit.student)
    return masks


@pytest.fixture
def unit(build_tiny):
    return Distiller(build_tiny())


def test_the_smallest_go_the_same_share_of_every_layer(unit):
    masks = masks_for(unit, epochs=[1, 2], sparsity=0.75, schedule="linear")
    assert masks.due(1) == 0.375 and masks.due(2) == 0.75
    chosen = masks.choose(unit, 1, {}, ())
    outputs = {"head.class_logits.weight", "head.box_distances.weight"}
    layers = {f"{n}.weight" for n, m in unit.student.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert chosen.keys() == layers - outputs
    for name, mask in chosen.items():
        weight = unit.student.get_parameter(name).abs()
        assert int(mask.sum()) == round(0.375 * weight.numel())
        assert weight[mask].max() <= weight[~mask].min()


def test_the_smallest_anywhere_go(unit):
    with torch.no_grad():
        unit.student.head.box_tower[0].conv.weight.mul_(1e-3)
    chosen = masks_for(unit, ranking="global", sparsity=0.3).choose(unit, 0, {}, ())
    weights = {name: unit.student.get_parameter(name).abs() for name in chosen}
    assert sum(int(m.sum()) for m in chosen.values()) == round(0.3 * sum(w.numel() for w in weights.values()))
    assert max(w[chosen[n]].max() for n, w in weights.items() if chosen[n].any()) <= min(
        w[~chosen[n]].min() for n, w in weights.items() if not chosen[n].all()
    )
    assert chosen["head.box_tower.0.conv.weight"].all()


def test_kernels_go_whole(unit):
    chosen = masks_for(unit, kind="kernels", sparsity=0.25).choose(unit, 0, {}, ())
    assert chosen and all(unit.student.get_parameter(name).shape[2:] == (3, 3) for name in chosen)
    for name, mask in chosen.items():
        each = mask.flatten(2).float().mean(2)
        assert set(each.unique().tolist()) == {0.0, 1.0}
        assert int(each.sum()) == round(0.25 * each.numel())
        sizes = unit.student.get_parameter(name).abs().mean(dim=(2, 3))
        assert sizes[each.bool()].max() <= sizes[~each.bool()].min()


def test_two_of_four_neighbouring_inputs_stay():
    class Student(nn.Module):
        title, output_layers = "a", ()

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 1, (1, 2))

    student = Student()
    with torch.no_grad():
        student.conv.weight[0, :, 0, 0] = torch.tensor([4.0, -1, 2, -3, 0, 0, 0, 1])
        student.conv.weight[0, :, 0, 1] = torch.tensor([1.0, 2, 3, 4, -4, -3, -2, -1])
    unit = nn.Module()
    unit.student = student
    masks = Masks("2:4", [0])
    masks.check(student)
    mask = masks.choose(unit, 0, {}, ())["conv.weight"]
    assert mask[0, :, 0, 0].tolist() == [False, True, True, False, True, True, True, False]  # all that was 0
    assert mask[0, :, 0, 1].tolist() == [True, True, False, False, False, False, True, True]


def test_saliency_is_weight_times_gradient(unit, images, targets):
    batch = Batch(images, targets, [], [])
    chosen = masks_for(unit, importance="gradient").choose(unit, 0, {}, [batch])
    student = unit.student.eval()
    sum(student.loss(student(images), targets).values()).backward()
    for name, mask in chosen.items():
        weight = student.get_parameter(name)
        saliency = (weight * weight.grad).square().detach()
        assert saliency[mask].max() <= saliency[~mask].min(), name


@pytest.mark.parametrize("kind", ["weights", "2:4"])
def test_what_is_held_stays_0_through_training_averaging_and_cuts(make_trained, kind):
    unit, ema, optimizer, step = make_trained()
    pruner = Pruner((64, 64), target=0.6, epochs=[0], ranking="global")
    pruner.check(unit)
    masks = masks_for(unit, kind=kind, indivisible="skip")

    def choose():
        chosen = masks.choose(unit, 0, {}, ())
        set_to_zero(chosen, (unit.student, ema.module))
        masks.follow(unit.student, 0)
        return chosen

    def held():
        return {n: unit.student.get_parameter(n) == 0 for n in masks._chosen(unit.student)}

    choose()
    before = held()
    assert all(float(mask.float().mean()) == pytest.approx(0.5, abs=0.01) for mask in before.values())
    step()  # without `hold` the optimizer moves them
    assert any(int(mask.sum()) < int(before[name].sum()) for name, mask in held().items())
    masks.hold()
    moved = {name: p.detach().clone() for name, p in unit.student.named_parameters()}
    assert all(torch.equal(mask, before[name]) for name, mask in held().items())
    step()
    masks.hold()
    assert all(torch.equal(mask, before[name]) for name, mask in held().items())
    assert any(not torch.equal(p, moved[name]) for name, p in unit.student.named_parameters())

    cut_everywhere(pruner.plan(unit, 0), unit, ema, optimizer)
    chosen = choose()
    kept = {name: unit.student.get_parameter(name) for name in masks._chosen(unit.student)}
    assert kept and all(float((w == 0).float().mean()) >= 0.49 for w in kept.values())
    for detector in (unit.student, ema.module):
        assert not any(detector.get_parameter(name)[mask].any() for name, mask in chosen.items())
    if kind == "2:4":
        for weight in kept.values():
            fours = (weight != 0).transpose(1, -1).unflatten(-1, (-1, 4)).sum(-1)
            assert int(fours.max()) == 2
    zeros = sum(int((p == 0).sum()) for p in unit.student.parameters() if p.dim() > 1)
    assert count_nonzero(unit.student) == count_parameters(unit.student) - zeros < count_parameters(unit.student)


def test_what_is_0_already_counts_and_stays(unit):
    weight = unit.student.head.box_tower[0].conv.weight
    with torch.no_grad():
        weight[: len(weight) // 4] = 0.0
        weight[-1] *= 1e-6
    name, quarter = "head.box_tower.0.conv.weight", len(weight) // 4
    mask = masks_for(unit, sparsity=0.25).choose(unit, 0, {}, ())[name]
    assert mask[:quarter].all() and not mask[quarter:].any()
    mask = masks_for(unit, sparsity=0.1).choose(unit, 0, {}, ())[name]  # less than is 0
    assert mask[:quarter].all() and not mask[quarter:].any()


def test_nothing_is_held_before_its_time(unit):
    masks = masks_for(unit, epochs=[2])
    with torch.no_grad():
        unit.student.head.box_tower[0].conv.weight.zero_()
    masks.follow(unit.student, 1)
    nn.init.ones_(unit.student.head.box_tower[0].conv.weight)
    masks.hold()
    assert unit.student.head.box_tower[0].conv.weight.all()


def test_what_does_not_fit_is_told(unit):
    with pytest.raises(
        ValueError, match=r"^kind: 2:4 goes by 4 inputs at a time, and backbone.body.conv1.0 has 3 \(\d"
    ):
        masks_for(unit, kind="2:4")
    masks_for(unit, kind="2:4", keep=["backbone.body.conv1.0"])
    with pytest.raises(ValueError, match=r"^keep: 'neck' matches none of the \d+ layers, such as "):
        masks_for(unit, keep=["neck"])
    with pytest.raises(ValueError, match=r"^keep: its patterns hold every layer that could be masked"):
        masks_for(unit, kind="kernels", keep=["*"])
