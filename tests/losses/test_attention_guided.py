import math

import pytest
import torch
from learnt_layers import pass_on, shake
from torch import nn

from losses import AttentionGuided, NonLocal, NonLocalRelation, attention_guided


def test_attention_guided_of_known_maps():
    three = math.log(3)
    teacher = torch.tensor([[[[0.0, three]], [[0.0, -three]]]])
    student = torch.tensor([[[[0.0, 0.0]], [[0.0, 0.0]]]])
    adapted = torch.tensor([[[[3.0, three]], [[1.0, 1 - three]]]])
    # T = 1/2. The teacher's spatial attention is 2 softmax(0, ln 9) = (0.2, 1.8), the student's (1, 1): (0.6, 1.4).
    # Squares summed over channels: 9 + 1 and 0 + 1. sqrt(0.6 * 10 + 1.4) = sqrt(7.4).
    torch.testing.assert_close(attention_guided(student, adapted, teacher), torch.tensor(math.sqrt(7.4)))
    # Both channels have the mean ln 3 / 2: the channel mask is (1, 1).
    loss = attention_guided(student, adapted, teacher, channel_mask=True)
    torch.testing.assert_close(loss, torch.tensor(math.sqrt(7.4)))


def test_the_channel_mask_weights_channels():
    three = math.log(3)
    teacher = torch.tensor([[[[0.0, 0.0]], [[three, three]]]])
    student, adapted = torch.zeros(1, 2, 1, 2), torch.tensor([[[[2.0, 0.0]], [[three, three + 1]]]])
    # Locations alike. Channels: 2 softmax(0, ln 9) = (0.2, 1.8) against (1, 1): (0.6, 1.4). 0.6 * 4 + 1.4 * 1.
    torch.testing.assert_close(attention_guided(student, adapted, teacher), torch.tensor(math.sqrt(5)))
    loss = attention_guided(student, adapted, teacher, channel_mask=True)
    torch.testing.assert_close(loss, torch.tensor(math.sqrt(3.8)))


@pytest.mark.parametrize("channel_mask", [False, True])
def test_attention_guided_agrees_with_loops(channel_mask):
    student, adapted, teacher = torch.randn(3, 2, 3, 2, 4)

    def attention(image):
        values = image.abs().tolist()
        spatial = [math.exp(sum(values[c][y][x] for c in range(3)) / 3 / 0.7) for y in range(2) for x in range(4)]
        channel = [math.exp(sum(values[c][y][x] for y in range(2) for x in range(4)) / 8 / 0.7) for c in range(3)]
        return [8 * s / sum(spatial) for s in spatial], [3 * c / sum(channel) for c in channel]

    total = 0.0
    for b in range(2):
        (spatial_s, channel_s), (spatial_t, channel_t) = attention(student[b]), attention(teacher[b])
        for c in range(3):
            for j in range(8):
                weight = (spatial_s[j] + spatial_t[j]) / 2
                weight *= (channel_s[c] + channel_t[c]) / 2 if channel_mask else 1
                total += weight * (teacher[b, c].flatten()[j] - adapted[b, c].flatten()[j]).item() ** 2
    loss = attention_guided(student, adapted, teacher, 0.7, channel_mask)
    torch.testing.assert_close(loss, torch.tensor(math.sqrt(total)))


def test_the_mask_does_not_learn():
    student, adapted = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 5, 4, 4, requires_grad=True)
    attention_guided(student, adapted, torch.randn(2, 5, 4, 4)).backward()
    assert student.grad is None
    assert adapted.grad.abs().sum() > 0


def test_zero_with_zero_gradient_where_student_equals_teacher():
    student = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = attention_guided(student, student, student.detach().clone())
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_non_local_starts_as_the_identity():
    features = torch.randn(2, 4, 5, 3)
    assert torch.equal(NonLocal(4)(features), features)


def test_non_local_of_known_maps():
    block = NonLocal(1).eval()  # one hidden channel; statistics 0 and 1
    for layer in (block.theta, block.phi, block.g, block.output):
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
    nn.init.ones_(block.norm.weight)
    features = torch.tensor([[[[1.0, 2.0, 0.0, 3.0]]]])
    # theta = F; phi and g are the maxima of pairs, (2, 3): F_i (2 * 2 + 3 * 3) / 2 = 6.5 F_i, plus F_i.
    torch.testing.assert_close(block(features), 7.5 * features, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("stride", "hidden"), [(2, None), (8, 3), (1, 1)])
def test_non_local_agrees_with_all_pairs_of_locations(stride, hidden):
    block = NonLocal(4, hidden, stride)
    shake(block)
    features = torch.randn(2, 4, 5, 4)
    theta, phi, g = block.theta(features).flatten(2), block.phi(features), block.g(features)
    rows, columns = min(stride, 5), min(stride, 4)

    def pooled(x):
        """Blocks of rows x columns; what is left over at the ends is dropped. A list of (B, hidden)."""
        return [
            x[:, :, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].amax(dim=(2, 3))
            for i in range(5 // rows)
            for j in range(4 // columns)
        ]

    places = []
    for i in range(20):
        affinities = [(theta[:, :, i] * p).sum(dim=1, keepdim=True) for p in pooled(phi)]
        places.append(sum(a * value for a, value in zip(affinities, pooled(g))) / len(affinities))
    attended = torch.stack(places, dim=2).view(2, -1, 5, 4)
    expected = features + block.norm(block.output(attended))
    torch.testing.assert_close(block(features), expected, atol=1e-5, rtol=1e-5)


def test_relation_of_known_maps():
    module = NonLocalRelation(2, 1)
    nn.init.ones_(module.adapter.weight)  # both blocks are the identity at first; the adapter adds the channels
    nn.init.zeros_(module.adapter.bias)
    student = torch.tensor([[[[1.0, 0.0]], [[1.0, 4.0]]]])
    # 2 and 4 against 5 and 0: sqrt(9 + 16).
    torch.testing.assert_close(module(student, torch.tensor([[[[5.0, 0.0]]]])), torch.tensor(5.0))


def test_relation_is_the_distance_of_both_blocks():
    module = NonLocalRelation(3, 4, hidden_channels=2, stride=3)
    shake(module)
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 4, 4, 4)
    ours, theirs = module.student_block(student), module.teacher_block(teacher)
    weight, bias, squares = module.adapter.weight.flatten(1), module.adapter.bias, 0.0
    for b in range(2):
        for y in range(4):
            for x in range(4):
                squares += (theirs[b, :, y, x] - weight @ ours[b, :, y, x] - bias).square().sum().item()
    torch.testing.assert_close(module(student, teacher), torch.tensor(math.sqrt(squares)))


def test_the_whole_of_known_maps():
    module = AttentionGuided(1, 1, mask_weight=1.0, pooled_weight=10.0, relation_weight=100.0)
    pass_on(module)
    student, teacher = torch.tensor([[[[0.0, 0.0]]]]), torch.tensor([[[[3.0, -3.0]]]])
    # Even attention: sqrt(9 + 9). Channel means: 0 and 0. Location means: sqrt(18). Relations, still F: sqrt(18).
    torch.testing.assert_close(module(student, teacher), torch.tensor((1 + 10 + 100) * math.sqrt(18)))
    # A constant difference of 3 is one of 3 in the channel mean.
    loss = module(student, torch.full((1, 1, 1, 2), 3.0))
    torch.testing.assert_close(loss, torch.tensor((1 + 10 + 100) * math.sqrt(18) + 10 * 3))


def test_the_whole_is_the_weighted_sum_of_its_parts():
    module = AttentionGuided(3, 4, 2.0, 3.0, 5.0, temperature=0.6, hidden_channels=2, stride=4)
    shake(module)
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 4, 4, 4)
    masked = attention_guided(student, module.feature_adapter(student), teacher, 0.6)
    channels = torch.dist(teacher.mean((2, 3)), module.channel_adapter(student.mean((2, 3))))
    locations = torch.dist(teacher.mean(1, keepdim=True), module.spatial_adapter(student.mean(1, keepdim=True)))
    expected = 2 * masked + 3 * (channels + locations) + 5 * module.relation(student, teacher)
    torch.testing.assert_close(module(student, teacher), expected)


def test_adapters_and_both_blocks_learn():
    module = AttentionGuided(4, 5, 1.0, 1.0, 1.0).double()
    shake(module)
    module(torch.randn(2, 4, 4, 4).double(), torch.randn(2, 5, 4, 4).double()).backward()
    # A constant the output adds is taken away by the batch normalisation.
    still = {name for name, parameter in module.named_parameters() if parameter.grad.abs().max() < 1e-10}
    assert still == {"relation.student_block.output.bias", "relation.teacher_block.output.bias"}


def test_widths_are_checked():
    narrow, wide = torch.zeros(2, 2, 4, 4), torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"\(2, 2, 4, 4\) and \(2, 3, 4, 4\) differ"):
        attention_guided(narrow, narrow, wide)
    with pytest.raises(ValueError, match=r"channel mask: shapes \(2, 2, 4, 4\) and \(2, 3, 4, 4\) differ"):
        attention_guided(narrow, wide, wide, channel_mask=True)
    with pytest.raises(ValueError, match="the student has 2 and the teacher 3"):
        AttentionGuided(2, 3, channel_mask=True)
