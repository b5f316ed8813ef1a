import pytest
import torch

from distill.pruning.budget import keep_counts
from distill.pruning.graph import ChannelGroup, Member
from distill.pruning.importance import IMPORTANCES
from distill.pruning.ranking import Curve, rank_by_harm, rank_by_structure, rank_together, score_greedily


def test_ranks_within_a_group_count_from_its_uncut_width():
    # of 4 channels one is gone already: the three left stand at 2/4, 3/4 and 4/4, whatever the scale of their scores
    (ranks,) = rank_together([torch.tensor([70.0, 10.0, 30.0])], [4])
    assert ranks.tolist() == [1.0, 0.5, 0.75]


def test_one_threshold_on_ranks_leaves_the_same_share_of_every_group():
    wide, narrow = torch.arange(64.0), torch.arange(32.0) * 1000
    ranks = [*rank_together([wide], [64]), *rank_together([narrow], [32])]
    assert keep_counts(ranks, 0.51, [8, 8], [8, 8], [64, 32]) == [32, 16]


def test_groups_of_a_set_are_ranked_against_each_other():
    ranks = rank_together([torch.tensor([1.0, 4]), torch.tensor([3.0, 2])], [2, 4])  # two are gone
    assert torch.cat(ranks).tolist() == pytest.approx([3 / 6, 6 / 6, 5 / 6, 4 / 6])


def chain(name, width, kernel, extra=()):
    every = tuple(range(width))
    members = (
        Member(f"student.{name}.weight", 0, every, every),
        Member(f"student.{name}_next.weight", 1, every, every),
        *(Member(tensor, 0, every, every) for tensor in extra),
    )
    tensors = {
        f"student.{name}.weight": torch.zeros(width, 3, kernel, kernel),
        f"student.{name}_next.weight": torch.zeros(5, width, 1, 1),
        **{tensor: torch.zeros(width) for tensor in extra},
    }
    return ChannelGroup(name, width, members), tensors


def test_structures_are_ranked_apart():
    chains = [
        chain("a", 2, 3),
        chain("b", 3, 3, extra=("terms.mimic.weight",)),  # adapters are no part of the structure, nor is the width
        chain("c", 2, 1),  # another kernel
        chain("d", 2, 3, extra=("student.norm.weight",)),
    ]
    groups = [group for group, _ in chains]
    tensors = {name: tensor for _, found in chains for name, tensor in found.items()}
    scores = [torch.tensor([1.0, 9]), torch.tensor([2.0, 3, 10]), torch.tensor([50.0, 60]), torch.tensor([0.2, 0.1])]
    ranks = rank_by_structure(groups, scores, [group.width for group in groups], tensors)
    assert ranks[0].tolist() == pytest.approx([1 / 5, 4 / 5])
    assert ranks[1].tolist() == pytest.approx([2 / 5, 3 / 5, 5 / 5])
    assert ranks[2].tolist() == [0.5, 1]
    assert ranks[3].tolist() == [1, 0.5]


def test_harm_is_that_of_all_that_went_before():
    # shares 0.25, 0.5, 0.75 and 1 of an uncut width of 4; the curve falls at 0.5, which counts as staying level
    scores = torch.tensor([4.0, 1, 3, 2])
    harm = rank_by_harm(scores, Curve(4, (0.25, 0.5, 0.9), (2.0, 1.0, 6.0)))
    assert harm[[1, 3, 2]].tolist() == pytest.approx([2, 2, 2 + 4 * 0.25 / 0.4])
    assert harm[0] > 100  # never measured: the last to go
    assert harm[1] < harm[3]  # where the curve is flat, the order of the scores holds
    # with two of six gone already, the weakest that is left makes it three
    assert rank_by_harm(scores, Curve(6, (0.25, 0.5), (2.0, 8.0)))[1].item() == pytest.approx(8)


def test_greedy_scores_leave_out_what_went():
    # on a line at 0, 1, 10, 12 and 13; by the distances to all, 36, 33, 24, 26 and 29, the middle goes first
    group = ChannelGroup("a", 5, (Member("a.weight", 0, tuple(range(5)), tuple(range(5))),))
    tensors = {"a.weight": torch.tensor([[0.0], [1], [10], [12], [13]])}
    at_once = IMPORTANCES["fpgm"].score(group, tensors, None)
    assert at_once.argsort().tolist() == [2, 3, 4, 1, 0]
    # then, of 0, 1, 12 and 13, distances are 26, 24, 24 and 26: 1 goes; of 0, 12 and 13 they are 25, 13 and 14
    greedy = score_greedily(IMPORTANCES["fpgm"], group, tensors, step=1)
    assert greedy.argsort(stable=True)[:3].tolist() == [2, 1, 3]
    assert greedy[2] == pytest.approx(24 / 29.6) and greedy[1] == pytest.approx(24 / 25)
    # in one step of all there is nothing to leave out
    assert torch.equal(score_greedily(IMPORTANCES["fpgm"], group, tensors, step=5), at_once)


def test_greedy_scores_never_fall():
    group = ChannelGroup("a", 4, (Member("a.weight", 0, (0, 1, 2, 3), (0, 1, 2, 3)),))
    tensors = {"a.weight": torch.tensor([[1.0], [2], [2], [2]])}
    # 1 of a mean of 7/4; then 2 of a mean of 2
    greedy = score_greedily(IMPORTANCES["group_l1"], group, tensors, step=1)
    assert greedy.tolist() == pytest.approx([4 / 7, 1, 1, 1])
