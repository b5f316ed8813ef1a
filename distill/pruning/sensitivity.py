"""How much harm it does to cut each group alone, by ever larger shares; as a table on disk."""

import copy
import csv
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from distill.distiller import Distiller
from distill.errors import UserError
from distill.pruning.budget import make_plan
from distill.pruning.graph import ChannelGroup
from distill.pruning.limits import layers_of
from distill.pruning.ranking import Curve
from students import Detector
from students.plan import apply_plan, named_tensors


class Sensitivity(NamedTuple):
    """What one cut of one group did.

    Attributes:
        layer: the first, by name, of the student's layers whose width was cut.
        width: channels that the group had.
        cut: share of them that went.
        harm: by how much the student became worse; the unit is that of the measurement.
    """

    layer: str
    width: int
    cut: float
    harm: float


def scan(
    unit: Distiller,
    groups: Sequence[ChannelGroup],
    scores: Sequence[Tensor],
    harm: Callable[[Detector], float],
    shares: Sequence[float],
) -> Iterator[Sensitivity]:
    """Cuts a copy of the student in each group alone, and asks what harm that did; neither trained nor measured anew.

    Args:
        unit: the student, which stays as it is.
        groups: its groups.
        scores: (width,) for each group; the lowest go first.
        harm: how much worse a student is than the uncut one.
        shares: of a group's width that go, ascending; the nearest number of channels does, and at least one stays.
    """
    tensors = named_tensors(unit)
    for group, score in zip(groups, scores):
        counts = sorted({max(1, round((1 - share) * group.width)) for share in shares}, reverse=True)
        for count in counts:
            if count == group.width:
                continue
            trial = copy.deepcopy(unit.student)
            apply_plan([(trial, make_plan([group], [score], [count], tensors).below("student."))])
            yield Sensitivity(layers_of(group)[0], group.width, 1 - count / group.width, harm(trial))


def write_sensitivities(path: Path, rows: Iterable[Sensitivity]) -> None:
    """A CSV with a column for each field."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Sensitivity._fields)
        writer.writerows((row.layer, row.width, f"{row.cut:.6g}", f"{row.harm:.6g}") for row in rows)


def read_curves(path: str | Path) -> dict[str, Curve]:
    """The curve of each group, by the layer that stands for it, from a file of `write_sensitivities`.

    Raises:
        UserError: no such file, or one with other columns or values.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"pruning.sensitivity: no file {path}; make it with python -m distill.sensitivity")
    points: dict[tuple[str, int], list[tuple[float, float]]] = {}
    with path.open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                width, cut, harm = int(row["width"]), float(row["cut"]), float(row["harm"])
                if not (0 < cut < 1 and math.isfinite(harm)):
                    raise ValueError
                points.setdefault((row["layer"], width), []).append((cut, harm))
            except (KeyError, TypeError, ValueError):  # noqa: PERF203, the line is named
                raise UserError(
                    f"pruning.sensitivity: {path}, line {number}, needs a layer, its width, a cut between 0 and 1 "
                    "and a harm; make the file anew with python -m distill.sensitivity"
                ) from None
    return {layer: Curve(width, *zip(*sorted(curve))) for (layer, width), curve in points.items()}
