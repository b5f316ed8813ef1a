"""Folded norms: values by hand, which pairs may be folded, and the same predictions for every family."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import students
from students import DenseOutput
from students.folding import fold_norm, fold_norms, largest_difference

FAMILIES = {
    "timm's norms with an activation": {"name": "dense", "backbone": "tf_efficientnet_lite0", "neck": "pan"},
    "layer norms": {"name": "dense", "backbone": "convnext_atto"},
    "frozen norms": {"name": "fcos", "backbone": "resnet18", "channels": 32, "norm": "frozen"},
    "two stages": {"name": "faster_rcnn", "backbone": "resnet18", "channels": 32, "version": 2},
    "merged convolutions": {"name": "yolov7", "width": 0.125, "depth": 0.34},
}


class Net(nn.Module):
    """A convolution and a norm, put together as a test wants."""

    def __init__(self, run, norm=nn.BatchNorm2d):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.other = nn.Conv2d(3, 4, 3, padding=1), norm(4), norm(4)
        self.run = run
        unsettle(self)
        self.eval().requires_grad_(False)

    def deployed(self):
        return self

    def forward(self, images):
        return DenseOutput((self.run(self, images),), (), ())


def unsettle(module):
    """Gives norms statistics and scales that are not their first ones, which would fold to nothing."""
    for norm in module.modules():
        if getattr(norm, "running_var", None) is not None:
            norm.running_mean.normal_(0.0, 0.1)
            norm.running_var.uniform_(0.5, 2.0)
            norm.weight.data.uniform_(0.5, 1.5)
            norm.bias.data.normal_(0.0, 0.1)


def norms_left(module):
    return sum(isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d) for m in module.modules())


def test_values_by_hand():
    """Scale 6 / sqrt(8 + 1) = 2; weight 3 * 2; bias (5 - 4) * 2 + 0.5."""
    conv, norm = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=1.0)
    for tensor, value in (
        (conv.weight, 3.0),
        (conv.bias, 5.0),
        (norm.weight, 6.0),
        (norm.bias, 0.5),
        (norm.running_mean, 4.0),
        (norm.running_var, 8.0),
    ):
        nn.init.constant_(tensor, value)
    weight, bias = fold_norm(conv, norm)
    assert weight.item() == pytest.approx(6.0) and bias.item() == pytest.approx(2.5)
    conv.bias = None
    assert fold_norm(conv, norm)[1].item() == pytest.approx(-7.5)


def test_a_norm_without_scales_has_ones():
    conv, norm = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=0.0, affine=False)
    nn.init.constant_(norm.running_var, 4.0)
    weight, bias = fold_norm(conv, norm)
    assert torch.allclose(weight, conv.weight / 2) and torch.allclose(bias, conv.bias / 2)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d, BatchNormAct2d])
def test_a_norm_that_alone_reads_a_convolution_is_folded(norm, images):
    net = Net(lambda net, x: net.norm(net.conv(x)), norm)
    folded = fold_norms(net, images)
    assert norms_left(folded) == 1 and norms_left(net) == 2  # the other one never ran
    assert largest_difference(folded(images), net(images)) < 1e-5
    assert folded.conv.weight is not net.conv.weight and not folded.conv.weight.requires_grad


@pytest.mark.parametrize(
    "run",
    [
        lambda net, x: (y := net.conv(x), net.norm(y) + y)[1],  # read besides
        lambda net, x: net.norm(net.conv(x) * 2.0),  # another function between
        lambda net, x: net.norm(net.conv(x)) + net.other(net.conv(x.flip(3))),  # run twice, as by levels
        lambda net, x: net.norm(net.conv(x)) + net.norm(x[:, :1].expand(-1, 4, -1, -1)),  # the norm runs twice
        lambda net, x: (y := net.conv(x), net.norm(y) + net.other(y))[1],  # two norms
        lambda net, x: net.norm(F.conv2d(x, net.conv.weight / 2, net.conv.bias, padding=1)),  # not the weight itself
        lambda net, x: (y := net.conv(x), y.relu_(), net.norm(y))[2],  # changed in place
    ],
)
def test_what_else_reads_a_convolution_keeps_its_norm(run, images):
    net = Net(run)
    folded = fold_norms(net, images)
    assert norms_left(folded) == 2
    assert torch.equal(folded(images).features[0], net(images).features[0])


def test_an_output_of_the_detector_is_read(images):
    net = Net(None)
    net.forward = lambda x: DenseOutput((y := net.conv(x), net.norm(y)), (), ())
    folded = fold_norms(net, images)
    assert norms_left(folded) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_predicts_the_same_with_fewer_layers(family):
    torch.manual_seed(0)
    detector = students.build(class_names=["one", "two"], **FAMILIES[family]).eval().requires_grad_(False)
    unsettle(detector)
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    images = torch.rand(2, 3, 64, 64)
    folded = fold_norms(detector, images)
    assert norms_left(folded) < norms_left(detector) / 2 or family == "layer norms"
    assert largest_difference(folded(images), detector(images)) < 1e-4
    assert all(torch.equal(before[name], tensor) for name, tensor in detector.state_dict().items())
    # what was not folded is held once
    own = {id(p) for p in detector.parameters()}
    names = dict(folded.named_parameters())
    assert all(id(names[name]) in own for name in names if "head" in name and name.endswith("class_logits.weight"))


def test_where_predictions_would_part_the_detector_stays(images):
    """A variance of next to nothing, whose scale folding would carry over into another rounding."""
    net = Net(lambda net, x: net.norm(net.conv(x)))
    nn.init.constant_(net.norm.running_mean, 1e6)
    nn.init.constant_(net.conv.bias, 1e6)
    nn.init.constant_(net.norm.running_var, 1e-2)
    assert fold_norms(net, images) is net
