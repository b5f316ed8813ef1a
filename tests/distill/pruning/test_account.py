import pytest
import torch

from distill.distiller import Distiller
from distill.pruning.account import account
from distill.pruning.budget import make_plan
from distill.pruning.cost import Cost
from distill.pruning.graph import find_groups
from distill.pruning.limits import layers_of
from students.plan import named_tensors


def test_every_group_says_what_it_lost_and_all_of_it_adds_up(build_tiny):
    unit = Distiller(build_tiny())
    groups, tensors, cost = find_groups(unit, (64, 64)), named_tensors(unit), Cost(unit, "macs", (64, 64))
    scores = [torch.arange(group.width, dtype=torch.float32) for group in groups]
    counts = [group.width for group in groups]
    place = next(n for n, group in enumerate(groups) if group.name == "student.head.class_tower.0.conv")
    counts[0], counts[place] = counts[0] // 2, 12
    plan = make_plan(groups, scores, counts, tensors)
    entries = account(groups, scores, plan, tensors, cost)
    assert [tuple(entry["layers"]) for entry in entries] == [tuple(layers_of(group)) for group in groups]
    assert sum(entry["before"] != entry["after"] for entry in entries) == 2
    tower = next(entry for entry in entries if entry["layers"] == ["head.class_tower.0.conv"])
    assert (tower["before"], tower["after"]) == (16, 12)
    assert (tower["removed"], tower["kept"]) == (1.5, 9.5)  # the means of 0 to 3 and 4 to 15
    uncut = next(entry for entry in entries if entry["layers"] == ["head.box_tower.0.conv"])
    assert (uncut["before"], uncut["after"], uncut["macs_saved"]) == (16, 16, 0)
    assert (uncut["removed"], uncut["kept"]) == (None, 7.5)
    assert all(entry["macs_saved"] > 0 for entry in entries if entry["removed"] is not None)
    assert sum(entry["macs_saved"] for entry in entries) == pytest.approx(cost.now() - cost.after(plan))
