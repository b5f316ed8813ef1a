import pytest
import torch
from learnt_layers import pass_on

from losses import MGD


def test_known_maps():
    mgd = MGD(1, mask_ratio=0.0)
    pass_on(mgd)
    # A second convolution that sums its three columns, and adds 1.
    mgd.generation[2].weight.data[0, 0, 1] = 1
    mgd.generation[2].bias.data[:] = 1
    student = torch.tensor([[[[2.0, -1.0]]], [[[0.0, 3.0]]]])
    teacher = torch.tensor([[[[1.0, 5.0]]], [[[4.0, 4.0]]]])
    # ReLU: (2, 0) and (0, 3); sums of neighbours plus 1: (3, 3) and (4, 4).
    # Squares: 4 + 4 and 0 + 0; over two images: 4.
    torch.testing.assert_close(mgd(student, teacher), torch.tensor(4.0))


@pytest.mark.parametrize("mask_ratio", [0.25, 0.65, 0.9])
def test_the_mask_hides_locations_in_all_channels(mask_ratio):
    mgd = MGD(2, mask_ratio)
    pass_on(mgd)
    student = torch.ones(3, 2, 20, 20)
    torch.manual_seed(0)
    loss = mgd(student, student)
    # What is hidden misses by 1 in both channels. The draw, repeated: hidden where it is above 1 - ratio.
    torch.manual_seed(0)
    hidden = (torch.rand(3, 1, 20, 20) > 1 - mask_ratio).sum().item()
    torch.testing.assert_close(loss, torch.tensor(2 * hidden / 3))
    assert abs(hidden / 1200 - mask_ratio) < 0.05


def test_every_call_draws_anew_and_a_seed_repeats_it():
    mgd = MGD(2)
    student, teacher = torch.randn(2, 2, 6, 6), torch.randn(2, 2, 6, 6)
    torch.manual_seed(3)
    first, second = mgd(student, teacher), mgd(student, teacher)
    torch.manual_seed(3)
    assert mgd(student, teacher).item() == first.item() != second.item()


def test_agrees_with_loops():
    channels, height, width = 2, 2, 3
    mgd = MGD(channels)
    student, teacher = torch.randn(2, channels, height, width), torch.randn(2, channels, height, width)

    def convolve(image, layer):
        output = torch.zeros(channels, height, width)
        for o in range(channels):
            for y in range(height):
                for x in range(width):
                    total = layer.bias[o].item()
                    for i in range(channels):
                        for dy in (-1, 0, 1):
                            for dx in (-1, 0, 1):
                                if 0 <= y + dy < height and 0 <= x + dx < width:
                                    total += (layer.weight[o, i, dy + 1, dx + 1] * image[i, y + dy, x + dx]).item()
                    output[o, y, x] = total
        return output

    torch.manual_seed(5)
    loss = mgd(student, teacher)
    torch.manual_seed(5)
    draw = torch.rand(2, 1, height, width)
    expected = 0.0
    for b in range(2):
        visible = torch.tensor([[float(draw[b, 0, y, x] <= 0.35) for x in range(width)] for y in range(height)])
        hidden_layer = convolve(student[b] * visible, mgd.generation[0]).clamp(min=0)
        expected += (convolve(hidden_layer, mgd.generation[2]) - teacher[b]).square().sum().item()
    torch.testing.assert_close(loss, torch.tensor(expected / 2))


def test_the_block_learns():
    mgd = MGD(3)
    mgd(torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in mgd.parameters())


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"MGD.*\(1, 2, 4, 4\) and \(1, 1, 4, 4\) differ"):
        MGD(2)(torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 4, 4))
    for ratio in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"mask_ratio is {ratio}"):
            MGD(2, ratio)
