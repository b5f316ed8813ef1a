import torch
from torch import nn

from distill.ema import EMA


def test_the_average_is_literal():
    module = nn.BatchNorm1d(1)  # a parameter, a running statistic and a counter
    ema = EMA(module, decay=0.25)
    assert ema.module is not module and not ema.module.training
    assert not any(p.requires_grad for p in ema.module.parameters())

    module.weight.data.fill_(3.0)
    module.running_mean.fill_(11.0)
    module.num_batches_tracked.fill_(7)
    ema.update(module)  # decay (1 + 1) / (10 + 1), less than 0.25
    assert torch.allclose(ema.module.weight, torch.tensor([1 * 2 / 11 + 3 * 9 / 11]))
    assert torch.allclose(ema.module.running_mean, torch.tensor([11 * 9 / 11]))
    assert ema.module.num_batches_tracked == 7
    assert ema.updates == 1

    before = ema.module.weight.item()
    ema.update(module)  # decay min(0.25, 3 / 12)
    ema.update(module)  # decay min(0.25, 4 / 13) = 0.25
    assert torch.allclose(ema.module.weight, torch.tensor([3 + (before - 3) * 0.25 * 0.25]))
    assert module.weight.item() == 3.0 and module.weight.requires_grad and module.training
