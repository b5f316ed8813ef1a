"""Two processes on one machine, over gloo, train one student."""

import hashlib
import sys

import accelerate
import pytest
import yaml

import students
import train
from distill.data.shapes import CLASSES
from distill.distiller import Distiller
from distill.measure import count_nonzero, count_parameters


@pytest.fixture
def launch(on_processes, monkeypatch, tmp_path):
    """Runs train.py on two processes: what each has seen, and what the first one said."""

    def launch(settings):
        (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings))
        monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "a.yaml")])
        ended = on_processes(2, train_and_see)
        assert [(one.status, one.value and one.value["status"]) for one in ended] == [(0, 0), (0, 0)], (
            ended[0].said + ended[1].said
        )
        return *(one.value for one in ended), ended[0].said

    return launch


def train_and_see():
    """train.py as it is; only, each process tells in the end what its own copy of everything looks like."""
    seen = {"labelled": [], "gradients": []}
    fit, finish, ask, clip = train.fit, train.finish, Distiller.ask, accelerate.Accelerator.clip_grad_norm_

    def ask_and_see(unit, teachers, images, targets, metas=None):
        if unit.training:
            seen["labelled"].append(sum(target is not None for target in targets))
        return ask(unit, teachers, images, targets, metas)

    def see_and_clip(accelerator, parameters, *arguments):
        parameters = list(parameters)
        shapes = [list(parameter.shape) for parameter in parameters]
        seen["gradients"].append((shapes, digest(parameter.grad for parameter in parameters)))
        return clip(accelerator, parameters, *arguments)

    def fit_and_see(run):
        finished = fit(run)
        plans = [plan.to_json() for plan in run.unit.student.plans]
        seen.update(parameters=digest(run.unit.parameters()), plans=plans, terms=len(run.unit.terms))
        seen.update(teachers=digest(x for t in run.teachers.values() for x in t.detector.state_dict().values()))
        models, optimizers = run.accelerator._models, run.accelerator._optimizers
        owned = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        seen["models"] = [run.accelerator.unwrap_model(model) is run.unit for model in models]
        seen["owned"] = [len(optimizers), owned == {id(parameter) for parameter in run.unit.parameters()}]
        return finished

    def finish_and_see(run, kept, *arguments):
        finish(run, kept, *arguments)
        seen.update(kept=digest(kept.state_dict().values()))

    train.fit, train.finish, Distiller.ask = fit_and_see, finish_and_see, ask_and_see
    accelerate.Accelerator.clip_grad_norm_ = see_and_clip
    seen["status"] = train.main()
    return seen


def digest(tensors):
    content = b"".join(tensor.detach().contiguous().cpu().numpy().tobytes() for tensor in tensors)
    return hashlib.sha256(content).hexdigest()


def test_two_processes_hold_the_same_student(settings, launch, tmp_path):
    settings["data"]["batch_size"] = 2  # two steps an epoch on each
    settings["pruning"] |= {"end": 2, "every": 1, "evaluate": True, "blocks": {"count": 1, "epochs": [1]}}
    settings["pruning"]["sparsity"] = {"scales": 0.01, "weights": 1e-5, "groups": 1e-4, "spare_shortcuts": True}
    settings["pruning"]["masks"] = {"sparsity": 0.5, "epochs": [2], "importance": "gradient", "ranking": "global"}
    settings["train"]["epochs"] = 3
    settings["teacher"]["train"]["epochs"] = 1
    first, second, said = launch(settings)
    assert first["terms"] == 4 and len(first["plans"]) == 2
    assert second["plans"] == first["plans"]
    assert second["parameters"] == first["parameters"]
    student = students.load(tmp_path / "run/student")
    assert [name for name, _ in student.plans[0].blocks] == ["backbone.body.layer1.0"]
    assert 0.5 <= count_nonzero(student) / count_parameters(student) < 0.6
    # batch-norm statistics included: each rank evaluates its share of the images
    assert second["kept"] == first["kept"]
    rows = (tmp_path / "run" / "results.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", "1", "2", "3"]
    assert said.count("cut before epoch 2: ") == 1  # one rank reports


def test_gradients_are_those_of_all_processes_after_each_cut(settings, launch):
    settings |= {"teacher": None, "losses": {}, "balance": "none", "train": {"epochs": 3}}
    settings["data"]["batch_size"] = 2
    settings["pruning"] = {"target": 0.5, "start": 1, "end": 2}
    first, second, _ = launch(settings)
    assert len(first["gradients"]) == 6 and first["gradients"] == second["gradients"]
    shapes = [shapes for shapes, _ in first["gradients"]]
    assert shapes[0] == shapes[1] != shapes[2] == shapes[3] != shapes[4] == shapes[5]
    assert first["models"] == second["models"] == [True]  # no wrapper of an older shape
    assert first["owned"] == second["owned"] == [1, True]


def test_a_process_that_cuts_otherwise_is_found(settings, on_processes, monkeypatch, tmp_path):
    settings |= {"teacher": None, "losses": {}, "balance": "none", "train": {"epochs": 2}}
    settings["pruning"] = {"target": 0.5, "start": 1, "end": 1}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "a.yaml")])

    def plan_alone(surgery):
        surgery.run.pruner.target += 0.2 * surgery.run.accelerator.process_index
        return surgery.run.pruner.plan(surgery.unit, surgery.progress.epoch)

    monkeypatch.setattr(train.Surgery, "plan", plan_alone)
    ended = on_processes(2, train.main)
    assert [one.value for one in ended] == [2, 2], ended[0].said + ended[1].said
    assert "processes: 1 of 2 hold another student" in ended[0].said


def test_two_processes_hold_the_same_student_of_before(settings, launch, tmp_path):
    settings |= {"teacher": "original", "balance": "none", "train": {"epochs": 2}}
    settings["losses"] = {"soft_label": {"name": "dense_sigmoid"}, "mimic": {"name": "pkd", "adapter": "select"}}
    settings["data"]["batch_size"] = 2
    settings["pruning"] |= {"end": 1, "every": 1}
    first, second, _ = launch(settings)
    assert first["teachers"] == second["teachers"] and first["kept"] == second["kept"]
    # to the bit what lies in the run folder
    tensors = students.load(tmp_path / "run/teacher").state_dict().values()
    content = b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)
    assert first["teachers"] == hashlib.sha256(content).hexdigest()


def test_a_process_without_labelled_images_stays_in_step(settings, launch, scenes, build_tiny, tmp_path):
    students.save(build_tiny(class_names=list(CLASSES), channels=24), tmp_path / "teacher")
    settings |= {"teacher": {"path": str(tmp_path / "teacher")}, "pruning": None, "train": {"epochs": 2}}
    settings["losses"] = {"soft_label": {"name": "dense_sigmoid"}, "feature_mimic": {"name": "pkd"}}
    # labelled, unlabelled | unlabelled, unlabelled | ...: the second process never has one of the eight labelled ones
    settings["data"] |= {"batch_size": 2, "unlabelled": {"root": f"{scenes}/images/val", "ratio": 0.75}}
    first, second, _ = launch(settings)
    # before them, the batch that the guards look at, which is the same for both
    assert first["labelled"] == [1] + [1] * 16 and second["labelled"] == [1] + [0] * 16
    assert (first["parameters"], first["kept"]) == (second["parameters"], second["kept"])
    rows = (tmp_path / "run" / "results.csv").read_text().splitlines()
    assert [float(row.split(",")[1]) > 0 for row in rows[1:]] == [True, True]  # the task


def test_two_processes_take_a_cut_back_together(settings, launch, monkeypatch):
    monkeypatch.setattr("distill.pruning.guard.MOST", 0)
    settings |= {"teacher": None, "losses": {}, "balance": "none", "train": {"epochs": 2}}
    settings["data"]["batch_size"] = 2
    settings["pruning"] = {"target": 0.6, "epochs": [1], "importance": "group_l1", "round_to": 4}
    settings["pruning"] |= {"guard": {"ap": 1.0, "recovery": 1}, "blocks": {"count": 1, "epochs": [1]}}
    first, second, said = launch(settings)
    assert said.count("back to before the cut at epoch 2") == 1
    assert first["plans"] == second["plans"] == []
    assert (first["parameters"], first["kept"]) == (second["parameters"], second["kept"])
    assert first["owned"] == second["owned"] == [1, True] and first["models"] == [True]
