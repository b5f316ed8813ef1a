"""Long comparisons as arms on disk: each is a run of train.py, made once, gone on with after an interruption."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.stats import t

from distill.config import check_config, load_config, trains_alike
from distill.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]


def run_arm(folder: Path, config: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The summary of a run; it is trained first if it has none, from its last checkpoint if there is one.

    Raises:
        SystemExit: train.py failed, and has said why; or the folder is of a run with other settings.
    """
    summary, kept = folder / "summary.json", RunFolder(folder)
    if kept.config_file.is_file():
        asked = load_config(ROOT / config, [f"output_dir={folder}", *overrides])
        if not trains_alike(check_config(kept.config, str(kept.config_file)), asked):
            sys.exit(f"{folder} is of a run with other settings; remove it, or name another --output")
    if not summary.is_file():
        resumes = any((folder / "checkpoints").glob("epoch_*.pt"))
        start = [config, f"output_dir={folder}", "overwrite=true", *overrides]
        print(f"{folder}: {'goes on' if resumes else 'is trained'}", flush=True)
        command = [sys.executable, str(ROOT / "train.py"), *(["--resume", str(folder)] if resumes else start)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            sys.exit(f"{folder}: train.py ended with status {done.returncode}; see {folder / 'train.log'}")
    return json.loads(summary.read_text())


def setting(key: str, value: Any) -> str:
    """An override of train.py that gives a whole section."""
    return f"{key}={json.dumps(value)}"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval (Student's t); NaN for a single value."""
    if len(values) < 2:
        return mean(values), float("nan")
    return mean(values), float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def points(values: Sequence[float]) -> str:
    """Mean, and its 95% interval where there are several values, of AP in points."""
    middle, half = interval(values)
    return f"{100 * middle:.1f}" + (f" +- {100 * half:.1f}" if len(values) > 1 else "")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, the first column left, the others right."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def replace_section(text: str, title: str, body: str) -> str:
    """A Markdown page whose section of that title (`## title`) has another body; it comes last where there was none."""
    before, found, rest = text.partition(f"\n## {title}\n")
    _, following, after = rest.partition("\n## ") if found else ("", "", "")
    return f"{before.rstrip()}\n\n## {title}\n\n{body.strip()}\n{following}{after}"
