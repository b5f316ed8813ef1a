import copy

import pytest
import torch

from distill.measure import count_macs
from distill.pruning.budget import keep_counts, make_plan, meet_macs
from distill.pruning.graph import ChannelGroup, Member, find_groups
from distill.pruning.importance import group_l1, rank_within_group
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
    floors = [8] * 5
    assert keep_counts(scores, 0.0, 8, floors) == [40, 20, 12, 8, 5]  # what loses nothing is not rounded either
    assert keep_counts(scores, 1.0, 8, floors) == [
        40,
        16,
        8,
        8,
        5,
    ]  # 39, 19, 11, 7 and 4 reach it; never more than there are
    assert keep_counts(scores, 11.0, 8, floors) == [
        32,
        8,
        8,
        8,
        5,
    ]  # 29, 9, 1, 0 and 0 reach it; never less than one multiple
    assert keep_counts(scores, 16.0, 8, floors) == [24, 8, 8, 8, 5]
    assert keep_counts(scores, float("inf"), 8, floors) == [8, 8, 8, 8, 5]
    assert keep_counts(scores, float("inf"), 8, [20, 10, 4, 1, 1]) == [24, 16, 8, 8, 5]  # rounded up, not below
    assert keep_counts(scores, 11.0, 1, [1] * 5) == [29, 9, 1, 1, 1]


def test_multiples_are_of_the_layer_where_one_channel_stands_for_several():
    scores = [torch.arange(12.0)] * 3
    # of each channel's 1, 8 and 4 neighbours: multiples of 16, of 2 and of 4 at least 24 neighbours, 3 and 6 of them
    assert keep_counts(scores, 7.0, 16, [24] * 3, [1, 8, 4]) == [12, 4, 8]
    assert keep_counts(scores, 12.0, 8, [8] * 3, [1, 8, 4]) == [8, 1, 2]


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
    target = 0.6 * count_macs(unit.student, SIZE)
    plan, left = meet_macs(unit, unit.student, groups, scores, target, macs, 8, [8] * len(groups))
    # so far it is only a plan
    assert all(torch.equal(x, y) for x, y in zip(unit.state_dict().values(), before.state_dict().values()))
    apply_plan([(unit, plan)])
    assert macs(unit.student) == left <= target
    for cut in plan.cuts:
        assert len(cut.keep) % 8 == 0 and 8 <= len(cut.keep) < cut.width

    # no group can have its last step back
    live = named_tensors(unit)
    counts = [len(live[g.members[0].name].movedim(g.members[0].dim, 0)) for g in groups]
    steps = [keep_counts(scores, float(t), 8, [8] * len(groups)) for t in torch.unique(torch.cat(scores))]
    milder = next(step for step in reversed(steps) if all(a >= b for a, b in zip(step, counts)) and step != counts)
    for n in (n for n in range(len(groups)) if milder[n] != counts[n]):
        trial = copy.deepcopy(before)
        apply_plan([(trial, make_plan(groups, scores, [*counts[:n], milder[n], *counts[n + 1 :]], tensors))])
        assert macs(trial.student) > target


def test_groups_that_go_together_are_cut_one_by_one(build_unit):
    # ranks within a group fall alike in all groups, so every threshold takes eight channels from each at once
    unit = build_unit(channels=32)
    groups = find_groups(unit, SIZE)
    scores = [rank_within_group(torch.arange(float(group.width)), group.width) for group in groups]
    uncut = macs(unit.student)
    for share in (0.9, 0.8, 0.7, 0.6, 0.5):
        _, left = meet_macs(unit, unit.student, groups, scores, share * uncut, macs, 8, [8] * len(groups))
        assert share - 0.08 < left / uncut <= share


def test_no_wider_than_it_was_and_whole_where_nothing_goes(build_unit):
    unit = build_unit(channels=20)  # no multiple of 8
    groups, scores, _ = scored(unit)
    plan, left = meet_macs(unit, unit.student, groups, scores, macs(unit.student), macs, 8, [8] * len(groups))
    assert not plan and left == macs(unit.student)


def test_a_budget_out_of_reach_gives_the_heaviest_plan(build_unit):
    unit = build_unit()
    groups, scores, _ = scored(unit)
    plan, left = meet_macs(unit, unit.student, groups, scores, 0, macs, 8, [8] * len(groups))
    assert left > 0
    assert {len(cut.keep) for cut in plan.cuts} == {8}


def test_ranks_within_a_group_count_from_its_uncut_width():
    # of 4 channels one is gone already: the three left stand at 2/4, 3/4 and 4/4, whatever the scale of their scores
    ranks = rank_within_group(torch.tensor([70.0, 10.0, 30.0]), uncut_width=4)
    assert ranks.tolist() == [1.0, 0.5, 0.75]


def test_one_threshold_on_ranks_leaves_the_same_share_of_every_group():
    wide, narrow = torch.arange(64.0), torch.arange(32.0) * 1000
    ranks = [rank_within_group(wide, 64), rank_within_group(narrow, 32)]
    assert keep_counts(ranks, 0.51, 8, [8, 8]) == [32, 16]
