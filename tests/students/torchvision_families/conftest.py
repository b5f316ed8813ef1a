import pytest
import torch
from torch import nn


@pytest.fixture(scope="session")
def wake():
    """Gives a fresh torchvision model batch-norm statistics and class layers that tell places apart, so that it
    detects something."""

    @torch.no_grad()
    def wake(model: nn.Module, images: torch.Tensor, *class_layers: str) -> nn.Module:
        generator = torch.Generator().manual_seed(2)
        mean = torch.tensor(model.transform.image_mean).view(1, 3, 1, 1)
        std = torch.tensor(model.transform.image_std).view(1, 3, 1, 1)
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        model.train().backbone((images - mean) / std)
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        for name, parameter in model.named_parameters():
            if name.startswith(class_layers):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.dim() > 1 else 1))
        return model.eval()

    return wake


@pytest.fixture(scope="session")
def pictures() -> torch.Tensor:
    """(2, 3, 128, 128) in [0, 1]; a side that all of a pyramid's strides divide."""
    return torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def objects() -> list[dict[str, torch.Tensor]]:
    """Three objects of two classes on the first picture, none on the second."""
    boxes = torch.tensor([[4.0, 4, 40, 44], [30, 20, 120, 100], [60, 64, 90, 110]])
    return [
        {"boxes": boxes, "labels": torch.tensor([0, 1, 1])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)},
    ]
