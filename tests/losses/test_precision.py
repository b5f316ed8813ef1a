import pytest
import torch

from losses import attention_transfer, dense_sigmoid, giou_loss, pkd, plain_mimic, quality_focal_loss
from losses.precision import at_least_float32


def test_only_float64_stays():
    for dtype in (torch.bfloat16, torch.float16, torch.int64, torch.bool):
        assert at_least_float32(torch.ones(2, dtype=dtype)).dtype == torch.float32
    for dtype in (torch.float32, torch.float64):
        values = torch.ones(2, dtype=dtype)
        assert at_least_float32(values) is values


def maps(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: plain_mimic(x, maps(2, 3, 2, 2)),
        lambda x: pkd(x, maps(2, 3, 2, 2)),
        lambda x: attention_transfer(x, maps(2, 3, 2, 2)),
        lambda x: dense_sigmoid([x], [maps(2, 3, 2, 2)]),
        lambda x: quality_focal_loss(x, maps(2, 3, 2, 2).sigmoid()),
        lambda x: giou_loss(torch.cat([x[:, 0], x[:, 1] + 5], dim=2), maps(2, 2, 4).abs() + 6, torch.ones(2, 2)),
    ],
    ids=["plain_mimic", "pkd", "attention_transfer", "dense_sigmoid", "quality_focal_loss", "giou_loss"],
)
def test_gradients_are_those_of_finite_differences(loss):
    student = torch.randn(2, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert loss(student).dtype == torch.float64
    assert torch.autograd.gradcheck(loss, student.requires_grad_())
