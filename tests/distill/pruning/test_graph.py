import copy
from collections import Counter

import pytest
import torch

from distill.pruning.budget import make_plan
from distill.pruning.graph import find_groups
from students.plan import apply_plan, named_tensors

SIZE = (64, 64)
NETS = [
    ("test_resnet", "fpn", "task_aligned"),
    ("mobilenetv3_small_050", "fpn", "gfl"),
    ("test_efficientnet", "pan", "retinanet"),
]


def slices(group):
    return {(member.name, member.dim) for member in group.members}


def group_of(groups, name, dim):
    found = [group for group in groups if (name, dim) in slices(group)]
    assert len(found) == 1, f"{name} is in {len(found)} groups"
    return found[0]


def norm(name):
    return {(f"{name}.{leaf}", 0) for leaf in ("weight", "bias", "running_mean", "running_var")}


def test_a_residual_block_of_a_resnet(build_unit):
    body = "student.backbone.body"
    groups = find_groups(build_unit(), SIZE)
    assert slices(group_of(groups, f"{body}.layer3.0.conv3.weight", 0)) == {
        (f"{body}.layer3.0.conv3.weight", 0),
        (f"{body}.layer3.0.downsample.1.weight", 0),  # the shortcut is added to the branch
        (f"{body}.layer4.0.conv1.weight", 1),
        (f"{body}.layer4.0.downsample.1.weight", 1),
        ("student.neck.laterals.1.0.weight", 1),
        *norm(f"{body}.layer3.0.bn3"),
        *norm(f"{body}.layer3.0.downsample.2"),
    }
    assert slices(group_of(groups, f"{body}.layer3.0.conv1.weight", 0)) == {
        (f"{body}.layer3.0.conv1.weight", 0),
        (f"{body}.layer3.0.conv2.weight", 1),
        *norm(f"{body}.layer3.0.bn1"),
    }


def test_depthwise_and_squeeze_excite_of_a_mobilenet(build_unit):
    block = "student.backbone.body.blocks.2.0"
    groups = find_groups(build_unit(backbone="mobilenetv3_small_050"), SIZE)
    assert slices(group_of(groups, f"{block}.conv_dw.weight", 0)) == {
        (f"{block}.conv_pw.weight", 0),
        (f"{block}.conv_dw.weight", 0),
        (f"{block}.se.conv_reduce.weight", 1),
        (f"{block}.se.conv_expand.weight", 0),
        (f"{block}.se.conv_expand.bias", 0),
        (f"{block}.conv_pwl.weight", 1),
        *norm(f"{block}.bn1"),
        *norm(f"{block}.bn2"),
    }
    assert slices(group_of(groups, f"{block}.se.conv_reduce.weight", 0)) == {
        (f"{block}.se.conv_reduce.weight", 0),
        (f"{block}.se.conv_reduce.bias", 0),
        (f"{block}.se.conv_expand.weight", 1),
    }


def test_pyramid_head_and_adapters_go_together(build_unit):
    groups = find_groups(build_unit(), SIZE)
    levels = range(3)
    assert slices(group_of(groups, "student.neck.outputs.0.0.weight", 0)) == {
        *((f"student.neck.outputs.{n}.0.weight", 0) for n in levels),
        *(entry for n in levels for entry in norm(f"student.neck.outputs.{n}.1")),
        ("student.head.class_tower.0.conv.weight", 1),  # one convolution reads all levels
        ("student.head.box_tower.0.conv.weight", 1),
        *((f"terms.feature_mimic.adapters.P{n + 3}.weight", 1) for n in levels),
    }
    assert slices(group_of(groups, "student.head.class_tower.0.conv.weight", 0)) == {
        ("student.head.class_tower.0.conv.weight", 0),
        *(entry for n in levels for entry in norm(f"student.head.class_tower.0.norms.{n}")),
        ("student.head.class_logits.weight", 1),
    }


def test_the_paths_of_a_pan(build_unit):
    groups = find_groups(build_unit(neck="pan"), SIZE)
    # each downsampled map is added to a level of the FPN, and all levels meet in the head
    assert slices(group_of(groups, "student.neck.downsamples.0.0.weight", 0)) >= {
        ("student.neck.downsamples.0.0.weight", 0),
        ("student.neck.top_down.outputs.1.0.weight", 0),
        ("student.neck.outputs.0.0.weight", 1),
    }
    assert slices(group_of(groups, "student.neck.top_down.outputs.0.0.weight", 0)) >= {
        ("student.neck.top_down.outputs.0.0.weight", 0),
        ("student.neck.outputs.1.0.weight", 0),
        ("student.neck.downsamples.0.0.weight", 1),
        ("student.head.box_tower.0.conv.weight", 1),
        ("terms.feature_mimic.adapters.P5.weight", 1),
    }


@pytest.mark.parametrize(("backbone", "neck", "head"), NETS)
def test_dead_channels_may_go_and_nothing_else_changes(build_unit, images, backbone, neck, head):
    """Where a group's channel carries nothing, its cut must leave every output as it was: the groups are whole."""
    unit = build_unit(backbone=backbone, neck=neck, head=head).eval()
    groups = find_groups(unit, SIZE)
    tensors = named_tensors(unit)
    scores = []
    for number, group in enumerate(groups):
        score = torch.ones(group.width)
        score[[number % group.width, (3 * number + 1) % group.width]] = 0
        for member in group.members:
            gone = [p for p, channel in zip(member.positions, member.channels) if not score[channel]]
            tensors[member.name].detach().index_fill_(member.dim, torch.tensor(gone), 0.0)
        scores.append(score)
    with torch.no_grad():
        wanted = unit.traced_outputs(images)
        apply_plan([(unit, make_plan(groups, scores, [int(score.sum()) for score in scores], tensors))])
        found = unit.traced_outputs(images)
    assert unit.student.feature_channels == (14, 14, 14)
    assert [x.shape[1] for x in found[:3]] == [14, 14, 14]
    # logits, distances and adapted maps keep their width
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(found[3:], wanted[3:]))
    live = named_tensors(unit)
    for group, score in zip(groups, scores):
        for member in group.members:
            gone = sum(score[channel] == 0 for channel in member.channels)
            assert live[member.name].shape[member.dim] == len(member.positions) - gone


@pytest.mark.parametrize(("backbone", "neck", "head"), NETS)
def test_every_channel_is_in_one_group_and_outputs_are_in_none(build_unit, backbone, neck, head):
    unit = build_unit(backbone=backbone, neck=neck, head=head)
    groups = find_groups(unit, SIZE)
    counts = Counter(entry for group in groups for entry in slices(group))
    assert set(counts.values()) == {1}
    assert all(len(group.members) == len(slices(group)) for group in groups)  # or importance would count twice
    tensors = named_tensors(unit)
    for group in groups:
        for member in group.members:
            assert tensors[member.name].shape[member.dim] == len(member.positions)
            assert set(member.channels) == set(range(group.width))
    outputs = {name for name, module in unit.named_modules() if module in unit.output_layers}
    assert len(outputs) == 5
    assert not {(f"{name}.{leaf}", 0) for name in outputs for leaf in ("weight", "bias")} & counts.keys()
    convolutions = {n for n, m in unit.named_modules() if isinstance(m, torch.nn.Conv2d)} - outputs
    assert {f"{name}.weight" for name in convolutions} <= {name for name, dim in counts if dim == 0}


def test_the_unit_is_not_touched(build_unit):
    unit = build_unit()
    unit.student.backbone.requires_grad_(False)
    state = copy.deepcopy(unit.state_dict())
    flags = [p.requires_grad for p in unit.parameters()]
    groups = find_groups(unit, SIZE)
    assert any(".backbone." in group.name for group in groups)  # frozen layers can be cut as well
    assert [p.requires_grad for p in unit.parameters()] == flags
    assert all(torch.equal(value, state[name]) for name, value in unit.state_dict().items())
    assert unit.training and all(p.grad is None for p in unit.parameters())


@pytest.mark.parametrize("backbone", ["regnetx_002", "resnet26d"])
def test_grouped_convolutions_keep_their_channels(build_unit, backbone):
    unit = build_unit(backbone=backbone)
    tensors = named_tensors(unit)
    grouped = {
        f"{name}.weight"
        for name, module in unit.named_modules()
        if isinstance(module, torch.nn.Conv2d) and module.groups > 1
    }
    groups = find_groups(unit, SIZE)
    assert not grouped & {member.name for group in groups for member in group.members}
    assert bool(grouped) == (backbone == "regnetx_002")
    for group in groups:  # every index lies in its tensor
        assert all(max(member.positions) < tensors[member.name].shape[member.dim] for member in group.members)
