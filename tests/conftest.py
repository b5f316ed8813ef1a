"""What all tests stand on: one thread, no network, tiny drawn scenes, tiny detectors."""

import os

# before torch and the hub's client are imported; subprocesses inherit them
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", ACCELERATE_USE_CPU="true")

import multiprocessing
import pickle
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate.state
import pytest
import torch

import students
from distill.data.synthetic import draw_scenes

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # train.py is a script, not part of an installed package
torch.set_num_threads(1)


@dataclass
class Ended:
    """How one of several processes ended.

    Attributes:
        status: its exit status; minus the signal's number where one killed it.
        value: what the function returned; None where it came to no end.
        said: its standard output and error.
    """

    status: int
    value: Any
    said: str


@pytest.fixture
def on_processes(tmp_path):
    """Calls a function on so many processes of one group over gloo, as `torchrun` would: how each ended, by rank.

    They are forks of this one, as it is: nothing is imported again, and what is patched is patched there too. When one
    fails, the others are given `patience` seconds to end by themselves, then killed.
    """

    def call(number: int, function: Callable[[], Any], patience: float = 0.0, timeout: float = 300) -> list[Ended]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        files = [tmp_path / f"rank{rank}" for rank in range(number)]

        def act(rank: int) -> None:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
            os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
            os.environ.update({name: str(value) for name, value in names.items()} if number > 1 else {})
            sys.stdout = sys.stderr = files[rank].open("w", buffering=1)
            for state in ("PartialState", "AcceleratorState", "GradientState"):
                getattr(accelerate.state, state)._reset_state()
            value = function()
            files[rank].with_suffix(".pickle").write_bytes(pickle.dumps(value))

        forks = multiprocessing.get_context("fork")
        started = [forks.Process(target=act, args=(rank,)) for rank in range(number)]
        for file in files:
            file.with_suffix(".pickle").unlink(missing_ok=True)
        for process in started:
            process.start()
        until = time.monotonic() + timeout
        while time.monotonic() < until and any(process.is_alive() for process in started):
            if any(process.exitcode for process in started):
                until, patience = min(until, time.monotonic() + patience), 0.0
            time.sleep(0.02)
        late = [process for process in started if process.is_alive()]
        for process in late:
            process.kill()
        for process in started:
            process.join()
        results = [file.with_suffix(".pickle") for file in files]
        values = [pickle.loads(file.read_bytes()) if file.exists() else None for file in results]
        return [Ended(p.exitcode, v, f.read_text()) for p, v, f in zip(started, values, files)]

    return call


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    path = Path(os.environ.get("SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"real data sets: {path} does not exist; set SHARED_DATA to their folder")
    return path


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """Eight training and four validation scenes of 64x64 pixels; read only."""
    return draw_scenes(tmp_path_factory.mktemp("drawn") / "scenes", train=8, val=4, image_size=64)


@pytest.fixture
def build_tiny():
    """Builds a detector of 16 channels with random weights, the same ones for the same arguments."""

    def build(seed: int = 0, **changes) -> students.Detector:
        torch.manual_seed(seed)
        arguments = {"class_names": ["a", "b"], "backbone": "test_resnet", "channels": 16, "head_depth": 1}
        return students.build("dense", **arguments | changes)

    return build


@pytest.fixture
def images() -> torch.Tensor:
    """(2, 3, 64, 64) in [0, 1]."""
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def targets() -> list[dict[str, torch.Tensor]]:
    """Two objects on the first image, none on the second."""
    return [
        {"boxes": torch.tensor([[4.0, 4, 40, 44], [30, 20, 62, 60]]), "labels": torch.tensor([0, 1])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)},
    ]


@pytest.fixture
def settings(scenes, tmp_path, monkeypatch) -> dict:
    """A whole config of the smallest run that trains a teacher, distils by all kinds of losses and cuts twice.

    Charts take longer than such a run; those of this process are not drawn.
    """
    monkeypatch.setattr("distill.pictures.album.draw_run", lambda run: [])
    detector = {"backbone": "test_resnet", "channels": 16, "head_depth": 1}
    return {
        "output_dir": str(tmp_path / "run"),
        "data": {"root": str(scenes), "image_size": 64, "batch_size": 4, "workers": 0},
        "teacher": {"detector": {**detector, "channels": 24}, "train": {"epochs": 1}},
        "student": detector,
        "losses": {
            "soft_label": {"name": "dense_sigmoid"},
            "box": {"name": "box_mimic"},
            "feature_mimic": {"name": "pkd", "weight": 0.5, "schedule": {"shape": "cosine", "warmup_epochs": 1.5}},
            "fpn_attention": {"name": "attention_transfer", "weight": 0.2, "schedule": {"stop_epoch": 4}},
        },
        "balance": "gradient",
        "pruning": {"target": 0.5, "start": 1, "end": 3, "every": 2, "importance": "taylor", "ranking": "global"},
        "train": {"epochs": 5},
    }
