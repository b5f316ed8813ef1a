import pytest
import torch

import students

SMALL = {
    "yolov4": {"width": 0.125, "depth": 0.25},
    "yolov5": {"size": "n", "width": 0.125},
    "yolov7": {"width": 0.125},
    "yolov7_tiny": {"width": 0.25},
}


@pytest.fixture(params=SMALL)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def small_settings() -> dict[str, dict]:
    """By family, the settings of `build_small`."""
    return SMALL


@pytest.fixture(scope="session")
def build_small():
    """Builds the smallest detector of a YOLO family, the same one for the same arguments."""

    def build(family: str, **changes) -> students.Detector:
        torch.manual_seed(0)
        return students.build(family, **{"class_names": ["a", "b"]} | SMALL[family] | changes)

    return build


@pytest.fixture
def shake():
    """Gives a detector batch norms and biases as if it had been trained, so that no two channels are alike."""

    @torch.no_grad()
    def shake(detector: students.Detector) -> students.Detector:
        generator = torch.Generator().manual_seed(3)
        for name, tensor in detector.state_dict().items():
            if name.endswith("running_var") or (name.endswith("weight") and tensor.dim() == 1):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif name.endswith(("running_mean", "bias")):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
        return detector.eval()

    return shake
