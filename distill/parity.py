"""How far two runtimes are apart that should give the same."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.report import counted
from students import Detections

_NEAR = 1.0  # pixels; a detection that has none nearer by is no matter of rounding


@dataclass
class Difference:
    """The largest absolute difference of each kind of output; `str` is what a user reads.

    Attributes:
        largest: by name; boxes in pixels.
        unmatched: detections that only one of the two has.
    """

    largest: dict[str, float]
    unmatched: int = 0

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value:.1e}{' px' * (name == 'boxes')}" for name, value in self.largest.items())
        return parts + (f"; {counted(self.unmatched, 'detection')} of one of the two alone" if self.unmatched else "")


def compare_tensors(names: Sequence[str], ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Difference:
    """Output by output; those that differ in a number behind their name, such as a level's stride, count as one."""
    largest: dict[str, float] = {}
    for name, a, b in zip(names, ours, theirs, strict=True):
        kind = name.rstrip("_0123456789")
        largest[kind] = max(largest.get(kind, 0.0), float((a - b).abs().max()))
    return Difference(largest)


def compare_detections(ours: Sequence[Detections], theirs: Sequence[Detections]) -> Difference:
    """Each detection with the nearest of its class, since rounding may swap two of almost equal score."""
    result = Difference({"boxes": 0.0, "scores": 0.0})
    for found, other in zip(ours, theirs, strict=True):
        if not len(found.scores) or not len(other.scores):
            result.unmatched += len(found.scores) + len(other.scores)
            continue
        apart = (found.boxes[:, None] - other.boxes).abs().amax(-1)
        apart[found.labels[:, None] != other.labels] = torch.inf
        distances, partners = apart.min(dim=1)
        near = distances < _NEAR
        result.unmatched += int((~near).sum() + (apart.amin(dim=0) >= _NEAR).sum())
        if near.any():
            scores = (found.scores - other.scores[partners]).abs()[near]
            result.largest["boxes"] = max(result.largest["boxes"], float(distances[near].max()))
            result.largest["scores"] = max(result.largest["scores"], float(scores.max()))
    return result
