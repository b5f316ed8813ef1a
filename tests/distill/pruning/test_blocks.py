import copy

import pytest
import torch
from torch import nn

import students
from distill.data import Batch
from distill.distiller import Distiller
from distill.errors import UserError
from distill.measure import count_macs, count_parameters
from distill.pruning.blocks import BlockPruner
from distill.pruning.cost import Cost
from distill.pruning.pruner import Pruner, cut_everywhere
from distill.pruning.residual import Block, find_blocks
from students import Plan
from students.plan import apply_plan

SIZE = (64, 64)


class Odd(nn.Module):
    """Neither of the modules in it, but one, gives its input plus something."""

    class Twice(nn.Module):
        def __init__(self, form):
            super().__init__()
            self.conv, self.act, self.form = nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True), form

        def forward(self, x):
            if self.form == "spoilt":  # the sum is with something else than what came in
                x.neg_()
            f = self.conv(x)
            match self.form:
                case "sum":
                    f += x
                    return self.act(f)
                case "twice":
                    return x + f + x
                case "scaled":
                    return torch.add(f, x, alpha=2)
                case "spoilt":
                    return f + x
                case "at first" if len(x[0, 0]) == 64:
                    return f + x
                case "then conv":
                    return self.conv(x + f)
                case "product":
                    return x * f
            return f

    def __init__(self, forms):
        super().__init__()
        self.parts = nn.Sequential(*map(self.Twice, forms))

    def forward(self, x):
        return self.parts(x + 0.0)

    def traced(self, output, num_boxes=None):
        return [output]


def test_a_block_is_what_gives_its_input_plus_something():
    forms = ["sum", "twice", "scaled", "spoilt", "then conv", "product", "plain", "sum"]
    assert find_blocks(Odd(forms), SIZE) == [Block("parts.0", "act"), Block("parts.7", "act")]


class Again(nn.Module):
    """Its one module runs twice, the second time on a map of 32 pixels."""

    def __init__(self, form):
        super().__init__()
        self.part = Odd.Twice(form)

    def forward(self, x):
        return self.part(self.part(x + 0.0)[..., ::2, ::2])

    def traced(self, output, num_boxes=None):
        return [output]


def test_the_same_module_must_do_so_every_time():
    assert find_blocks(Again("sum"), SIZE) == [Block("part", "act")]
    assert find_blocks(Again("at first"), SIZE) == []
    shared = Odd(["sum", "sum"])
    shared.parts[1] = shared.parts[0]  # to take it out of one place would leave it in the other
    assert find_blocks(shared, SIZE) == []


# (all that are residual, the first of them); counted by hand in timm's definitions
FOUND = {
    "resnet18": (5, Block("backbone.body.layer1.0", "act2")),
    "mobilenetv3_small_100": (6, Block("backbone.body.blocks.1.1")),
    "convnext_atto": (12, Block("backbone.body.stages_0.blocks.0")),
    "regnety_002": (9, Block("backbone.body.s3.b2", "act3")),
    "cspresnet50": (13, Block("backbone.body.stages_0.blocks.0", "act3")),
    "densenet121": (0, None),
}


def loud(detector):
    """With branches that say something: timm starts many at zero."""
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return detector


@pytest.mark.parametrize("backbone", FOUND)
def test_a_block_without_its_branch_gives_its_input(build_tiny, backbone):
    detector = loud(build_tiny(backbone=backbone)).eval()
    number, first = FOUND[backbone]
    blocks = find_blocks(detector, SIZE)
    assert len(blocks) == number
    if not number:
        return
    assert blocks[0] == first
    for block in blocks:
        module, seen = detector.get_submodule(block.name), []
        hook = module.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        with torch.no_grad():
            detector(torch.rand(1, 3, *SIZE))
        hook.remove()
        x = seen[0]
        silent = copy.deepcopy(module)
        stays = silent.get_submodule(block.stays) if block.stays else nn.Identity()
        after = {id(p) for p in stays.parameters()}
        with torch.no_grad():
            for parameter in silent.parameters():
                if id(parameter) not in after:
                    parameter.zero_()
            for norm in silent.modules():
                if hasattr(norm, "running_mean"):
                    norm.running_mean.zero_()
            assert torch.equal(silent(x.clone()), stays(x.clone())), block
            assert not torch.equal(module(x.clone()), stays(x.clone())), block


def test_torchvisions_residual_branches_are_found():
    detector = students.build("fcos", class_names=["a"], backbone="resnet18", channels=32, head_depth=1)
    blocks = find_blocks(detector, (256, 256))
    assert [b.name.partition("body.")[2] for b in blocks] == [
        "layer1.0",
        "layer1.1",
        "layer2.1",
        "layer3.1",
        "layer4.1",
    ]
    assert {b.stays for b in blocks} == {"relu"}


@pytest.fixture
def batch(images, targets):
    return Batch(images, targets, [], [])


def test_the_block_that_is_missed_least_goes_first(build_tiny, batch):
    unit = Distiller(loud(build_tiny(backbone="resnet18")))
    # a branch that says nothing, and one that shouts
    with torch.no_grad():
        unit.student.backbone.body.layer2[1].bn2.weight.zero_()
        unit.student.backbone.body.layer2[1].bn2.bias.zero_()
        unit.student.backbone.body.layer4[1].bn2.bias.fill_(100.0)
    before = [p.clone() for p in unit.parameters()]
    for importance in ("loss", "taylor"):
        pruner = BlockPruner(SIZE, count=1, epochs=[2], importance=importance)
        pruner.check(unit)
        assert not pruner.plan(unit, 1, {}, [batch])
        plan = pruner.plan(unit, 2, {}, [batch])
        if importance == "loss":
            wanted = min(_losses(unit, batch), key=_losses(unit, batch).get)
            assert plan.blocks == ((f"student.{wanted}", "act2"),)
            assert wanted != "backbone.body.layer4.1"
        else:
            assert plan.blocks == (("student.backbone.body.layer2.1", "act2"),)
        (entry,) = pruner.explain(unit, plan)
        assert f"student.{entry['name']}" == plan.blocks[0][0]
        if importance == "loss":
            with torch.no_grad():
                student = copy.deepcopy(unit.student).eval()
                uncut = sum(student.loss(student(batch.images), batch.targets).values())
            rise = _losses(unit, batch)[entry["name"]] - float(uncut)
            assert entry["importance"] == pytest.approx(rise, abs=1e-4)
        trial = copy.deepcopy(unit)
        apply_plan([(trial, plan)])
        assert entry["macs_saved"] == count_macs(unit.student, SIZE) - count_macs(trial.student, SIZE) > 0
    assert all(map(torch.equal, unit.parameters(), before))


def _losses(unit, batch):
    """By replacing each by hand."""
    losses = {}
    for stage, place in (("layer1", 0), ("layer1", 1), ("layer2", 1), ("layer3", 1), ("layer4", 1)):
        student = copy.deepcopy(unit.student).eval()
        body = student.backbone.body
        body[stage][place] = nn.ReLU()
        with torch.no_grad():
            losses[f"backbone.body.{stage}.{place}"] = float(
                sum(student.loss(student(batch.images), batch.targets).values())
            )
    return losses


def test_blocks_go_in_equal_numbers_and_never_twice(build_tiny, batch):
    unit = Distiller(build_tiny(backbone="resnet18"))
    pruner = BlockPruner(SIZE, count=3, epochs=[4, 2], keep=["*.layer4.*"])
    pruner.check(unit)
    assert [name for name, may_go in pruner.may_go.items() if not may_go] == ["backbone.body.layer4.1"]
    assert sum(pruner.may_go.values()) == 4
    optimizer = torch.optim.AdamW(unit.parameters())
    for epoch, gone in ((2, 2), (4, 3)):  # half of three is 1.5, which rounds to 2
        cut_everywhere(pruner.plan(unit, epoch, {}, [batch]), unit, None, optimizer)
        names = [name for plan in unit.student.plans for name, _ in plan.blocks]
        assert len(names) == len(set(names)) == gone
    assert not any("layer4" in name for name in names)
    assert not pruner.plan(unit, 4, {}, [batch])


def test_half_of_what_is_due_is_whole_blocks_and_the_rest_stays_due(build_tiny, batch):
    unit = Distiller(build_tiny(backbone="resnet18"))
    pruner = BlockPruner(SIZE, count=3, epochs=[2], importance="taylor")
    assert not pruner.plan(unit, 2, {}, [batch], step=0.25)  # three quarters of a block
    half = pruner.plan(unit, 2, {}, [batch], step=0.5)
    assert len(half.blocks) == 1
    cut_everywhere(half, unit, None, torch.optim.AdamW(unit.parameters()))
    assert len(pruner.plan(unit, 4, {}, [batch]).blocks) == 2


def test_everything_follows_a_block_that_goes(make_trained, images, tmp_path):
    unit, ema, optimizer, step = make_trained(channels=32)
    uncut = count_macs(unit.student, SIZE), count_parameters(unit.student)
    names = ["backbone.body.layer1.0"]  # the only one of this tiny network
    gone = {p for name in names for p in unit.student.get_submodule(name).parameters()}
    lost = sum(p.numel() for p in gone)
    plan = Plan((), blocks=tuple((f"student.{name}", "act2") for name in names))
    # stream channels of layer1 are named after what is left
    foretold = {budget: Cost(unit, budget, SIZE).after(plan) for budget in ("macs", "params")}
    moments = {p: optimizer.state[p]["exp_avg"].clone() for p in unit.parameters() if p not in gone}
    pruner = Pruner(SIZE, target=0.6, epochs=[1], ranking="global")
    pruner.check(unit)
    cut_everywhere(plan, unit, ema, optimizer)

    assert count_parameters(unit.student) == uncut[1] - lost == foretold["params"]
    assert count_macs(unit.student, SIZE) == foretold["macs"] < uncut[0]
    owned = {p for group in optimizer.param_groups for p in group["params"]}
    assert owned == set(unit.parameters()) == set(optimizer.state) == set(moments)
    assert all(torch.equal(optimizer.state[p]["exp_avg"], moment) for p, moment in moments.items())
    step()  # student, averaged copy and optimizer go on together

    # what blocks freed counts towards the budget of the channels; then all is rebuilt from JSON
    channels = pruner.plan(unit, 1)
    cut_everywhere(channels, unit, ema, optimizer)
    assert 0.5 < count_macs(unit.student, SIZE) / uncut[0] <= 0.6
    step()
    students.save(ema.module, tmp_path / "student")
    again = students.load(tmp_path / "student")
    assert again.plans == [plan.below("student."), channels.below("student.")]
    with torch.no_grad():
        for one, other in zip(again(images), ema.module.eval()(images)):
            assert all(map(torch.equal, one, other))


def test_blocks_and_channels_in_one_plan(make_trained, images):
    unit, ema, optimizer, step = make_trained(channels=32)
    pruner = Pruner(SIZE, target=0.6, epochs=[1], ranking="global")
    pruner.check(unit)
    blocks = Plan((), blocks=(("student.backbone.body.layer1.0", "act2"),))
    trial = copy.deepcopy(unit)
    apply_plan([(trial, blocks)])
    channels = pruner.plan(trial, 1)
    both = Plan(channels.cuts, channels.numbers, blocks.blocks)
    assert Cost(unit, "macs", SIZE).after(both) == Cost(trial, "macs", SIZE).after(channels)
    assert Plan.from_json(both.to_json()) == both
    cut_everywhere(both, unit, ema, optimizer)
    apply_plan([(trial, channels)])
    for one, other in zip(unit.student.eval()(images), trial.student.eval()(images)):
        assert all(map(torch.equal, one, other))
    step()


def test_what_is_not_there_leaves_everything(make_trained):
    unit, ema, optimizer, _ = make_trained()
    parameters, held = list(unit.parameters()), [list(group["params"]) for group in optimizer.param_groups]
    blocks = (("student.backbone.body.layer1.0", "act2"), ("student.backbone.body.layer1.9", "act2"))
    with pytest.raises(ValueError, match=r"removes 'student.backbone.body.layer1.9', which this network does not have"):
        cut_everywhere(Plan((), blocks=blocks), unit, ema, optimizer)
    assert list(unit.parameters()) == parameters
    for group, before in zip(optimizer.param_groups, held):
        assert all(one is other for one, other in zip(group["params"], before, strict=True))


def test_what_cannot_be_met_is_told(build_tiny):
    unit = Distiller(build_tiny(backbone="resnet18"))
    with pytest.raises(UserError, match=r"^pruning.blocks.count: 6 are to go, but resnet18 has 5 residual branches"):
        BlockPruner(SIZE, count=6, epochs=[1]).check(unit)
    with pytest.raises(UserError, match=r"^pruning.blocks.keep: 'layer1.\*' matches none of the 5 blocks, such as "):
        BlockPruner(SIZE, count=1, epochs=[1], keep=["layer1.*"]).check(unit)
    with pytest.raises(UserError, match=r"has 0 residual branches that can \(none gives its input plus something\)"):
        BlockPruner(SIZE, count=1, epochs=[1]).check(Distiller(build_tiny(backbone="repvgg_a0")))
