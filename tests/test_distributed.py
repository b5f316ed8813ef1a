"""Two processes on one machine, over gloo, train one student."""

import json
import subprocess
import sys

import yaml

# train.py as it is; only, each rank says at the end what its own copy of everything looks like
SCRIPT = """
import hashlib, json, os, sys
from pathlib import Path

sys.path.insert(0, {repository!r})
import train

def digest(tensors):
    content = b"".join(tensor.detach().contiguous().cpu().numpy().tobytes() for tensor in tensors)
    return hashlib.sha256(content).hexdigest()

fit, finish, seen = train.fit, train.finish, {{}}

def fit_and_see(config, data, unit, *arguments, **keywords):
    fit(config, data, unit, *arguments, **keywords)
    plans = [plan.to_json() for plan in unit.student.plans]
    seen.update(parameters=digest(unit.parameters()), plans=plans, terms=len(unit.terms))

def finish_and_see(config, kept, *arguments, **keywords):
    finish(config, kept, *arguments, **keywords)
    seen.update(kept=digest(kept.state_dict().values()))

train.fit, train.finish = fit_and_see, finish_and_see
status = train.main()
Path({folder!r}, "rank" + os.environ["RANK"] + ".json").write_text(json.dumps(seen))
sys.exit(status)
"""


def test_two_processes_hold_the_same_student(settings, repository, tmp_path):
    settings["data"]["batch_size"] = 2  # two steps an epoch on each
    settings["pruning"] |= {"end": 1, "every": 1, "evaluate": True}
    settings["train"]["epochs"] = 3
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "check.py").write_text(SCRIPT.format(repository=str(repository), folder=str(tmp_path)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, "check.py", "a.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]

    first, second = (json.loads((tmp_path / f"rank{n}.json").read_text()) for n in (0, 1))
    assert first["terms"] == 4 and len(first["plans"]) == 1
    assert second["plans"] == first["plans"]
    assert second["parameters"] == first["parameters"]
    # batch-norm statistics included: each rank evaluates its share of the images
    assert second["kept"] == first["kept"]
    rows = (tmp_path / "run" / "results.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", "1", "2", "3"]
    assert done.stdout.count("cut before epoch 2: ") == 1  # one rank reports
