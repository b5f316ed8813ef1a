"""Two processes with half the batch each follow one with the whole batch; the evaluation is the same on any number."""

from dataclasses import asdict

import pytest
import torch
import yaml
from accelerate import Accelerator

import students
import train
from distill import surgery
from distill.config import load_config
from distill.data.shapes import CLASSES
from distill.data.synthetic import draw_scenes
from distill.evaluation import DetectionEvaluator, EvaluationResult
from distill.factory import build_data
from distill.schema import Config

KINDS = {
    "plain": {"teacher": None, "losses": {}, "balance": "none", "pruning": None},
    "distilled": {"pruning": None},
    "cut": {"pruning": {"target": 0.6, "start": 3, "end": 6, "every": 3, "ranking": "uniform"}},
}


@pytest.fixture
def frozen_norms(monkeypatch):
    """Batch norms see the images of one process only, so with them half a batch is another thing by design."""
    monkeypatch.setattr(torch.nn.BatchNorm2d, "train", lambda norm, mode=True: torch.nn.Module.train(norm, False))
    monkeypatch.setattr(surgery, "recalibrate_batch_norms", lambda detector, batches: None)


@pytest.fixture
def double(monkeypatch):
    """All in float64: AdamW makes steps out of gradients that are rounding alone, and float32 grows them to 1e-4."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_two_processes_follow_one(settings, build_tiny, frozen_norms, double, on_processes, monkeypatch, tmp_path):
    torch.manual_seed(5)
    teacher = build_tiny(class_names=list(CLASSES), channels=24)
    for layer in teacher.output_layers:  # or nothing but rounding would tell its boxes from the student's
        torch.nn.init.normal_(layer.weight, std=0.3)
    students.save(teacher, tmp_path / "teacher")
    settings |= {"teacher": {"path": str(tmp_path / "teacher")}, "train": {"epochs": 10}}  # of two steps each
    # not pkd, which compares maps that are standardised over the images of a process
    settings["losses"]["feature_mimic"] |= {"name": "plain_mimic"}
    settings["data"]["augment"] = {"brightness": 0.2}
    monkeypatch.setattr("distill.pictures.album.Album.update", lambda *arguments, **more: None)
    nothing = EvaluationResult(None, None, None, None, None, None, {}, {})
    monkeypatch.setattr("distill.evaluation.run_evaluation", lambda *arguments: nothing)
    monkeypatch.setattr(train, "count_macs", lambda *arguments: 1)
    monkeypatch.setattr("distill.summary.count_macs", lambda *arguments: 1)
    monkeypatch.setattr(train, "finish", lambda *arguments: None)

    def follow(batch_size):
        """The student's tensors after 20 steps, its losses an epoch, and its cuts, of each kind of training."""
        found, fit = {}, train.fit

        def fit_and_keep(run):
            fit(run)
            tensors = {name: value.detach().clone() for name, value in run.unit.student.named_parameters()}
            rows = [[row[k] for k in row if k == "task" or k in run.unit.terms] for row in run.folder.read_results()]
            found[kind] = tensors, rows, [plan.to_json() for plan in run.unit.student.plans]

        train.fit = fit_and_keep
        for kind, changes in KINDS.items():
            path = tmp_path / f"{kind}{batch_size}.yaml"
            data = settings["data"] | {"batch_size": batch_size}
            folder = str(tmp_path / f"{kind}{batch_size}")
            path.write_text(yaml.safe_dump(settings | changes | {"data": data, "output_dir": folder}))
            train.train(load_config(path, []))
        train.fit = fit
        return found

    alone = follow(4)
    first, second = on_processes(2, lambda: follow(2))
    assert (first.status, second.status) == (0, 0), first.said + second.said
    for kind, (tensors, rows, plans) in alone.items():
        halves, half_rows, half_plans = first.value[kind]
        assert len(rows) == 10 and half_plans == plans and len(plans) == 2 * (kind == "cut")
        assert torch.tensor(half_rows).allclose(torch.tensor(rows), rtol=1e-12, atol=1e-12)
        for name, tensor in tensors.items():
            assert torch.equal(halves[name], second.value[kind][0][name]), (kind, name)
            assert tensor.dtype is torch.float64 and halves[name].allclose(tensor, rtol=0, atol=1e-12), (kind, name)


FAMILIES = (
    {"name": "dense", "backbone": "test_resnet", "channels": 16, "head": "task_aligned"},
    {"name": "dense", "backbone": "test_resnet", "channels": 16, "head": "gfl"},
    {"name": "dense", "backbone": "test_resnet", "channels": 16, "head": "retinanet"},
    {"name": "fcos", "backbone": "resnet18", "channels": 64, "head_depth": 1},
    {"name": "retinanet", "backbone": "resnet18", "channels": 32},
    {"name": "ssdlite320"},
)


def test_every_family_learns_from_two_halves_what_it_learns_from_the_whole(on_processes, images, targets):
    # one image with objects, one without: each half by itself would be divided by another number
    def learn(part=slice(None)):
        found = []
        for recipe in FAMILIES:
            torch.manual_seed(0)
            detector = students.build(**recipe, class_names=["a", "b"]).eval()
            sum(detector.loss(detector(images[part]), targets[part]).values()).backward()
            layer = detector.output_layers[0]
            found.append(layer.weight.grad.clone())
        return found

    def learn_a_half():
        rank = Accelerator().process_index
        return learn(slice(rank, rank + 1))

    whole = learn()
    first, second = on_processes(2, learn_a_half)
    assert (first.status, second.status) == (0, 0), first.said
    for gradient, half, other in zip(whole, first.value, second.value):
        assert gradient.abs().max() > 0
        torch.testing.assert_close((half + other) / 2, gradient, rtol=1e-3, atol=1e-6)


def test_evaluation_is_the_same_on_one_two_and_three_processes(
    settings, build_tiny, on_processes, monkeypatch, tmp_path
):
    # seven images in batches of two: with two processes one batch, with three two of them are filled up
    scenes = draw_scenes(tmp_path / "scenes", train=2, val=7, image_size=64)
    data = {"root": str(scenes), "batch_size": 2, "class_map": dict.fromkeys(CLASSES, "shape")}
    config = Config(**settings | {"data": settings["data"] | data})
    detector = build_tiny(class_names=["shape"])
    torch.nn.init.normal_(detector.head.class_logits.weight, std=0.3)

    def evaluate():
        """The result, the images that this process has seen, and those that the result is of."""
        seen, process, load = [], DetectionEvaluator.process, DetectionEvaluator._load_detections
        counted = []
        monkeypatch.setattr(
            DetectionEvaluator, "process", lambda self, ids, found: (seen.extend(ids), process(self, ids, found))
        )
        monkeypatch.setattr(
            DetectionEvaluator, "_load_detections", lambda self: (counted.extend(dict(self.payload())), load(self))[1]
        )
        result = train.evaluation(build_data(config.data).val, Accelerator())(detector)
        return asdict(result), seen, counted

    (alone,) = on_processes(1, evaluate)
    result, seen, counted = alone.value
    assert result["ap"] > 0.001
    assert sorted(seen) == sorted(counted) == sorted(set(seen)) and len(seen) == 7
    for number, filled in ((2, 8), (3, 12)):
        ended = on_processes(number, evaluate)
        assert [one.status for one in ended] == [0] * number, ended[0].said
        assert all(one.value[0] == result for one in ended)  # to the last digit
        assert all(sorted(one.value[2]) == sorted(seen) for one in ended)  # none missing, none twice
        assert sum(len(one.value[1]) for one in ended) <= filled
        assert set().union(*(one.value[1] for one in ended)) == set(seen)
