import pytest
import torch
from torch import nn

from distill.compression.fake_quant import ActivationQuantizer, WeightQuantizer, calibrate


def test_activations_lie_on_a_grid_that_holds_zero():
    quantizer = ActivationQuantizer()
    quantizer.set_range(-1.0, 1.55)  # 255 steps of 0.01, the hundredth of them 0
    assert float(quantizer.scale) == pytest.approx(0.01) and int(quantizer.zero_point) == 100
    x = torch.tensor([-2.0, -1.0, -0.006, 0.0, 0.004, 0.126, 1.55, 9.0], requires_grad=True)
    y = quantizer(x)
    torch.testing.assert_close(y, torch.tensor([-1.0, -1.0, -0.01, 0.0, 0.0, 0.13, 1.55, 1.55]))
    y.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 1, 0]  # nothing passes where it was clipped


def test_a_range_is_widened_to_hold_zero():
    quantizer = ActivationQuantizer()
    quantizer.set_range(0.5, 2.55)
    assert float(quantizer.scale) == pytest.approx(0.01) and int(quantizer.zero_point) == 0
    quantizer.set_range(0.0, 0.0)
    assert torch.equal(quantizer(torch.zeros(3)), torch.zeros(3))


@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (7, 63)])
def test_weights_are_rounded_by_row(bits, largest):
    quantizer = WeightQuantizer(bits)
    weight = torch.tensor([[1.0, -0.25], [0.004, 0.001], [0.0, 0.0]])
    integers, scale = quantizer.to_integers(weight)
    quarter = {127: 32, 63: 16}[largest]  # 31.75 and 15.75
    assert integers.tolist() == [[largest, -quarter], [largest, quarter], [0, 0]] and integers.dtype == torch.int8
    torch.testing.assert_close(quantizer(weight), integers * scale[:, None])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.quantizer = ActivationQuantizer()

    def forward(self, x):
        return self.quantizer(x)


@pytest.mark.parametrize(
    ("method", "low", "high"),
    [
        ("minmax", -1.0, 100.0),
        ("percentile", 0.0, 1.0),  # the two outliers are fewer than one in ten thousand
    ],
)
def test_ranges_of_what_was_seen(method, low, high):
    values = torch.linspace(0, 1, 50_000)
    net = Net()
    calibrate(net, [values, torch.tensor([-1.0, 100.0])], method)
    scale = float(net.quantizer.scale)
    bin_width = 101 / 2048  # the ends are known to a bin
    assert scale * 255 == pytest.approx(high - low, abs=2.1 * bin_width)
    assert net.quantizer.recorder is None


def test_least_squared_error_clips_what_is_rare():
    values = torch.cat((torch.randn(100_000, generator=torch.Generator().manual_seed(0)).abs(), torch.tensor([40.0])))
    errors = {}
    for method in ("minmax", "mse"):
        net = Net()
        calibrate(net, [values], method)
        errors[method] = float((net(values) - values).square().mean())
    assert float(net.quantizer.scale) * 255 < 40
    assert errors["mse"] < errors["minmax"]


def test_nothing_to_calibrate_on():
    with pytest.raises(ValueError, match="there are no images"):
        calibrate(Net(), [])
    with pytest.raises(ValueError, match="calibration: found 'best'; there is minmax, percentile, mse"):
        calibrate(Net(), [torch.zeros(1)], "best")
