import copy

import pytest
import torch
from accelerate import Accelerator

import students
from distill.distiller import Distiller
from distill.errors import UserError
from distill.measure import count_macs
from distill.pruning.graph import find_groups
from distill.pruning.limits import layers_of
from distill.pruning.pruner import Pruner, agree, cut_everywhere
from distill.pruning.ranking import Curve
from students.plan import Cut, Plan, named_tensors

SIZE = (64, 64)


def pruner_for(unit, **changes):
    settings = {"target": 0.6, "epochs": [1, 2, 3], "ranking": "global"}  # tiny widths are too few steps of 8
    pruner = Pruner(SIZE, **settings | changes)
    pruner.check(unit)
    return pruner


def outputs(detector, images):
    with torch.no_grad():
        return [level for levels in detector.eval()(images) for level in levels]


def test_the_schedule_is_followed_within_the_rounding(build_unit):
    unit = build_unit(channels=32)
    uncut = count_macs(unit.student, SIZE)
    pruner = pruner_for(unit, epochs=[3, 1])
    assert pruner.uncut == uncut
    optimizer = torch.optim.AdamW(unit.parameters())
    for epoch, wanted in ((1, 0.6 + 0.4 / 8), (3, 0.6)):
        plan = pruner.plan(unit, epoch)
        cut_everywhere(plan, unit, None, optimizer)
        left = count_macs(unit.student, SIZE) / uncut
        assert wanted - 0.12 < left <= wanted
        assert (pruner.left(unit), pruner.due(epoch)) == (left, pytest.approx(wanted))
    assert len(unit.student.plans) == 2
    assert not pruner.plan(unit, 3)


@pytest.mark.parametrize("importance", ["group_l1", "group_l2", "fpgm", "lamp"])
def test_adapters_do_not_say_what_channels_are_worth(build_unit, importance):
    def kept(unit):
        plan = pruner_for(unit, importance=importance).plan(unit, 3).below("student.")
        return {entry: cut.keep for cut in plan.cuts for entry in cut.slices}

    unit = build_unit(channels=32)
    assert kept(unit) == kept(Distiller(unit.student))


def test_all_that_follows_the_student_is_sliced_alike(make_trained, images):
    unit, ema, optimizer, _ = make_trained()
    ema.module.load_state_dict(unit.student.state_dict())
    before = {name: tensor.detach().clone() for name, tensor in named_tensors(unit).items()}
    moments = {name: copy.deepcopy(optimizer.state[p]) for name, p in unit.named_parameters()}
    identities = {id(p) for p in unit.parameters()}
    plan = pruner_for(unit, target=0.4).plan(unit, 3)
    cut_everywhere(plan, unit, ema, optimizer)

    by_tensor = {}
    for cut in plan.cuts:
        for name, dim in cut.slices:
            by_tensor.setdefault(name, []).append((dim, torch.tensor(cut.keep)))
    assert any(name.startswith("terms.feature_mimic.adapters") for name in by_tensor)

    def sliced(tensor, name):
        for dim, keep in by_tensor.get(name, ()):
            tensor = tensor.index_select(dim, keep)
        return tensor

    for name, tensor in named_tensors(unit).items():
        assert torch.equal(tensor, sliced(before[name], name)), name
    for name, parameter in unit.named_parameters():
        state = optimizer.state[parameter]
        assert state["step"] == moments[name]["step"] == 2
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[key], sliced(moments[name][key], name)), (name, key)

    # the optimizer owns exactly the live parameters, and they are the ones it owned before
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(owned) == len(identities) and {id(p) for p in owned} == {id(p) for p in unit.parameters()} == identities

    assert all(map(torch.equal, outputs(ema.module, images), outputs(unit.student, images)))
    assert unit.student.plans == ema.module.plans == [plan.below("student.")]
    assert ema.updates == 2


def test_training_goes_on_and_reaches_the_parameters(make_trained):
    unit, ema, optimizer, step = make_trained()
    cut_everywhere(pruner_for(unit).plan(unit, 3), unit, ema, optimizer)
    before = [p.detach().clone() for p in unit.parameters()]
    averaged = [p.clone() for p in ema.module.parameters()]
    step()
    still = {name for (name, p), old in zip(unit.named_parameters(), before) if torch.equal(p, old)}
    still |= {name for (name, p), old in zip(ema.module.named_parameters(), averaged) if torch.equal(p, old)}
    # but for the box norms of levels that no object was given to
    assert {name for name in still if ".box_tower.0.norms." not in f".{name}"} == set()
    assert len(still) < 10


def test_frozen_parameters_stay_frozen(make_trained):
    def freeze(unit):
        unit.student.backbone.requires_grad_(False)

    unit, ema, optimizer, step = make_trained(before_training=freeze)
    cut_everywhere(pruner_for(unit).plan(unit, 3), unit, ema, optimizer)
    assert {name for name, p in unit.named_parameters() if not p.requires_grad} == {
        f"student.backbone.{name}" for name, _ in unit.student.backbone.named_parameters()
    }
    before = [p.clone() for p in unit.student.backbone.parameters()]
    step()
    assert all(map(torch.equal, unit.student.backbone.parameters(), before))


def test_a_cut_that_does_not_fit_leaves_everything(make_trained, images):
    unit, ema, optimizer, _ = make_trained()
    plan = pruner_for(unit).plan(unit, 3)
    wrong = Plan((*plan.cuts, Cut(5, (0,), (("student.head.class_logits.bias", 0),))))
    before = outputs(unit.student, images), outputs(ema.module, images)
    moments = [optimizer.state[p]["exp_avg"].clone() for p in unit.parameters()]
    with pytest.raises(ValueError, match=r"class_logits.bias' of width 5; here it is 2"):
        cut_everywhere(wrong, unit, ema, optimizer)
    for detector, wanted in zip((unit.student, ema.module), before):
        assert all(map(torch.equal, outputs(detector, images), wanted))
        assert detector.plans == []
    assert all(torch.equal(optimizer.state[p]["exp_avg"], m) for p, m in zip(unit.parameters(), moments))


def test_a_target_out_of_reach_is_told(build_unit):
    unit = build_unit()
    message = r"^pruning.target: 0.01 cannot be reached; cut as far as may be this student still has 0\.\d+ of its "
    with pytest.raises(UserError, match=message + r"MACs; raise the target, or lower pruning.round_to \(8\)$"):
        pruner_for(unit, target=0.01)
    with pytest.raises(UserError, match=message + r"parameters; .* \(8\) or pruning.floor or pruning.keep$"):
        pruner_for(unit, target=0.01, budget="params", floor=0.5, keep=["neck.*"])


def test_what_stays_whole_is_told_where_a_target_is_out_of_reach(build_unit):
    unit = build_unit(backbone="eca_resnext26ts")
    with pytest.raises(
        UserError,
        match=r"of its MACs \(\d+ layers stay whole, first student.backbone.body.stages_0.0.conv2_kxk.conv: a conv",
    ):
        pruner_for(unit, target=0.001).check(unit)


def test_one_process_agrees_with_itself():
    plan = Plan((Cut(2, (0,), (("a", 0),)),))
    assert agree(Accelerator(), plan) is plan


@pytest.mark.parametrize("budget", ["macs", "params", "memory"])
@pytest.mark.parametrize("ranking", ["uniform", "isomorphic", "global"])
def test_every_budget_is_met_closely(build_unit, budget, ranking):
    unit = build_unit(channels=64)
    pruner = pruner_for(unit, budget=budget, ranking=ranking, target=0.7, epochs=[0])
    cut_everywhere(pruner.plan(unit, 0), unit, None, torch.optim.SGD(unit.parameters(), 0.1))
    assert 0.98 * 0.7 <= pruner.left(unit) <= 0.7


def test_kept_layers_stay_whole_and_limited_ones_within_their_limits(build_unit):
    unit = build_unit(channels=64)
    limits = {"neck.outputs.*": (0.75, 1.0), "head.class_tower.0.conv": (0.0, 0.5)}
    pruner = pruner_for(unit, keep=["head.box_tower.*"], limits=limits, epochs=[0], ranking="uniform")
    cut_everywhere(pruner.plan(unit, 0), unit, None, torch.optim.SGD(unit.parameters(), 0.1))
    student = unit.student
    assert student.head.box_tower[0].conv.out_channels == 64
    assert 48 <= student.feature_channels[0] < 64
    assert student.head.class_tower[0].conv.out_channels <= 32
    assert pruner.left(unit) <= 0.6


@pytest.mark.parametrize(
    "recipe",
    [
        {"name": "fcos", "backbone": "resnet18", "class_names": ["a", "b"]},
        {"name": "dense", "backbone": "test_resnet", "head": "retinanet", "class_names": ["a", "b"], "channels": 16},
    ],
)
def test_every_layer_is_in_a_group_or_says_why_not(recipe):
    unit = Distiller(students.build(**recipe))
    pruner = pruner_for(unit, floor=0.1, target=0.9)
    told = {layer for layers, _ in pruner.uncut_groups for layer in layers} | set(pruner.whole)
    layers = {n for n, m in unit.student.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)}
    assert not layers - told
    predicting = {pruner.whole[n] for n, m in unit.student.named_modules() if m in unit.student.output_layers}
    assert predicting == {"what it gives means something by its place"}


def test_what_does_no_harm_goes_first(build_unit):
    unit = build_unit(channels=64)
    groups = find_groups(unit, SIZE)
    shares = (0.25, 0.5, 0.75)
    curves = {layers_of(group)[0]: Curve(group.width, shares, (10.0, 20.0, 30.0)) for group in groups}
    curves["head.box_tower.0.conv"] = Curve(64, shares, (0.0, 0.1, 50.0))
    pruner = pruner_for(unit, ranking="sensitivity", curves=curves, target=0.97, epochs=[0])
    plan = pruner.plan(unit, 0)
    (cut,) = [cut for cut in plan.cuts if ("student.head.box_tower.0.conv.weight", 0) in cut.slices]
    assert 32 <= len(cut.keep) < 64
    others = {name for cut in plan.cuts for name, dim in cut.slices if dim == 0} - {name for name, _ in cut.slices}
    assert not others

    curves["head.box_tower.0.conv"] = Curve(32, shares, (0.0, 0.1, 50.0))
    with pytest.raises(
        UserError,
        match=r"^pruning.sensitivity: .* whose head.box_tower.0.conv has 32 channels where this one has 64;",
    ):
        pruner_for(unit, ranking="sensitivity", curves=curves)
    del curves["head.box_tower.0.conv"]
    with pytest.raises(
        UserError, match=r"^pruning.sensitivity: the file says nothing of head.box_tower.0.conv \(1 of "
    ):
        pruner_for(unit, ranking="sensitivity", curves=curves)


def test_patterns_and_importances_that_do_not_fit_are_told(build_unit, build_tiny):
    unit = build_unit()
    with pytest.raises(UserError, match=r"^pruning.keep: 'backbone.stages.0.\*' matches none of the \d+ layers"):
        pruner_for(unit, keep=["backbone.stages.0.*"])
    for norm in [m for m in unit.modules() if isinstance(m, torch.nn.BatchNorm2d)]:
        norm.running_mean, norm.running_var = None, None
    told = r"^pruning.importance: no batch norm follows (backbone|neck|head)\S+, so it has no scale .* in pruning.keep$"
    with pytest.raises(UserError, match=told):
        pruner_for(unit, importance="bn_scale")


def test_what_is_kept_needs_nothing_to_go_by(build_unit):
    unit = build_unit()
    for norm in [m for m in unit.student.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]:
        norm.running_mean, norm.running_var = None, None
    with pytest.raises(UserError, match=r"^pruning\.importance: no batch norm follows backbone"):
        pruner_for(unit, importance="bn_scale")
    plan = pruner_for(unit, importance="bn_scale", keep=["backbone.*"], target=0.97).plan(unit, 3)
    assert plan and not any("backbone" in name for cut in plan.cuts for name, dim in cut.slices if dim == 0)


@pytest.mark.parametrize("backbone", ["regnety_002", "ghostnet_100", "cspresnet50"])
def test_plans_of_grouped_and_split_channels_rebuild_the_same_bits(build_tiny, images, tmp_path, backbone):
    # whole groups of convolutions, channels that blocks split at a number of their own
    detector = build_tiny(backbone=backbone)
    unit = Distiller(detector)
    cut_everywhere(pruner_for(unit).plan(unit, 3), unit, None, torch.optim.SGD(unit.parameters(), lr=0.1))
    students.save(detector, tmp_path / "student")
    loaded = students.load(tmp_path / "student")
    assert loaded.plans == detector.plans and detector.plans[0].cuts
    assert all(map(torch.equal, outputs(loaded, images), outputs(detector.eval(), images)))
