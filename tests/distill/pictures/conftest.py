import pytest

from distill.pictures import style
from distill.run_folder import RunFolder

CONFIG = {
    "seed": 3,
    "data": {"root": "data/pets", "val": "val", "image_size": [240, 320], "batch_size": 4},
    "student": {"backbone": "resnet18", "channels": 96},
    "teacher": {"path": "runs/teacher"},
    "losses": {"soft_label": {"name": "dense_sigmoid", "weight": 2.0}},
    "pruning": {"target": 0.5, "start": 2, "end": 3, "importance": "taylor"},
    "train": {"epochs": 6},
}
#        epoch task soft   MACs params  AP   right after  cat  dog
ROWS = [(1, 3.0, 1.0, 1000, 400, 0.10, None, 0.1, 0.1),
        (2, 2.0, 0.8, 1000, 400, 0.40, None, 0.5, 0.3),
        (3, 2.5, 0.9, 700, 250, 0.30, 0.20, 0.3, 0.3),
        (4, 2.2, 0.7, 500, 150, 0.35, 0.25, 0.4, 0.2),
        (5, 2.0, 0.6, 500, 150, 0.45, None, 0.6, 0.3)]  # fmt: skip
PRUNING = {
    "budget": "macs",
    "target": 0.5,
    "groups": [{"layers": ["stem", "add"], "width": 32}, {"layers": ["tower"], "width": 16}],
    "cuts": [
        {"epoch": 2, "left": 0.7, "blocks": [], "groups": [
            {"layers": ["stem", "add"], "before": 32, "after": 24, "kept": 2.0, "removed": 0.5, "macs_saved": 300}]},
        {"epoch": 3, "left": 0.5, "blocks": [], "groups": [
            {"layers": ["stem", "add"], "before": 24, "after": 8, "kept": 3.0, "removed": 1.0, "macs_saved": 200}]},
    ],
    "retreats": [{"epoch": 3, "until": 5, "left": 0.4, "objection": "AP 0.010 is under the floor of 0.2"}],
    "whole": {"shuffle": "chunk is not followed, in <shuffle>"},
}  # fmt: skip
COLUMNS = ("epoch", "task", "soft_label", "macs", "params", "ap", "ap_after_cut", "ap_cat", "ap_dog")


def entry(ap, macs, **others):
    curve = {"0.50": [ap] * 101, "0.75": [ap / 2] * 101}
    scores = {"ap": ap, "ap50": ap, "ap75": ap, "per_class": {"cat": ap, "dog": ap}, "precision": curve}
    return scores | {"params": macs // 3, "macs": macs, "latency_ms": macs / 100} | others


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Few pixels, which are what takes the time."""
    monkeypatch.setitem(style.STYLE, "figure.dpi", 30)
    monkeypatch.setattr(style, "SHEET_DPI", 20)


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """A run that was cut before its third and its fourth epoch, five of six epochs done."""
    run = RunFolder.create(tmp_path / "run", CONFIG, overwrite=False)
    for cells in ROWS:
        row = dict(zip(COLUMNS, cells))
        run.append_result(row | {"macs_left": row["macs"] / 1000, "teacher_ap": 0.5, "lr": 0.001, "seconds": 2.0})
    run.write_pruning(PRUNING)
    return run


@pytest.fixture
def finished(run) -> RunFolder:
    """The same with its summary, which was measured on another split."""
    entries = {"teacher": entry(0.6, 4000), "student_before": entry(0.42, 1000, epoch=2), "student": entry(0.5, 500)}
    cuts = [{"macs": 700, "params": 250, "latency_ms": 8.0}, {"macs": 500, "params": 150, "latency_ms": 5.0}]
    run.write_summary({**entries, "cuts": cuts, "split": "test", "epochs": 6})
    return run
