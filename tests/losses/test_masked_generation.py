import pytest
import torch
from torch import nn

from losses import MGD


def set_identity(mgd: MGD) -> None:
    """Both convolutions pass every channel on; only the ReLU between them is left."""
    for layer in (mgd.generation[0], mgd.generation[2]):
        nn.init.dirac_(layer.weight)
        nn.init.zeros_(layer.bias)


def test_known_maps():
    mgd = MGD(1, mask_ratio=0.0)
    set_identity(mgd)
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
    set_identity(mgd)
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


def test_zero_where_the_block_is_the_identity_and_nothing_is_hidden():
    mgd = MGD(3, mask_ratio=0.0)
    set_identity(mgd)
    features = torch.rand(2, 3, 4, 4)  # not negative: the ReLU lets them pass
    assert mgd(features, features.clone()).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_student_and_the_block_learn(dtype, autocast):
    mgd = MGD(3)
    student = torch.randn(2, 3, 8, 8, dtype=dtype, requires_grad=True)
    teacher = torch.randn(2, 3, 8, 8, dtype=dtype, requires_grad=True)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = mgd(student, teacher)
    assert loss.dtype == torch.float32 and loss.shape == () and loss.isfinite()
    torch.manual_seed(0)
    assert loss.item() == mgd(student.float(), teacher.float()).item()  # float32 also under autocast
    loss.backward()
    assert student.grad.abs().sum() > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in mgd.parameters())
    assert teacher.grad is None


def test_one_pixel_maps_are_finite():
    student = torch.randn(2, 3, 1, 1, requires_grad=True)
    loss = MGD(3)(student, torch.randn(2, 3, 1, 1))
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_memory_format_does_not_matter():
    mgd, student, teacher = MGD(3, 0.0), torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    other = mgd(student.to(memory_format=torch.channels_last), teacher.to(memory_format=torch.channels_last))
    torch.testing.assert_close(other, mgd(student, teacher))


def test_gradient_is_that_of_the_value():
    mgd = MGD(2, 0.0).double()
    student = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 2, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: mgd(x, teacher), student)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"MGD.*\(1, 2, 4, 4\) and \(1, 1, 4, 4\) differ"):
        MGD(2)(torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"must be \(B, C, H, W\), not empty"):
        MGD(2)(torch.zeros(0, 2, 4, 4), torch.zeros(0, 2, 4, 4))
    for ratio in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"mask_ratio is {ratio}"):
            MGD(2, ratio)
