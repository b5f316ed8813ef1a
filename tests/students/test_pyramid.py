import pytest
import torch
from torch import nn

from students.pyramid import FPN, PAN


def make_plain(neck):
    """Each convolution hands on its centre, each batch norm its input; what is left is the wiring."""
    for module in neck.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
            middle = module.kernel_size[0] // 2
            module.weight.data[:, :, middle, middle] = 1
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
    return neck.eval()


def constant(value, size):
    return torch.full((1, 1, size, size), float(value))


@torch.no_grad()
def test_fpn_adds_upsampled_coarser_maps():
    coarse = torch.tensor([[[[1.0, 2], [3, 4]]]])
    fine, middle, last = make_plain(FPN((1, 1), 1, num_extra=1))([constant(10, 4), coarse])
    assert fine[0, 0].tolist() == [[11, 11, 12, 12], [11, 11, 12, 12], [13, 13, 14, 14], [13, 13, 14, 14]]
    assert torch.equal(middle, coarse)
    assert last.tolist() == [[[[1.0]]]]  # every second cell, from the first


@torch.no_grad()
def test_pan_adds_downsampled_finer_maps():
    levels = make_plain(PAN((1, 1, 1), 1, num_extra=1))([constant(100, 8), constant(10, 4), constant(1, 2)])
    # top-down: 111, 11, 1; bottom-up: 111, 111 + 11, 122 + 1
    assert [level.unique().tolist() for level in levels] == [[111], [122], [123], [123]]
    assert [level.shape[-1] for level in levels] == [8, 4, 2, 1]


@torch.no_grad()
@pytest.mark.parametrize("neck", [FPN, PAN])
def test_maps_of_odd_sizes_fit_together(neck):
    built = neck((8, 16, 24), 4, num_extra=2)
    maps = [torch.rand(2, channels, *size) for channels, size in ((8, (13, 9)), (16, (7, 5)), (24, (4, 3)))]
    levels = built(maps)
    assert [level.shape for level in levels] == [
        (2, 4, 13, 9), (2, 4, 7, 5), (2, 4, 4, 3), (2, 4, 2, 2), (2, 4, 1, 1),
    ]  # fmt: skip
    assert built.output_channels == (4,) * 5
