"""Single weights, or whole kernels, that are held at 0: unstructured pruning, by masks."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distill.data import Batch
from distill.distiller import Distiller
from distill.pruning.saliency import measure_saliency, trained_loss
from distill.pruning.schedule import share_left
from students import Detector
from teachers import Teacher


class Masks:
    """Holds the weights that matter least at 0, ever more of them between epochs.

    A weight that is 0 is held, and nothing else is kept of a mask: so masks are cut, averaged, saved and resumed along
    with the weights. What is held gets gradients, which count where they are clipped, and the optimizer's state; only
    it is put back to 0 after each step. The layers that predict stay whole, as do norms, biases and adapters.

    Args:
        kind: `weights`, each by itself; `kernels`, the whole of what one channel gives to another in a convolution
            larger than 1x1; or such as `2:4`, which keeps 2 of each 4 neighbours among the inputs of a layer.
        epochs: before which weights are chosen, counted from 0.
        sparsity: share of these layers' weights, or kernels, that is 0 in the end; None where `kind` says it.
        importance: `magnitude`, absolute values, of a kernel their mean; or `gradient`, (w dL/dw)^2 (Molchanov 2019,
            arXiv 1906.10771), of the loss that is trained.
        ranking: `uniform` takes the same share of every layer, `global` the least wherever it is.
        schedule: how much each choice takes, see `distill.pruning.schedule.share_left`.
        keep: patterns, such as `backbone.body.layer1.*`, of layers that are left whole.
        indivisible: `error` refuses layers whose inputs N:M does not divide, `skip` leaves them whole.
    """

    def __init__(
        self,
        kind: str,
        epochs: Sequence[int],
        sparsity: float | None = None,
        importance: str = "magnitude",
        ranking: str = "uniform",
        schedule: str = "cubic",
        keep: Sequence[str] = (),
        indivisible: str = "error",
    ):
        self.kind, self.epochs, self.sparsity = kind, sorted(set(epochs)), sparsity
        self.importance, self.ranking, self.schedule = importance, ranking, schedule
        self.keep, self.indivisible = tuple(keep), indivisible
        pattern = re.fullmatch(r"(\d+):(\d+)", kind)
        self.pattern = (int(pattern[1]), int(pattern[2])) if pattern else None
        self._held: list[tuple[Tensor, Tensor]] = []  # weights, and where they are 0

    def check(self, student: Detector) -> None:
        """Looks at the uncut student.

        Raises:
            ValueError: a pattern matches no layer, N:M does not divide a layer, or nothing is left to choose from; the
                message begins with its key.
        """
        names = list(_layers(student))
        for pattern in self.keep:
            if not any(fnmatchcase(name, pattern) for name in names):
                near = difflib.get_close_matches(pattern, names, 1, cutoff=0.0)
                raise ValueError(f"keep: {pattern!r} matches none of the {len(names)} layers, such as {near[0]}")
        layers = {name: x for name, x in _layers(student).items() if not self._stays(name)}
        odd = [name for name, layer in layers.items() if not self._divides(layer)]
        if odd and self.indivisible == "error":
            wide = layers[odd[0]].weight.shape[1]
            raise ValueError(
                f"kind: {self.kind} goes by {self.pattern[1]} inputs at a time, and {odd[0]} has {wide} ({len(odd)} of "
                f"{len(layers)} layers do not divide); leave them whole with indivisible: skip, or name them in keep"
            )
        if not layers:
            raise ValueError("keep: its patterns hold every layer that could be masked; leave some of them out")
        if not self._chosen(student):
            raise ValueError(f"kind: {student.title} has no layer for {self.kind}; choose weights")

    def due(self, epoch: int) -> float:
        """Share of the weights in question that is 0 from an epoch on."""
        if self.pattern:
            return 1 - self.pattern[0] / self.pattern[1]
        done = sum(1 for choice in self.epochs if choice <= epoch) / len(self.epochs)
        return 1 - share_left(self.schedule, done, 1 - self.sparsity)

    def choose(
        self, unit: Distiller, epoch: int, teachers: Mapping[str, Teacher], batches: Iterable[Batch]
    ) -> dict[str, Tensor]:
        """What is 0 from an epoch on: for each parameter of the student that is masked, by name, bools of its shape.

        Args:
            unit: the student with its terms, as it is now.
            epoch: counted from 0.
            teachers: those of its terms, by name.
            batches: of training images; every rank must be given the same ones. None is drawn for `magnitude`.
        """
        weights = self._chosen(unit.student)
        if self.importance == "gradient":
            measured = measure_saliency(unit, (), batches, lambda batch: trained_loss(unit, teachers, batch))
            scores = {name: measured[f"student.{name}"] for name in weights}
        else:
            scores = {name: weight.detach().float().abs() for name, weight in weights.items()}
        # what is 0 already is worth less than anything else, and stays so, however much it is
        zeros = {name: weight.detach() == 0 for name, weight in weights.items()}
        scores = {name: score.masked_fill(zeros[name], -1.0) for name, score in scores.items()}
        if self.pattern:
            return {name: _least_of_each(score, *self.pattern) | zeros[name] for name, score in scores.items()}
        if self.kind == "kernels":
            scores = {name: score.mean(dim=(2, 3), keepdim=True) for name, score in scores.items()}
        if self.ranking == "global":
            joined = torch.cat([score.flatten() for score in scores.values()])
            sizes = [score.numel() for score in scores.values()]
            gone = dict(zip(scores, _least(joined, self.due(epoch)).split(sizes)))
        else:
            gone = {name: _least(score.flatten(), self.due(epoch)) for name, score in scores.items()}
        return {name: gone[name].view_as(scores[name]) | zeros[name] for name in weights}

    def follow(self, student: Detector, epoch: int) -> None:
        """Looks where the student is 0, at the start of an epoch or in its middle; nothing is held before `epochs`."""
        weights = self._chosen(student).values() if epoch >= self.epochs[0] else ()
        self._held = [(weight, weight.detach() == 0) for weight in weights]

    @torch.no_grad()
    def hold(self) -> None:
        """Puts back to 0 what an optimizer has moved."""
        for weight, mask in self._held:
            weight.masked_fill_(mask, 0.0)

    def _chosen(self, student: Detector) -> dict[str, nn.Parameter]:
        """The weights that masks go over, by name."""
        layers = {name: layer for name, layer in _layers(student).items() if not self._stays(name)}
        return {
            f"{name}.weight": layer.weight
            for name, layer in layers.items()
            if layer.weight.requires_grad
            and self._divides(layer)
            and (self.kind != "kernels" or (layer.weight.dim() == 4 and layer.weight[0, 0].numel() > 1))
        }

    def _divides(self, layer: nn.Module) -> bool:
        return not self.pattern or layer.weight.shape[1] % self.pattern[1] == 0

    def _stays(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.keep)


@torch.no_grad()
def set_to_zero(masks: Mapping[str, Tensor], detectors: Iterable[Detector]) -> None:
    """Sets weights to 0 where masks are true, in a student and in its averaged copy."""
    for detector in detectors:
        for name, mask in masks.items():
            detector.get_parameter(name).masked_fill_(mask, 0.0)


def agree_on(accelerator: Accelerator, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """The main process's masks, on every process."""
    if accelerator.num_processes > 1:
        masks = {name: mask.to(torch.uint8).contiguous() for name, mask in masks.items()}
        for mask in masks.values():
            torch.distributed.broadcast(mask, src=0)
    return {name: mask.bool() for name, mask in masks.items()}


def _layers(student: Detector) -> dict[str, nn.Module]:
    """Convolutions and linear layers, but those whose outputs mean something by their place."""
    outputs = set(student.output_layers)
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    return {name: m for name, m in student.named_modules() if isinstance(m, kinds) and m not in outputs}


def _least(scores: Tensor, share: float) -> Tensor:
    """(N,) true for the lowest share of the scores."""
    gone = torch.zeros_like(scores, dtype=torch.bool)
    gone[scores.argsort(stable=True)[: round(share * len(scores))]] = True
    return gone


def _least_of_each(scores: Tensor, kept: int, of: int) -> Tensor:
    """True for all but the `kept` highest of each `of` neighbours along the second dimension."""
    sets = scores.transpose(1, -1).unflatten(-1, (-1, of))
    order = sets.argsort(dim=-1, descending=True, stable=True)
    gone = torch.zeros_like(sets, dtype=torch.bool).scatter(-1, order[..., kept:], True)
    return gone.flatten(-2).transpose(1, -1)
