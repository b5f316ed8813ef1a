import torch

from losses.precision import at_least_float32


def test_only_float64_stays():
    for dtype in (torch.bfloat16, torch.float16, torch.int64, torch.bool):
        assert at_least_float32(torch.ones(2, dtype=dtype)).dtype == torch.float32
    for dtype in (torch.float32, torch.float64):
        values = torch.ones(2, dtype=dtype)
        assert at_least_float32(values) is values
