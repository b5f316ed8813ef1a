import pytest
import timm
import torch
import torch.nn.functional as F

from distill.measure import count_macs
from distill.terms import TERMS
from teachers import FeatureTeacher, ScaledDetector, Teacher


@pytest.fixture
def save_weights(tmp_path):
    """The path of a file with a timm network's random weights, by its own names."""

    def save(name, **arguments):
        torch.manual_seed(5)
        path = tmp_path / f"{name}.pth"
        torch.save(timm.create_model(name, **arguments).state_dict(), path)
        return str(path)

    return save


@torch.no_grad()
def test_patch_tokens_become_a_map_and_two_more(save_weights):
    teacher = FeatureTeacher("test_vit", save_weights("test_vit")).eval()
    images = torch.rand(2, 3, 48, 80)
    finer, own, coarser = teacher(images).features
    assert teacher.strides == (8, 16, 32) and teacher.feature_channels == (64, 64, 64)
    assert [tuple(x.shape) for x in (finer, own, coarser)] == [(2, 64, 6, 10), (2, 64, 3, 5), (2, 64, 2, 3)]
    # the tokens of the last block behind the last norm, without the class token, row by row
    torch.manual_seed(5)
    network = timm.create_model("test_vit", dynamic_img_size=True).eval()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in teacher.normalization)
    tokens = network.forward_features((images - mean) / std)[:, network.num_prefix_tokens :]
    torch.testing.assert_close(own, tokens.transpose(1, 2).unflatten(2, (3, 5)))
    # a 2x2 cell that hangs over the edge is the mean of what is inside
    torch.testing.assert_close(coarser[:, :, 0, 0], own[:, :, :2, :2].mean(dim=(2, 3)))
    torch.testing.assert_close(coarser[:, :, 1, 2], own[:, :, 2, 4])
    torch.testing.assert_close(finer, F.interpolate(own, (6, 10), mode="bilinear"))
    assert teacher(torch.rand(1, 3, 16, 16)).features[2].shape == (1, 64, 1, 1)
    assert count_macs(teacher, (48, 80)) > 0


def test_a_file_of_another_network_is_one_line(save_weights, caplog):
    with pytest.raises(ValueError, match=r"lacks .* tensors of test_resnet, first conv1.0.weight"):
        FeatureTeacher("test_resnet", save_weights("test_vit"))
    assert caplog.records == []  # timm would list all that it does not know


@torch.no_grad()
def test_a_pyramid_gives_its_maps_of_eight_pixels_and_more(save_weights):
    teacher = FeatureTeacher("test_resnet", save_weights("test_resnet")).eval()
    images = torch.rand(1, 3, 64, 96)
    features = teacher(images).features
    assert teacher.strides == (8, 16, 32) and teacher.feature_channels == (48, 192, 96)
    assert [tuple(x.shape[1:]) for x in features] == [(48, 8, 12), (192, 4, 6), (96, 2, 3)]
    torch.manual_seed(5)
    network = timm.create_model("test_resnet", features_only=True).eval()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in teacher.normalization)
    wanted = network((images - mean) / std)[2:]
    assert all(map(torch.allclose, features, wanted))


def test_names_of_the_authors_load_too(tmp_path):
    # as DINOv2's own files have them: a token for masking, which timm leaves out
    torch.manual_seed(5)
    network = timm.create_model("vit_small_patch14_dinov2", img_size=28)
    torch.save(network.state_dict() | {"mask_token": torch.zeros(1, 384)}, tmp_path / "dinov2.pth")
    teacher = FeatureTeacher("vit_small_patch14_dinov2", str(tmp_path / "dinov2.pth"))
    assert teacher.strides == (7, 14, 28)
    assert torch.equal(teacher.body.blocks[3].mlp.fc1.weight, network.blocks[3].mlp.fc1.weight)
    # seen at 14/16 of the size, its patches are a student's cells of 16 pixels
    assert ScaledDetector(teacher, 14 / 16).strides == (8, 16, 32) and not ScaledDetector(teacher, 0.5).detects


def test_weights_that_do_not_fit_are_told(save_weights, tmp_path):
    with pytest.raises(ValueError, match=r"^weights: an untrained network has nothing to teach; give imagenet, or"):
        FeatureTeacher("test_vit", "none")
    with pytest.raises(ValueError, match=r"^backbone: timm knows no model 'test_vitt'; near it: .*test_vit"):
        FeatureTeacher("test_vitt", save_weights("test_vit"))
    for name, other in (("test_vit", "test_resnet"), ("test_resnet", "test_vit"), ("test_vit", "test_vit2")):
        with pytest.raises(
            ValueError, match=rf"^weights: .*{other}.pth (is of another network|lacks \d+ of)"
        ) as caught:
            FeatureTeacher(name, save_weights(other))
        assert "\n" not in str(caught.value)
    state = torch.load(save_weights("test_efficientnet"))
    first = next(iter(state))
    torch.save({key: x for key, x in state.items() if key != first}, tmp_path / "most.pth")
    with pytest.raises(ValueError, match=rf"lacks 1 of the \d+ tensors of test_efficientnet, first {first} \("):
        FeatureTeacher("test_efficientnet", str(tmp_path / "most.pth"))


@pytest.mark.parametrize("name", [name for name, term in TERMS.items() if not term.uses_head])
def test_losses_over_features_learn_from_it(save_weights, build_tiny, images, targets, name):
    student, teacher = build_tiny(), Teacher(FeatureTeacher("test_vit", save_weights("test_vit")), precision="bfloat16")
    settings = {"match": "fused"} if name == "attention_transfer" else {}
    term = TERMS[name](student, teacher.detector, **settings)
    assert term.pairing == "P3-P5 by stride"
    output = student(images)
    loss = term(output, teacher(images), targets, (64, 64))
    gradients = torch.autograd.grad(loss, output.features)
    assert loss.isfinite() and all(g.abs().sum() > 0 for g in gradients)


@torch.no_grad()
def test_a_network_that_is_built_for_one_size_is_made_for_the_one_that_it_will_see(save_weights):
    weights, images = save_weights("maxvit_pico_rw_256"), torch.rand(1, 3, 96, 128)
    with pytest.raises(AssertionError, match="divisible by window"):
        FeatureTeacher("maxvit_pico_rw_256", weights).eval()(images)
    teacher = FeatureTeacher("maxvit_pico_rw_256", weights, (96, 128)).eval()
    assert [tuple(x.shape[2:]) for x in teacher(images).features] == [(12, 16), (6, 8), (3, 4)]
