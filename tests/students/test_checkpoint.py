import argparse
import datetime
import os
import pathlib
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from students.checkpoint import read_tensors


@pytest.fixture
def networks(monkeypatch):
    """A module `models.yolo` with a network of its own, as those that published files were pickled from."""
    module = types.ModuleType("models.yolo")

    class DetectionModel(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4), nn.SiLU()))
            self.register_buffer("left_out", torch.zeros(1), persistent=False)
            self.names = {0: "person", 1: "bicycle"}
            self.yaml = {"nc": 2}
            self.hyp = argparse.Namespace(lr=0.1)

    DetectionModel.__module__, DetectionModel.__qualname__ = "models.yolo", "DetectionModel"
    module.DetectionModel = DetectionModel
    monkeypatch.setitem(sys.modules, "models", types.ModuleType("models"))
    monkeypatch.setitem(sys.modules, "models.yolo", module)
    return module


def test_a_network_of_unknown_classes(networks, tmp_path, monkeypatch):
    model, ema = networks.DetectionModel(), networks.DetectionModel().half()
    with torch.no_grad():
        ema.model[0].bias.fill_(7)
    content = {
        "epoch": -1,
        "best_fitness": np.array([0.5]),
        "score": np.float64(0.5),
        "model": model,
        "ema": ema,
        "opt": {"save_dir": pathlib.Path("runs"), "at": datetime.datetime(2020, 1, 1), "set": {1}},
    }
    torch.save(content, tmp_path / "best.pt")
    wanted = ema.float().state_dict()
    monkeypatch.delitem(sys.modules, "models.yolo")  # whoever reads it has no such code
    tensors, names = read_tensors(tmp_path / "best.pt")
    assert names == ["person", "bicycle"]
    assert list(tensors) == list(wanted)
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    assert tensors["model.0.bias"].dtype == torch.float32 and tensors["model.0.bias"][0] == 7
    assert tensors["model.1.0.num_batches_tracked"].dtype == torch.int64


def test_without_an_average_it_is_the_network(networks, tmp_path):
    model = networks.DetectionModel()
    for content in ({"model": model, "ema": None}, model, {"model": model.state_dict()}, model.state_dict()):
        torch.save(content, tmp_path / "last.pt")
        tensors, _ = read_tensors(tmp_path / "last.pt")
        assert torch.equal(tensors["model.0.weight"], model.model[0].weight)


class Calls:
    """Pickled, it is a call of a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize(
    "function, name",
    [
        (os.system, r"(posix|nt)\.system"),
        (eval, r"(builtins|__builtin__)\.eval"),
        (exec, r"(builtins|__builtin__)\.exec"),
        (getattr, r"(builtins|__builtin__)\.getattr"),
        (os.mkdir, r"(posix|nt)\.mkdir"),
        (torch.hub.load, r"torch\.hub\.load"),
        (pickle.loads, r"_?pickle\.loads"),
        (np.save, r"numpy\.save"),
    ],
)
def test_a_file_that_calls_a_function_is_refused_by_its_name(tmp_path, function, name):
    path, mark = tmp_path / "bad.pt", tmp_path / "ran"
    argument = {eval: f"open({str(mark)!r}, 'w')", exec: f"open({str(mark)!r}, 'w')"}.get(function, str(mark))
    torch.save({"model": {"model.0.weight": torch.zeros(1)}, "x": Calls(function, argument)}, path)
    with pytest.raises(ValueError, match=rf"^weights: {path} asks for {name}, which .* nothing was run$"):
        read_tensors(path)
    assert not mark.exists()


@pytest.mark.parametrize("form", ["older", "plain"])
def test_code_is_named_in_files_that_are_no_archives(tmp_path, form):
    path, mark = tmp_path / "bad.pt", tmp_path / "ran"
    content = {"epoch": 1, "x": Calls(os.mkdir, str(mark))}
    if form == "older":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"asks for (posix|nt)\.mkdir, which .* nothing was run$"):
        read_tensors(path)
    assert not mark.exists()


def test_a_file_of_an_older_pytorch_is_read(networks, tmp_path):
    model = networks.DetectionModel()
    for content in ({"ema": model}, model.state_dict()):
        torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        tensors, _ = read_tensors(tmp_path / "old.pth")
        assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())


def test_a_class_of_a_network_that_is_called_is_refused(networks, tmp_path):
    torch.save({"model": Calls(networks.DetectionModel)}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"asks for models\.yolo\.DetectionModel, which"):
        read_tensors(tmp_path / "bad.pt")


def test_what_is_no_checkpoint(tmp_path):
    def refused(name):
        with pytest.raises(ValueError) as error:
            read_tensors(tmp_path / name)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "weights: no file" in refused("nothing.pt")
    (tmp_path / "text.pt").write_text("hello")
    assert "is no checkpoint of PyTorch's, or not a whole one" in refused("text.pt")
    (tmp_path / "empty.pt").touch()
    assert "is no checkpoint of PyTorch's" in refused("empty.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"a": 1}))
    assert "is no checkpoint of PyTorch's" in refused("plain.pt")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("a.txt", "b")
    assert "is no checkpoint of PyTorch's" in refused("other.pt")
    torch.save({"model": {"epochs": 3}}, tmp_path / "numbers.pt")
    assert "holds no network and no state dict" in refused("numbers.pt")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/constants.pkl", "")
    assert "is a TorchScript program" in refused("script.pt")
    torch.save({"model": {"model.0.weight": torch.zeros(100)}}, tmp_path / "cut.pt")
    content = (tmp_path / "cut.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    assert "is no checkpoint" in refused("cut.pt")
