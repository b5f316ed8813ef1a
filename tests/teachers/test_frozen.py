import pytest
import torch
from timm.layers import DropPath
from torch import nn

from students import DenseOutput
from teachers import Teacher, freeze


class Noisy(nn.Module):
    """Everything that behaves differently in train mode, in one small network."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), DropPath(0.5))
        self.layers.train()

    def forward(self, images):
        x = self.layers(images)
        return DenseOutput((x, x[..., ::2]), (x[:, :2],), (x,))


def flat(output):
    return [level for levels in output for level in levels]


def test_a_teacher_does_not_change_and_does_not_guess(images):
    detector = Noisy()
    teacher = Teacher(detector)
    assert teacher.detector is detector
    assert not any(module.training for module in detector.modules())
    assert not any(p.requires_grad for p in detector.parameters())
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    first, second = teacher(images), teacher(images)
    assert all(map(torch.equal, flat(first), flat(second)))
    assert all(torch.equal(before[name], tensor) for name, tensor in detector.state_dict().items())


def test_outputs_have_no_graph_even_where_images_do(images):
    output = Teacher(Noisy())(images.requires_grad_())
    assert not any(level.requires_grad for level in flat(output))


def test_a_teacher_is_no_module_that_a_trainer_could_register():
    module = nn.Module()
    module.teacher = Teacher(Noisy())
    assert not isinstance(module.teacher, nn.Module)
    assert list(module.parameters()) == [] and module.state_dict() == {}


def test_low_precision_comes_back_as_float32(build_tiny, images):
    exact = Teacher(build_tiny())(images)
    rounded = Teacher(build_tiny(), precision="bfloat16")(images)
    assert type(rounded) is DenseOutput
    assert [len(levels) for levels in rounded] == [len(levels) for levels in exact]
    for low, full in zip(flat(rounded), flat(exact)):
        assert low.dtype == torch.float32 and low.shape == full.shape
        assert torch.allclose(low, full, rtol=0.1, atol=0.1)
    assert not torch.equal(rounded.features[0], exact.features[0])


def test_a_teacher_in_train_mode_refuses(images):
    teacher = Teacher(Noisy())
    teacher.detector.train()
    with pytest.raises(RuntimeError, match="was put in train mode"):
        teacher(images)


def test_freeze_reaches_everything_below():
    module = freeze(nn.Sequential(nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2))))
    assert not any(m.training for m in module.modules()) and not any(p.requires_grad for p in module.parameters())
