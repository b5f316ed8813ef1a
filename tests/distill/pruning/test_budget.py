import copy

import pytest
import torch

from distill.measure import count_macs
from distill.pruning.budget import keep_counts, make_plan, meet_budget, meet_measured
from distill.pruning.cost import Cost
from distill.pruning.graph import ChannelGroup, Member, find_groups
from distill.pruning.importance import group_l1
from distill.pruning.ranking import rank_together
from students.plan import Cut, Plan, apply_plan, named_tensors

SIZE = (64, 64)
GROUP = ChannelGroup(
    "a",
    3,
    (
        Member("a.weight", 0, (0, 1, 2), (0, 1, 2)),
        Member("a.bias", 0, (0, 1, 2), (0, 1, 2)),
        Member("b.weight", 1, (0, 1, 2, 3, 4, 5), (0, 0, 1, 1, 2, 2)),  # two inputs a channel, as after flattening
    ),
)
TENSORS = {
    "a.weight": torch.tensor([[1.0, -1], [2, 0], [0, 0]]),
    "a.bias": torch.tensor([100.0, 100, 100]),
    "b.weight": torch.tensor([[1.0, 0, 0, 0, -3, 0], [0, 1, 0, 0, 0, 1]]),
}


def macs(student):
    return count_macs(student, SIZE)


def after(unit):
    return Cost(unit, "macs", SIZE).after


def scored(unit):
    """Groups, their scores, and the unit's tensors as they are now."""
    groups, tensors = find_groups(unit, SIZE), named_tensors(unit)
    scores = [group_l1(group, tensors) for group in groups]
    return groups, scores, {name: tensor.detach().clone() for name, tensor in tensors.items()}


def test_l1_importance_sums_all_that_a_channel_owns():
    # 2 + 1 + 1, 2 + 0 + 0, 0 + 3 + 1; biases are left out; divided by the mean 10/3
    assert torch.allclose(group_l1(GROUP, TENSORS), torch.tensor([4.0, 2, 4]) * 3 / 10)


def test_counts_are_rounded_to_the_nearest_multiple():
    scores = [torch.arange(float(width)) for width in (40, 20, 12, 8, 5)]
    steps, floors, caps = [8] * 5, [8] * 5, [40, 20, 12, 8, 5]
    # what loses nothing is not rounded either
    assert keep_counts(scores, 0.0, steps, floors, caps) == [40, 20, 12, 8, 5]
    # 39, 19, 11, 7 and 4 reach it; never more than there are
    assert keep_counts(scores, 1.0, steps, floors, caps) == [40, 16, 8, 8, 5]
    # 29, 9, 1, 0 and 0 reach it; never less than one multiple
    assert keep_counts(scores, 11.0, steps, floors, caps) == [32, 8, 8, 8, 5]
    assert keep_counts(scores, 16.0, steps, floors, caps) == [24, 8, 8, 8, 5]
    assert keep_counts(scores, float("inf"), steps, floors, caps) == [8, 8, 8, 8, 5]
    # rounded up, not below
    assert keep_counts(scores, float("inf"), steps, [20, 10, 4, 1, 1], caps) == [24, 16, 8, 8, 5]
    assert keep_counts(scores, 11.0, [1] * 5, [1] * 5, caps) == [29, 9, 1, 1, 1]
    # a cap is rounded down, but not below the floor
    assert keep_counts(scores, 0.0, steps, [8, 8, 8, 8, 5], [31, 20, 9, 3, 5]) == [24, 20, 8, 8, 5]


def test_steps_are_of_the_layer_where_one_channel_stands_for_several():
    steps = [ChannelGroup("a", 12, (), size=size).step(16) for size in (1, 8, 4, 3, 32)]
    assert steps == [16, 2, 4, 16, 1]
    scores = [torch.arange(12.0)] * 3
    assert keep_counts(scores, 7.0, steps[:3], [12, 3, 6], [12] * 3) == [12, 4, 8]  # 5 stay, 3 and 6 must


def test_a_plan_takes_numbers_along():
    group = ChannelGroup("a", 2, (Member("a", 0, (0, 1), (0, 1)),), (Member("b.width", None, (0, 1, 2), (0, 1, 1)),))
    plan = make_plan([group], [torch.tensor([1.0, 0])], [1], {"a": torch.zeros(2)})
    assert plan == Plan((Cut(2, (0,), (("a", 0),)),), (("b.width", 2),))


def test_a_plan_keeps_the_best_channels():
    score = torch.tensor([0.3, 0.1, 0.2])
    plan = make_plan([GROUP], [score], [2], TENSORS)
    assert plan == Plan((Cut(3, (0, 2), (("a.weight", 0), ("a.bias", 0))), Cut(6, (0, 1, 4, 5), (("b.weight", 1),))))
    assert make_plan([GROUP], [score], [3], TENSORS) == Plan(())
    assert make_plan([GROUP], [torch.ones(3)], [1], TENSORS).cuts[0].keep == (2,)  # ties: the first ones go


@pytest.mark.parametrize(("backbone", "neck"), [("test_resnet", "fpn"), ("test_efficientnet", "pan")])
def test_the_mildest_plan_that_meets_the_budget(build_unit, backbone, neck):
    unit = build_unit(backbone=backbone, neck=neck, channels=32)
    groups, scores, tensors = scored(unit)
    before = copy.deepcopy(unit)
    target, eights = 0.6 * count_macs(unit.student, SIZE), [8] * len(groups)
    plan, left = meet_budget(groups, scores, named_tensors(unit), target, after(unit), eights, eights)
    # so far it is only a plan
    assert all(torch.equal(x, y) for x, y in zip(unit.state_dict().values(), before.state_dict().values()))
    apply_plan([(unit, plan)])
    assert macs(unit.student) == left <= target
    for cut in plan.cuts:
        assert len(cut.keep) % 8 == 0 and 8 <= len(cut.keep) < cut.width

    # met within 2%, or no group can have a step back
    live = named_tensors(unit)
    counts = [len(live[g.members[0].name].movedim(g.members[0].dim, 0)) for g in groups]
    for n, group in enumerate(groups) if left < 0.98 * target else ():
        wider = min(counts[n] + 8, group.width)
        trial = copy.deepcopy(before)
        apply_plan([(trial, make_plan(groups, scores, [*counts[:n], wider, *counts[n + 1 :]], tensors))])
        assert wider == counts[n] or macs(trial.student) > target


def test_steps_go_back_to_the_most_valuable_first():
    # one layer of 4 channels a group, which cost 3 each in a, 2 in b and 1 in c
    groups = [
        ChannelGroup(name, 4, (Member(f"{name}.weight", 0, (0, 1, 2, 3), (0, 1, 2, 3)),)) for name in ("a", "b", "c")
    ]
    tensors = {f"{name}.weight": torch.zeros(4, 1) for name in ("a", "b", "c")}
    prices = {"a.weight": 3, "b.weight": 2, "c.weight": 1}

    def cost(plan):
        gone = {name: cut.width - len(cut.keep) for cut in plan.cuts for name, _ in cut.slices}
        return sum(price * (4 - gone.get(name, 0)) for name, price in prices.items())

    def counts(scores, budget, caps=(4, 4, 4)):
        plan, left = meet_budget(groups, scores, tensors, budget, cost, [1] * 3, [1] * 3, caps)
        kept = {name: len(cut.keep) for cut in plan.cuts for name, _ in cut.slices}
        return [kept.get(f"{name}.weight", 4) for name in ("a", "b", "c")], left

    tied = [torch.tensor([1.0, 2, 3, 4])] * 3
    # two of each would leave 12, three 18: of three, a goes first; 3 + 3 + 3 fits no more
    assert counts(tied, 16) == ([3, 2, 3], 16)
    # ranks apart: a threshold takes all but one of a at once; giving it back is too dear, b and c get nothing above it
    apart = [torch.tensor([1.0, 1, 1, 9]), torch.tensor([2.0, 3, 4, 5]), torch.tensor([6.0, 7, 8, 9])]
    assert counts(apart, 15) == ([1, 4, 4], 15)
    # with one of a given back 18 are left; one of b less leaves 16, which is not close, one of c 17
    assert counts(apart, 17) == ([2, 4, 3], 17)
    # caps hold where the budget leaves room
    assert counts(tied, 24, caps=(4, 2, 4)) == ([4, 2, 4], 20)


def test_groups_that_go_together_are_cut_one_by_one(build_unit):
    # ranks within a group fall alike in all groups, so every threshold takes eight channels from each at once
    unit = build_unit(channels=32)
    groups = find_groups(unit, SIZE)
    scores = [rank_together([torch.arange(float(group.width))], [group.width])[0] for group in groups]
    uncut, eights = macs(unit.student), [8] * len(groups)
    for share in (0.9, 0.8, 0.7, 0.6, 0.5):
        _, left = meet_budget(groups, scores, named_tensors(unit), share * uncut, after(unit), eights, eights)
        assert share - 0.08 < left / uncut <= share


def test_no_wider_than_it_was_and_whole_where_nothing_goes(build_unit):
    unit = build_unit(channels=20)  # no multiple of 8
    groups, scores, _ = scored(unit)
    eights = [8] * len(groups)
    plan, left = meet_budget(groups, scores, named_tensors(unit), macs(unit.student), after(unit), eights, eights)
    assert not plan and left == macs(unit.student)


def test_a_budget_out_of_reach_gives_the_heaviest_plan(build_unit):
    unit = build_unit()
    groups, scores, _ = scored(unit)
    eights = [8] * len(groups)
    plan, left = meet_budget(groups, scores, named_tensors(unit), 0, after(unit), eights, eights)
    assert left > 0
    assert {len(cut.keep) for cut in plan.cuts} == {8}


def test_few_measurements_find_a_measured_budget():
    # half of the time does not shrink; a plan is the share that it was made for
    measured = []

    def cost(share):
        measured.append(share)
        return 4.0 + 4.0 * share

    found = meet_measured(lambda share: share, cost, budget=6.0, now=8.0)
    # what is aimed at is 5.94: 5.94/8 of what can be counted leaves 6.97, and the line from there to 1 gives the share
    assert measured == pytest.approx([0.7425, 0.485])
    assert found == pytest.approx((0.485, 5.94))  # within 2% of 6
    assert meet_measured(lambda share: share, cost, budget=3.0, now=8.0) == (0.0, 4.0)  # out of reach: the heaviest
    assert meet_measured(lambda share: share, cost, budget=9.0, now=8.0) == (1.0, 8.0)


def test_a_measured_budget_is_bracketed_where_cost_is_no_line():
    measured = []

    def cost(share):
        measured.append(share)
        return 2.0 if share < 0.3 else 7.0 + share  # a step, as of a kernel that is chosen by width

    plan, left = meet_measured(lambda share: share, cost, budget=5.0, now=8.0)
    assert left == 2.0 and 0.25 < plan < 0.3 and len(measured) == 8
    assert measured == sorted(set(measured), key=measured.index)  # no share is measured twice
