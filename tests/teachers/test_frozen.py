import pytest
import torch
from timm.layers import DropPath
from torch import nn

import students
from students import DenseOutput
from students.folding import largest_difference
from teachers import FeatureOutput, ScaledDetector, Teacher, freeze


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

    def deployed(self):
        return self


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


def test_what_is_asked_is_a_copy_without_norms_that_shares_the_rest(build_tiny, images):
    detector = build_tiny()
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    teacher = Teacher(detector)
    whole = teacher.bytes_held
    output = teacher(images)
    with torch.no_grad():
        expected = detector(images)
    assert 0 < largest_difference(output, expected) < 1e-4  # it is not the same computation
    assert all(torch.equal(before[name], tensor) for name, tensor in detector.state_dict().items())
    folded = sum(p.numel() for m in (detector.backbone, detector.neck) for p in m.parameters() if p.dim() == 4)
    biases = sum(m.num_features for m in (*detector.backbone.modules(), *detector.neck.modules()) if is_norm(m))
    assert whole == 4 * sum(p.numel() for p in detector.parameters())
    # norms of the head, which go by level, stay, and its convolutions are held once
    assert teacher.bytes_held == whole + 4 * (folded + biases)
    halves = Teacher(detector, precision="bfloat16")
    halves(images)
    assert halves.bytes_held == whole + 2 * (folded + biases)


def test_one_that_sees_another_size_stays_as_it_is_too(build_tiny, images):
    detector = build_tiny()
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    names = list(dict(detector.named_modules()))
    scaled = ScaledDetector(detector, 2.0)
    output = Teacher(scaled)(images)
    with torch.no_grad():
        assert 0 < largest_difference(output, scaled(images)) < 1e-4
    assert list(dict(detector.named_modules())) == names
    assert all(torch.equal(before[name], tensor) for name, tensor in detector.state_dict().items())


def channels_last(images):
    return images.contiguous(memory_format=torch.channels_last)


def is_norm(module):
    return isinstance(module, nn.BatchNorm2d)


def test_a_teacher_whose_weights_are_loaded_later_is_asked_anew(build_tiny, images):
    teacher, other = Teacher(build_tiny()), build_tiny(seed=1).eval()
    first = teacher(images)
    teacher.detector.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert largest_difference(teacher(images), other(images)) < 1e-4
        assert largest_difference(first, other(images)) > 0.01


def test_one_that_goes_on_being_trained_is_asked_as_it_is(build_tiny, images):
    teacher, average = Teacher(build_tiny()), build_tiny(seed=1).eval()
    teacher.follow(average)
    for _ in range(2):
        with torch.no_grad():
            average.neck.outputs[0][0].weight.mul_(1.1)
            assert all(map(torch.equal, flat(teacher(images)), flat(average(channels_last(images)))))
    assert teacher.bytes_held == 4 * sum(p.numel() for p in average.parameters())


@pytest.mark.parametrize("family", ["dense", "yolov5", "fcos", "faster_rcnn", "scaled"])
def test_without_its_head_a_teacher_gives_the_same_pyramid(build_tiny, images, family, monkeypatch):
    backbone = {"backbone": "resnet18"} if "c" in family and family != "scaled" else {}
    small = {"size": "n", "width": 0.125} if family == "yolov5" else {"channels": 32, **backbone}
    if family in ("dense", "scaled"):
        detector = build_tiny()
    else:
        detector = students.build(name=family, class_names=["one", "two"], **small)
    if family == "scaled":
        detector = ScaledDetector(detector, 2.0)
    teacher = Teacher(detector)
    with_head, without = teacher(images), teacher(images, head=False)
    assert type(without) is FeatureOutput
    assert all(map(torch.equal, with_head.features, without.features))
    monkeypatch.setattr(type(detector), "forward", None)  # is not needed any more
    assert len(teacher(images, head=False).features) == len(detector.strides)


def test_outputs_of_a_teacher_may_be_kept_for_a_pass_back(build_tiny, images):
    """Tensors of `torch.inference_mode` may not."""
    output = Teacher(build_tiny())(images)
    scale = torch.ones((), requires_grad=True)
    sum((scale * level).square().sum() for level in output.features).backward()
    assert scale.grad > 0


def test_freeze_reaches_everything_below():
    module = freeze(nn.Sequential(nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2))))
    assert not any(m.training for m in module.modules()) and not any(p.requires_grad for p in module.parameters())
