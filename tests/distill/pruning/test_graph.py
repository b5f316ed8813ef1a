import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from distill.distiller import Distiller
from distill.pruning.budget import keep_counts, make_plan
from distill.pruning.graph import find_groups, trace_channels
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


def silence(unit, groups, seed=0):
    """Silences some channels of each group where they are made, and gives the scores that make a plan cut just these.

    Weights and biases of their producers and of norms become 0; what reads the channels is left as it is.
    """
    tensors, generator, scores = named_tensors(unit), torch.Generator().manual_seed(seed), []
    transposed = {f"{name}.weight" for name, m in unit.named_modules() if isinstance(m, nn.ConvTranspose2d)}
    for number, group in enumerate(groups):
        score = torch.ones(group.width)
        score[torch.randperm(group.width, generator=generator)[: min(1 + number % 4, group.width - 1)]] = 0
        for member in group.members:
            tensor = tensors[member.name]
            if member.dim == (member.name in transposed) or tensor.numel() == tensor.shape[member.dim]:
                gone = [p for p, channel in zip(member.positions, member.channels) if not score[channel]]
                tensor.detach().index_fill_(member.dim, torch.tensor(gone), 0.0)
        scores.append(score)
    return scores


def cut_silent(unit, groups, images, seed=0):
    """All outputs of a unit before and after some silent channels of all groups were cut."""
    scores, tensors = silence(unit, groups, seed), named_tensors(unit)
    with torch.no_grad():
        before = unit.traced_outputs(images)
        apply_plan([(unit, make_plan(groups, scores, [int(score.sum()) for score in scores], tensors))])
        return before, unit.traced_outputs(images)


def liven(unit):
    """Gives vectors, which networks begin with all alike, values of their own."""
    generator = torch.Generator().manual_seed(2)
    for name, tensor in named_tensors(unit).items():
        if tensor.is_floating_point() and 1 < tensor.numel() == max(tensor.shape):
            signed = name.endswith(("bias", "mean"))
            tensor.data = torch.rand(tensor.shape, generator=generator) + (-0.5 if signed else 0.5)


BACKBONES = (
    "resnet18 resnet50 mobilenetv3_small_100 mobilenetv4_conv_small tf_efficientnet_lite0 regnety_002 repvgg_a0 "
    "densenet121 ghostnet_100 convnext_atto cspresnet50 hgnetv2_b0 fastvit_t8"
)


@pytest.mark.parametrize("backbone", BACKBONES.split())
def test_backbones_lose_silent_channels_without_a_change(build_tiny, images, monkeypatch, backbone):
    # a layer norm's statistics are those of the channels that are left; only its scale and shift can be compared
    monkeypatch.setattr(F, "layer_norm", lambda x, shape, weight, bias, eps: x * weight + bias)
    unit = Distiller(build_tiny(backbone=backbone)).eval()
    liven(unit)
    graph = trace_channels(unit, SIZE)
    assert not graph.whole
    widths = {name: tensor.shape for name, tensor in named_tensors(unit).items()}
    before, after = cut_silent(unit, graph.groups, images)
    predictions = list(zip(before, after))[3:]
    assert all(x.std() > 1e-4 for x, _ in predictions)
    assert all(torch.allclose(x, y, rtol=1e-3, atol=1e-4 * float(x.abs().max())) for x, y in predictions)
    outputs = {f"{name}.weight" for name, module in unit.named_modules() if module in unit.output_layers}
    for name, module in unit.named_modules():  # every convolution has lost something, and its numbers agree
        if isinstance(module, nn.Conv2d) and f"{name}.weight" not in outputs:
            assert module.weight.shape < widths[f"{name}.weight"], name
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
    unit.train()
    sum(x.square().mean() for x in unit.traced_outputs(images)).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in unit.parameters())


class Student(nn.Module):
    """What the graph asks of a student, with a tiny network in it."""

    def __init__(self, body, last=8):
        super().__init__()
        self.first, self.body, self.last = nn.Conv2d(3, 16, 3, padding=1), body, nn.Conv2d(last, 2, 1)

    def forward(self, images):
        return self.last(self.body(self.first(images)))


class Unit(nn.Module):
    def __init__(self, body, last=8):
        super().__init__()
        torch.manual_seed(0)
        self.student = Student(body, last)

    def traced_outputs(self, images):
        return [self.student(images)]

    @property
    def output_layers(self):
        return (self.student.last,)


class Block(nn.Module):
    """Layers, and a function of them and their input."""

    def __init__(self, run, *layers, **numbers):
        super().__init__()
        self.layers, self.run = nn.ModuleList(layers), run
        self.scale = nn.Parameter(torch.rand(16))
        self.__dict__.update(numbers)

    def forward(self, x):
        return self.run(self, x, *self.layers)


def shuffle(block, x, last):
    b, c, h, w = x.shape
    return last(x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w))


def read_parts(block, x, first, second):
    one, other = x.split(block.parts, dim=1)
    return torch.cat([first(one), second(other)], dim=1)


def read_slices(block, x, first, second):
    return first(x[:, : block.fine]) + second(x[:, block.fine :])


def normalise(block, x, last):
    return last(F.normalize(x) * block.scale.view(1, -1, 1, 1))


def frozen_norm(channels):
    norm = FrozenBatchNorm2d(channels)
    norm.weight.uniform_(0.5, 1.5)
    norm.bias.uniform_(-1, 1)
    return norm


conv = nn.Conv2d
# body, channels that it gives, and of the group that makes its input: width and size
BODIES = {
    "a frozen batch norm": (lambda: nn.Sequential(frozen_norm(16), nn.ReLU(), conv(16, 8, 1)), 8, (16, 1)),
    "a group norm loses whole groups": (
        lambda: nn.Sequential(nn.GroupNorm(4, 16), nn.ReLU(), conv(16, 8, 1)),
        8,
        (4, 4),
    ),
    "depthwise": (lambda: nn.Sequential(conv(16, 32, 3, groups=16), conv(32, 8, 1)), 8, (16, 1)),
    "a grouped convolution loses whole groups": (lambda: conv(16, 8, 3, groups=4), 8, (4, 4)),
    "wide groups lose the same places": (
        lambda: nn.Sequential(conv(16, 64, 1), nn.ReLU(), conv(64, 8, 3, groups=2)),
        8,
        (16, 1),
    ),
    "a channel shuffle": (lambda: Block(shuffle, conv(16, 8, 1)), 8, (8, 1)),
    "a chunk": (lambda: Block(lambda _, x, a: a(torch.mul(*x.chunk(2, dim=1))), conv(8, 8, 1)), 8, (8, 1)),
    "parts of sizes kept as a list": (
        lambda: Block(read_parts, conv(4, 4, 1), conv(12, 4, 1), parts=[4, 12]),
        8,
        (12, 1),
    ),
    "a number where channels are split": (
        lambda: Block(read_slices, conv(6, 8, 1), conv(10, 8, 1), fine=6),
        8,
        (10, 1),
    ),
    "a scale after a norm over channels": (lambda: Block(normalise, conv(16, 8, 1)), 8, (16, 1)),
    "flattened": (
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 8), nn.Unflatten(1, (-1, 1, 1))),
        8,
        (16, 1),
    ),
    "channels last": (
        lambda: Block(lambda b, x, a: a(x.permute(0, 2, 3, 1) * b.scale).permute(0, 3, 1, 2), nn.Linear(16, 8)),
        8,
        (16, 1),
    ),
    "transposed": (lambda: nn.Sequential(conv(16, 6, 1), nn.ConvTranspose2d(6, 8, 2, 2)), 8, (16, 1)),
    "padding beside the channels": (
        lambda: Block(lambda _, x, a: a(F.pad(x, (0, 0, 0, 0, 0, 4))), conv(20, 8, 1)),
        8,
        (16, 1),
    ),
    "padded and pooled": (lambda: nn.Sequential(nn.ReflectionPad2d(1), nn.MaxPool2d(2), conv(16, 8, 1)), 8, (16, 1)),
    "squeeze and excite": (
        lambda: Block(
            lambda _, x, a, b, c: c(x * b(F.relu(a(x.mean((2, 3), keepdim=True)))).sigmoid()),
            conv(16, 4, 1),
            conv(4, 16, 1),
            conv(16, 8, 1),
        ),
        8,
        (16, 1),
    ),
}


@pytest.mark.parametrize("body", BODIES)
def test_channels_run_through(images, body):
    make, channels, (width, size) = BODIES[body]
    unit = Unit(make(), channels).eval()
    graph = trace_channels(unit, SIZE)
    assert not graph.whole
    group = next(g for g in graph.groups if ("student.first.weight", 0) in slices(g))
    assert (group.width, group.size) == (width, size)
    for seed in range(4):
        before, after = cut_silent(copy.deepcopy(unit), graph.groups, images, seed)
        assert torch.allclose(before[0], after[0], atol=1e-5) and before[0].std() > 1e-3


# what is refused: the layers that stay, and a part of the reason
STAYS = {
    "an operation without a rule": (
        lambda: Block(lambda _, x, a: a(x.sort(dim=1).values), conv(16, 8, 1)),
        "sort is not f",
    ),
    "code with a width of its own": (
        lambda: Block(lambda _, x, a: a(x.reshape(-1, 4, 4, *x.shape[2:]).flatten(1, 2)[:, :16]), conv(16, 8, 1)),
        "counts on its width",
    ),
    "halves that change places": (
        lambda: Block(lambda _, x, a: a(torch.cat([x[:, 8:], x[:, :8]], dim=1)), conv(16, 8, 1)),
        "counts on its width",
    ),
    "halves that must be alike": (
        lambda: Block(lambda _, x, a: a(torch.cat(x.tensor_split(2, dim=1)[::-1], dim=1)), conv(16, 8, 1)),
        "counts on its width",
    ),
    "a constant of its width": (
        lambda: Block(lambda _, x, a: a(x + torch.arange(16, device=x.device).view(-1, 1, 1)), conv(16, 8, 1)),
        "meets a fixed width in student.body (Block)",
    ),
    "a convolution along channels": (
        lambda: Block(
            lambda _, x, a, b: b(x * a(x.mean((2, 3))[:, None])[:, 0, :, None, None]),
            nn.Conv1d(1, 1, 3, padding=1),
            conv(16, 8, 1),
        ),
        "a convolution runs along it, in student.body.layers.0 (Conv1d)",
    ),
    "softmax over channels": (lambda: Block(lambda _, x, a: a(x.softmax(1)), conv(16, 8, 1)), "it is summed along"),
    "one channel alone": (
        lambda: Block(lambda _, x, a: a(x * x.select(1, 3)[:, None]), conv(16, 8, 1)),
        "by its place",
    ),
    "padding among the channels": (
        lambda: Block(lambda _, x, a, b: a(x + F.pad(b(x), (0, 0, 0, 0, 0, 12))), conv(16, 8, 1), conv(16, 4, 1)),
        "meets a fixed width in student.body (Block)",
    ),
}


@pytest.mark.parametrize("body", STAYS)
def test_what_cannot_be_followed_stays_and_says_why(images, body):
    make, reason = STAYS[body]
    unit = Unit(make()).eval()
    graph = trace_channels(unit, SIZE)
    assert reason in graph.whole["student.first"]
    kept = {layer for layer in graph.whole if not layer.endswith("layers.0")}
    assert kept == {"student.first"}  # its outputs; all others go as they may
    scores = silence(unit, graph.groups)
    counts = [int(score.sum()) for score in scores]
    apply_plan([(unit, make_plan(graph.groups, scores, counts, named_tensors(unit)))])
    assert unit.traced_outputs(images)[0].shape[1] == 2
    assert sum(scores[0] == 0) and len(unit.student.last.weight[0]) < 8


def test_widths_of_grouped_convolutions_stay_multiples(build_tiny):
    unit = Distiller(build_tiny(backbone="regnetx_002", channels=32))  # groups of 8
    groups = find_groups(unit, SIZE)
    grouped = {n: m.groups for n, m in unit.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}
    assert {g.size for g in groups} == {1, 8}
    scores = [torch.arange(float(group.width)) for group in groups]
    steps, widths = [group.step(16) for group in groups], [group.width for group in groups]
    counts = keep_counts(scores, 3.0, steps, steps, widths)
    apply_plan([(unit, make_plan(groups, scores, counts, named_tensors(unit)))])
    modules = dict(unit.named_modules())
    for name, before in grouped.items():
        conv = modules[name]
        assert conv.weight.shape[1] == 8 and conv.groups == conv.out_channels // 8 < max(before, 4)
        assert conv.out_channels % 16 == 0 or conv.groups == before
