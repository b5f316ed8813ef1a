"""The recipes run as their comments say: each command that a config gives for 2 CPU cores, on real photographs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distill.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]


def commands_of(config):
    """What a shell is told to run: the indented lines after the words above, or nothing."""
    text = config.read_text()
    comment = text[: text.index("output_dir:")]
    *_, after = comment.partition("see it run on 2 CPU cores")
    return "".join(f"{line}\n" for line in re.findall(r"^#   (.*)$", after, flags=re.MULTILINE))


RECIPES = {
    config.stem: commands for config in sorted((ROOT / "configs").glob("*.yaml")) if (commands := commands_of(config))
}


def test_every_recipe_that_cannot_be_run_in_minutes_says_how_to_see_it():
    assert set(RECIPES) == {
        "assistant", "faster_rcnn_fgd", "progressive", "recover_after_pruning", "retinanet_to_mobilenet",
        "yolov4_layers_then_channels", "yolov5_slimming", "yolov7_response", "yolov7_taylor",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_as_it_says(recipe, tmp_path, shared_data):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    python = 'python() { shift; "$PYTHON" "$TRAIN" "$@" data.root="$BCCD"; }\n'
    names = {"PYTHON": sys.executable, "TRAIN": str(ROOT / "train.py"), "BCCD": str(shared_data / "bccd")}
    script = f"set -e\n{python}{RECIPES[recipe]}"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=os.environ | names, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = [RunFolder(folder) for folder in sorted((tmp_path / "runs").iterdir())]
    assert runs and all(run.is_finished and run.report_file.is_file() for run in runs)
    if recipe == "yolov5_slimming":  # what its comment says should be seen
        shares = [row["small_scales"] for row in runs[0].read_results()]
        assert max(shares) > 0.1
