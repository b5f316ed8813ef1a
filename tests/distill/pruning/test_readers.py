import pytest
import torch
from torch import nn

from distill.data import Batch
from distill.distiller import Distiller
from distill.pruning.graph import ChannelGroup, Member, find_groups
from distill.pruning.readers import (
    active_share,
    find_readers,
    map_rank,
    mean_magnitude,
    measure_gates,
    measure_responses,
)
from distill.pruning.saliency import trained_loss
from distill.terms import AttentionTransferTerm
from students import DenseOutput
from teachers import Teacher

SIZE = (64, 64)
GROUP = ChannelGroup(
    "student.a", 2, (Member("student.a.weight", 0, (0, 1), (0, 1)), Member("student.b.weight", 1, (0, 1), (0, 1)))
)


class TwoLayers(nn.Module):
    """x -> relu((2x, 3x)), the pyramid -> first less second channel."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(1, 2, 1, bias=False)
        self.b = nn.Conv2d(2, 1, 1, bias=False)
        with torch.no_grad():
            self.a.weight.copy_(torch.tensor([2.0, 3]).view(2, 1, 1, 1))
            self.b.weight.copy_(torch.tensor([1.0, -1]).view(1, 2, 1, 1))

    def forward(self, images):
        hidden = self.a(images).relu()
        return DenseOutput((hidden,), (self.b(hidden),), ())


@pytest.fixture
def unit():
    return Distiller(TwoLayers())


def batch_of(*values):
    return Batch(torch.tensor(values).view(-1, 1, 1, 1), [], [], [])


def test_gates_by_hand(unit):
    # hidden (2, 3) and (4, 6), outputs -1 and -2; L = the sum of squared outputs / 2, so dL/dz_c = output b_c hidden_c:
    # (-2, 3) for the first image, (-8, 12) for the second
    loss = lambda batch: unit.student(batch.images).class_logits[0].square().sum() / 2  # noqa: E731
    batch = batch_of(1.0, 2.0)
    assert measure_gates(unit, [GROUP], [batch], loss)["student.a"].tolist() == [100, 225]
    each = measure_gates(unit, [GROUP], [batch], loss, per_image=True)
    assert each["student.a"].tolist() == [(4 + 64) / 2, (9 + 144) / 2]
    # a mean over batches, each squared by itself
    halves = measure_gates(unit, [GROUP], [batch_of(1.0), batch_of(2.0)], loss)
    assert halves["student.a"].tolist() == each["student.a"].tolist()
    assert measure_gates(unit, [GROUP], [], loss)["student.a"].tolist() == [0, 0]
    assert not unit.student.b._forward_pre_hooks and not unit.student._forward_hooks


def test_a_loss_reads_the_pyramid_through_the_same_gate(unit):
    def loss(batch):
        output = unit.student(batch.images)
        return output.class_logits[0].sum() + output.features[0].sum()

    # b_c hidden_c of the head, and hidden_c of the loss: 2 + 2 and -3 + 3
    assert measure_gates(unit, [GROUP], [batch_of(1.0)], loss)["student.a"].tolist() == [16, 0]


def test_a_head_that_reads_the_pyramid_again_has_no_second_gate(unit):
    def loss(batch):
        output = unit.student(batch.images)
        return unit.student.b(output.features[0]).sum()

    # 2 and -3: gated once, as a channel that is gone is gone once
    assert measure_gates(unit, [GROUP], [batch_of(1.0)], loss)["student.a"].tolist() == [4, 9]


def test_a_gate_is_as_good_as_the_weights_that_read(build_tiny, images, targets):
    # the loss sees z w, so dL/dz = the sum of w dL/dw over all that reads a channel
    unit = Distiller(build_tiny(backbone="test_efficientnet", neck="pan"))
    groups, batch = find_groups(unit, SIZE), Batch(images, targets, [], [])
    found = measure_gates(unit, groups, [batch], lambda batch: trained_loss(unit, {}, batch))
    assert all(p.grad is None for p in unit.parameters())
    trained_loss(unit.eval(), None, batch).backward()
    weights = dict(unit.named_parameters())
    for group in groups:
        wanted = torch.zeros(group.width)
        for name, readers in find_readers(unit, [group]).items():
            weight = weights[f"{name}.weight"]
            entries = (weight.detach() * weight.grad).transpose(0, 1).flatten(1).sum(dim=1)
            for _, member in readers:
                wanted.index_add_(0, torch.tensor(member.channels), entries[torch.tensor(member.positions)])
        torch.testing.assert_close(found[group.name], wanted.square(), rtol=2e-3, atol=1e-9)


def test_the_teacher_counts_where_knowledge_does(build_tiny, images, targets):
    student, teacher = build_tiny(), build_tiny(seed=1, channels=24)
    unit = Distiller(student, {"attention": AttentionTransferTerm(student, teacher)})
    unit.to(memory_format=torch.channels_last)
    groups, batch = find_groups(unit, SIZE), Batch(images, targets, [], [])
    frozen = Teacher(teacher, torch.device("cpu"))

    def measure(knowledge, weight):
        unit.combiner.weights["attention"] = weight
        loss = lambda batch: trained_loss(unit, {"teacher": frozen}, batch, knowledge)  # noqa: E731
        return torch.cat([*measure_gates(unit, groups, [batch], loss).values()])

    assert not torch.allclose(measure(True, 1.0), measure(True, 0.0))
    assert torch.equal(measure(False, 1.0), measure(True, 0.0))


def test_responses_by_hand(unit):
    with torch.no_grad():
        unit.student.a.weight[1] = -3.0
    batches = [batch_of(1.0, 2.0), batch_of(3.0)]
    # batches of (2, 4) and (6): the means 3 and 6 count alike; the second channel never fires
    measure = lambda statistic: measure_responses(unit, [GROUP], batches, None, statistic)["student.a"]  # noqa: E731
    assert measure(mean_magnitude).tolist() == [4.5, 0]
    assert measure(active_share).tolist() == [1, 0]


def test_statistics_by_hand():
    maps = torch.tensor([[[[1.0, 0], [0, 1]], [[1, 1], [1, 1]], [[0, 0], [0, 0]], [[-4, 2], [2, 0]]]])
    assert mean_magnitude(maps).tolist() == [0.5, 1, 0, 2]
    assert active_share(maps).tolist() == [0.5, 1, 0, 0.5]
    assert map_rank(maps).tolist() == [1, 0.5, 0, 1]
    assert map_rank(torch.cat([maps, maps.flip(1)])).tolist() == [1, 0.5, 0, 1]  # the first image's
    assert mean_magnitude(torch.tensor([[1.0, -2], [3, 0]])).tolist() == [2, 1]


def test_what_nothing_reads_cannot_be_measured(unit):
    group = ChannelGroup("student.a", 2, GROUP.members[:1])
    with pytest.raises(ValueError, match="no plain convolution or linear layer reads student"):
        find_readers(unit, [group])
