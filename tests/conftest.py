"""What all tests stand on: one thread, no network, tiny drawn scenes, tiny detectors."""

import os

# before torch and the hub's client are imported; subprocesses inherit them
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", ACCELERATE_USE_CPU="true")

import sys
from pathlib import Path

import pytest
import torch

import students
from distill.data.synthetic import draw_scenes

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # train.py is a script, not part of an installed package
torch.set_num_threads(1)


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
