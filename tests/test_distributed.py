"""Two processes on one machine, over gloo, train one student."""

import hashlib
import json
import subprocess
import sys

import yaml

import students
from distill.data.shapes import CLASSES

# train.py as it is; only, each rank says at the end what its own copy of everything looks like
SCRIPT = """
import hashlib, json, os, sys
from pathlib import Path

sys.path.insert(0, {repository!r})
import train

def digest(tensors):
    content = b"".join(tensor.detach().contiguous().cpu().numpy().tobytes() for tensor in tensors)
    return hashlib.sha256(content).hexdigest()

fit, finish, ask, seen = train.fit, train.finish, train.Distiller.ask, {{"labelled": []}}

def ask_and_see(unit, teachers, images, targets):
    if unit.training:
        seen["labelled"].append(sum(target is not None for target in targets))
    return ask(unit, teachers, images, targets)

def fit_and_see(run):
    fit(run)
    plans = [plan.to_json() for plan in run.unit.student.plans]
    seen.update(parameters=digest(run.unit.parameters()), plans=plans, terms=len(run.unit.terms))
    seen.update(teachers=digest(x for t in run.teachers.values() for x in t.detector.state_dict().values()))

def finish_and_see(run, kept, *arguments):
    finish(run, kept, *arguments)
    seen.update(kept=digest(kept.state_dict().values()))

train.fit, train.finish, train.Distiller.ask = fit_and_see, finish_and_see, ask_and_see
status = train.main()
Path({folder!r}, "rank" + os.environ["RANK"] + ".json").write_text(json.dumps(seen))
sys.exit(status)
"""


def launch(settings, repository, folder):
    """Runs it on two processes: what each has seen, and what was said."""
    (folder / "a.yaml").write_text(yaml.safe_dump(settings))
    (folder / "check.py").write_text(SCRIPT.format(repository=str(repository), folder=str(folder)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "check.py", "a.yaml"], cwd=folder, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return *(json.loads((folder / f"rank{n}.json").read_text()) for n in (0, 1)), done.stdout


def test_two_processes_hold_the_same_student(settings, repository, tmp_path):
    settings["data"]["batch_size"] = 2  # two steps an epoch on each
    settings["pruning"] |= {"end": 1, "every": 1, "evaluate": True}
    settings["train"]["epochs"] = 3
    first, second, said = launch(settings, repository, tmp_path)
    assert first["terms"] == 4 and len(first["plans"]) == 1
    assert second["plans"] == first["plans"]
    assert second["parameters"] == first["parameters"]
    # batch-norm statistics included: each rank evaluates its share of the images
    assert second["kept"] == first["kept"]
    rows = (tmp_path / "run" / "results.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", "1", "2", "3"]
    assert said.count("cut before epoch 2: ") == 1  # one rank reports


def test_two_processes_hold_the_same_student_of_before(settings, repository, tmp_path):
    settings |= {"teacher": "original", "balance": "none", "train": {"epochs": 2}}
    settings["losses"] = {"soft_label": {"name": "dense_sigmoid"}, "mimic": {"name": "pkd", "adapter": "select"}}
    settings["data"]["batch_size"] = 2
    settings["pruning"] |= {"end": 1, "every": 1}
    first, second, _ = launch(settings, repository, tmp_path)
    assert first["teachers"] == second["teachers"] and first["kept"] == second["kept"]
    # to the bit what lies in the run folder
    tensors = students.load(tmp_path / "run/teacher").state_dict().values()
    content = b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)
    assert first["teachers"] == hashlib.sha256(content).hexdigest()


def test_a_process_without_labelled_images_stays_in_step(settings, repository, scenes, build_tiny, tmp_path):
    students.save(build_tiny(class_names=list(CLASSES), channels=24), tmp_path / "teacher")
    settings |= {"teacher": {"path": str(tmp_path / "teacher")}, "pruning": None, "train": {"epochs": 2}}
    settings["losses"] = {"soft_label": {"name": "dense_sigmoid"}, "feature_mimic": {"name": "pkd"}}
    # labelled, unlabelled | unlabelled, unlabelled | ...: the second process never has one of the eight labelled ones
    settings["data"] |= {"batch_size": 2, "unlabelled": {"root": f"{scenes}/images/val", "ratio": 0.75}}
    first, second, _ = launch(settings, repository, tmp_path)
    # before them, the batch that the guards look at, which is the same for both
    assert first["labelled"] == [1] + [1] * 16 and second["labelled"] == [1] + [0] * 16
    assert (first["parameters"], first["kept"]) == (second["parameters"], second["kept"])
    rows = (tmp_path / "run" / "results.csv").read_text().splitlines()
    assert [float(row.split(",")[1]) > 0 for row in rows[1:]] == [True, True]  # the task
