import copy

import pytest
import torch

from distill.distiller import Distiller, Lesson
from distill.ema import EMA
from distill.errors import UserError
from distill.pruning.budget import make_plan
from distill.pruning.graph import find_groups
from distill.pruning.pruner import Pruner, cut_everywhere
from distill.terms import TERMS
from distill.terms.adapter import ChannelSelection, TokenLinear, build_adapter
from losses import plain_mimic
from students import Plan
from students.plan import named_tensors

SIZE = (64, 64)
ADAPTERS = ["conv1", "conv3", "linear", "identity", "select"]
FEATURE_TERMS = ["plain_mimic", "pkd", "score_weighted_mimic", "masked_mimic", "cwd", "mgd", "fgd", "fgd_attention"]


@pytest.fixture
def pair(build_tiny):
    """A student and a teacher of equal widths."""
    return build_tiny(channels=24), build_tiny(seed=1, channels=24).eval().requires_grad_(False)


@pytest.fixture
def cut_once(pair, images, targets):
    """A unit with one term after a step and a cut, and all that was before the cut."""

    def cut_once(name, adapter):
        student, teacher = pair
        unit, ema = Distiller(student, {"it": TERMS[name](student, teacher, adapter=adapter)}), EMA(student, 0.9)
        optimizer = torch.optim.AdamW(unit.parameters())
        unit(images, targets, {"teacher": Lesson(teacher(images), targets)})[0].backward()
        optimizer.step()
        tensors = {name: tensor.detach().clone() for name, tensor in named_tensors(unit).items()}
        moments = {name: copy.deepcopy(optimizer.state[p]) for name, p in unit.named_parameters()}
        plan = plan_for(unit)
        cut_everywhere(plan, unit, ema, optimizer)
        return unit, optimizer, plan, tensors, moments

    return cut_once


def plan_for(unit):
    """Two channels go of every group there is, which ones is drawn."""
    groups, generator = find_groups(unit, SIZE), torch.Generator().manual_seed(3)
    scores = [torch.rand(group.width, generator=generator) for group in groups]
    return make_plan(groups, scores, [group.width - 2 for group in groups], named_tensors(unit))


def kept_of(plan, name, dim):
    """The indices that a plan keeps of one dimension of one tensor."""
    [keep] = [cut.keep for cut in plan.cuts if (name, dim) in cut.slices]
    return list(keep)


def test_maps_come_out_in_the_teachers_width():
    for kind in ("conv1", "conv3", "linear"):
        assert build_adapter(kind, 3, 5, "P3")(torch.randn(2, 3, 4, 7)).shape == (2, 5, 4, 7)
    assert [build_adapter(kind, 3, 5, "P3").kernel_size for kind in ("conv1", "conv3")] == [(1, 1), (3, 3)]
    features = torch.randn(2, 3, 4, 7)
    assert all(torch.equal(build_adapter(kind, 3, 3, "P3")(features), features) for kind in ("identity", "select"))


def test_tokens_are_the_locations_of_a_map():
    linear, features = TokenLinear(3, 5), torch.randn(2, 3, 4, 7)
    tokens = features.flatten(2).transpose(1, 2)  # (2, 28, 3)
    assert linear(tokens).shape == (2, 28, 5)
    torch.testing.assert_close(linear(features).flatten(2).transpose(1, 2), linear(tokens))
    convolution = torch.nn.functional.conv2d(features, linear.weight[..., None, None], linear.bias)
    torch.testing.assert_close(linear(features), convolution)


def test_the_teachers_channels_are_those_that_are_kept():
    selection, teacher = ChannelSelection(4), torch.arange(8.0).view(1, 4, 1, 2)
    assert torch.equal(selection.select(teacher), teacher)
    selection.kept = selection.kept[[0, 3]]
    assert selection.select(teacher).tolist() == [[[[0, 1]], [[6, 7]]]]


@pytest.mark.parametrize(("kind", "when"), [("identity", "equal widths"), ("select", "to start with equal widths")])
def test_unlike_widths_are_refused(build_tiny, kind, when):
    message = f"^adapter: {kind} needs {when}, but at P4 the student has 16 channels and the teacher 24; give student."
    with pytest.raises(ValueError, match=message):
        TERMS["pkd"](build_tiny(), build_tiny(channels=24), levels=["P4"], adapter=kind)


def test_other_kinds_are_refused(pair):
    with pytest.raises(ValueError, match=r"^adapter: 'conv5' is not known; choose conv1, conv3, linear, identity or"):
        TERMS["pkd"](*pair, adapter="conv5")


@pytest.mark.parametrize("name", FEATURE_TERMS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_feature_term_learns_behind_every_adapter(pair, images, targets, name, adapter):
    student, teacher = pair
    term = TERMS[name](student, teacher, adapter=adapter)
    output = student(images)
    loss = term(output, teacher(images), targets, SIZE)
    gradients = torch.autograd.grad(loss, output.features, retain_graph=True)
    assert loss.isfinite() and sum(g.abs().sum() for g in gradients) > 0
    loss.backward()
    assert [name for name, p in term.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("name", "adapter"), [*(("pkd", adapter) for adapter in ADAPTERS), ("mgd", "select"), ("fgd", "select")]
)
def test_adapters_follow_a_cut_with_their_adam_state(cut_once, pair, images, targets, name, adapter):
    unit, optimizer, plan, tensors, moments = cut_once(name, adapter)
    sliced = {entry: cut.keep for cut in plan.cuts for entry in cut.slices}
    own = {entry for entry in sliced if entry[0].startswith("terms.")}
    levels = ("P3", "P4", "P5")
    if adapter == "identity":
        assert own == set() and unit.student.feature_channels == (24, 24, 24) and plan
    elif adapter == "select":
        assert own >= {(f"terms.it.adapters.{level}.kept", 0) for level in levels}
        assert (len(own) > 3) == (name != "pkd")  # what the loss has learnt of these channels goes with them
    else:
        assert own == {(f"terms.it.adapters.{level}.weight", 1) for level in levels}
    if adapter != "identity":
        assert unit.student.feature_channels == (22, 22, 22)
        assert len({sliced[entry] for entry in own}) == 1  # one head reads all levels

    def after(tensor, name):
        for dim in range(tensor.dim()):
            if (name, dim) in sliced:
                tensor = tensor.index_select(dim, torch.tensor(sliced[name, dim]))
        return tensor

    for name, tensor in named_tensors(unit).items():
        assert torch.equal(tensor, after(tensors[name], name)), name
    for name, parameter in unit.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[parameter][key], after(moments[name][key], name)), (name, key)
        assert optimizer.state[parameter]["step"] == 1

    optimizer.zero_grad()
    unit(images, targets, {"teacher": Lesson(pair[1](images), targets)})[0].backward()
    optimizer.step()
    assert [name for name, p in unit.named_parameters() if p.grad is None or p.grad.shape != p.shape] == []


def test_what_a_loss_learns_of_selected_channels_goes_with_them(pair):
    student, teacher = pair
    terms = {name: TERMS[name](student, teacher, levels=["P4"], adapter="select") for name in ("mgd", "fgd")}
    groups = find_groups(Distiller(student, terms), SIZE)
    members = {(m.name, m.dim) for group in groups for m in group.members if m.name.startswith("terms.")}
    mgd, fgd = "terms.mgd.levels.P4.generation", "terms.fgd.levels.P4.relation"
    contexts = [f"{fgd}.{role}_context" for role in ("student", "teacher")]
    assert members == {
        ("terms.mgd.adapters.P4.kept", 0),
        (f"{mgd}.0.weight", 1),
        (f"{mgd}.2.weight", 0),
        (f"{mgd}.2.bias", 0),
        ("terms.fgd.adapters.P4.kept", 0),
        *((f"{context}.attention.weight", 1) for context in contexts),
        *((f"{context}.transform.0.weight", 1) for context in contexts),
        *((f"{context}.transform.3.weight", 0) for context in contexts),
        *((f"{context}.transform.3.bias", 0) for context in contexts),
    }
    [of_pyramid] = [g for g in groups if any(m.name == "terms.mgd.adapters.P4.kept" for m in g.members)]
    assert ("student.neck.outputs.1.0.weight", 0) in {(m.name, m.dim) for m in of_pyramid.members}


def test_the_selection_follows_every_cut_and_comes_back_with_the_plans(cut_once, pair, build_tiny, images):
    unit, optimizer, first, _, _ = cut_once("plain_mimic", "select")
    second = plan_for(unit)
    cut_everywhere(second, unit, None, optimizer)
    outer, inner = (kept_of(plan, "student.neck.outputs.0.0.weight", 0) for plan in (first, second))
    kept = [outer[n] for n in inner]
    term, (_, teacher) = unit.terms["it"], pair
    assert [adapter.kept.tolist() for adapter in term.adapters.values()] == [kept] * 3 and len(kept) == 20
    unit.eval()
    with torch.no_grad():
        ours, theirs = unit.student(images), teacher(images)
    wanted = sum(plain_mimic(x, y[:, kept]) for x, y in zip(ours.features, theirs.features))
    torch.testing.assert_close(term(ours, theirs, [], SIZE), wanted)

    fresh = build_tiny(channels=24)
    resumed = Distiller(fresh, {"it": TERMS["plain_mimic"](fresh, teacher, adapter="select")})
    for plan in (first, second):
        cut_everywhere(Plan.from_json(plan.to_json()), resumed, None, torch.optim.AdamW(resumed.parameters()))
    resumed.load_state_dict(unit.state_dict())
    resumed.eval()
    assert torch.equal(resumed.terms["it"](resumed.student(images), theirs, [], SIZE), term(ours, theirs, [], SIZE))


def test_an_identity_that_stands_in_the_way_is_named(pair):
    student, teacher = pair

    unit = Distiller(student, {"it": TERMS["pkd"](student, teacher, adapter="identity")})
    with pytest.raises(UserError, match=r"0.1 cannot be reached.* another adapter than identity, which holds"):
        Pruner(SIZE, target=0.1, epochs=[0]).check(unit)
