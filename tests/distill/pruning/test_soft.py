import torch

from distill.pruning.pruner import Pruner, cut_everywhere
from distill.pruning.soft import silence_channels

SIZE = (64, 64)


def test_the_filters_of_a_plan_are_silent_and_come_back(make_trained):
    unit, ema, optimizer, step = make_trained()
    pruner = Pruner(SIZE, target=0.4, epochs=[1, 2, 3], ranking="global", method="soft", schedule="constant")
    pruner.check(unit)
    assert (pruner.soft_epochs, pruner.due(1), pruner.due(3)) == ([1, 2], 0.4, 0.4)
    plan = pruner.plan(unit, 1)
    before = {name: p.detach().clone() for name, p in unit.named_parameters()}
    averaged = [p.clone() for p in ema.module.parameters()]
    moments = [optimizer.state[p]["exp_avg"].clone() for p in unit.parameters()]
    silence_channels(plan, unit)

    silent = {}
    for cut in plan.cuts:
        for name, dim in cut.slices:
            if name.endswith("conv.weight") and dim == 0 and name.startswith("student.head"):
                silent[name] = sorted(set(range(cut.width)) - set(cut.keep))
    assert silent
    for name, gone in silent.items():
        weight = unit.get_parameter(name)
        kept = [i for i in range(len(weight)) if i not in gone]
        assert not weight[gone].any() and torch.equal(weight[kept], before[name][kept])
    changed = {name for name, p in unit.named_parameters() if not torch.equal(p, before[name])}
    # no norm, no adapter, and nothing of what reads the channels
    assert all(unit.get_parameter(name).dim() == 4 or "squeeze" in name for name in changed)
    assert not any(name.startswith("terms.") for name in changed)
    assert all(map(torch.equal, ema.module.parameters(), averaged))
    assert all(torch.equal(optimizer.state[p]["exp_avg"], m) for p, m in zip(unit.parameters(), moments))

    step()
    assert all(unit.get_parameter(name)[gone].any() for name, gone in silent.items())
    # at last the same budget is met by a cut
    cut_everywhere(pruner.plan(unit, 3), unit, ema, optimizer)
    assert 0.3 < pruner.left(unit) <= 0.4


def test_channels_that_are_only_set_to_0_are_never_behind():
    pruner = Pruner((64, 64), target=0.5, epochs=[1, 3, 5], method="soft", schedule="linear")
    assert [epoch for epoch in range(8) if pruner.cuts_before(epoch)] == [5]
    assert [epoch for epoch in range(8) if pruner.is_behind(epoch, left=0.9)] == [5, 6, 7]
