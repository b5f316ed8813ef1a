"""Brings the task's loss and the knowledge terms into one sum: weights, their schedules, and gradient balance."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from losses import average_across_ranks

GRADIENT = "gradient"  # what is named where no loss is to blame


@dataclass(frozen=True)
class WeightSchedule:
    """How the weight of a knowledge term goes over a run.

    Attributes:
        shape: `constant`, or `linear` or `cosine` from 1 to `final` over the whole run.
        final: share of the weight that is left at the end of `linear` and `cosine`.
        warmup_epochs: epochs of a linear ramp from 0 at the start, on top of the shape.
        stop_epoch: the term counts nothing from this epoch on, counted from 0; None: it counts to the end.
    """

    shape: str = "constant"
    final: float = 0.0
    warmup_epochs: float = 0.0
    stop_epoch: int | None = None

    def at(self, epoch: float, epochs: int) -> float:
        """The share of the weight that counts after `epoch` of `epochs`; whole and fractional epochs alike."""
        if self.stop_epoch is not None and epoch >= self.stop_epoch:
            return 0.0
        progress = min(1.0, epoch / epochs)
        left = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[self.shape]
        ramp = min(1.0, epoch / self.warmup_epochs) if self.warmup_epochs else 1.0
        return ramp * (self.final + (1 - self.final) * left)

    def peak(self, epoch: float, epochs: int) -> float:
        """The largest share that counts from `epoch` on, looked for at a hundred moments of the time that is left."""
        end = epochs if self.stop_epoch is None else min(epochs, self.stop_epoch)
        left = max(0.0, end - epoch)
        return max(self.at(epoch + left * i / 100, epochs) for i in range(101))


class Combiner(nn.Module):
    """The sum of the task's loss and the weighted knowledge terms.

    With `balance="gradient"`, a weight is not a factor but a share: every term is scaled so that its gradient at the
    student's pyramid is that share of the task's, in the L2 norm over all levels. Losses whose sizes lie a million
    times apart then need no constants of their own, and a term cannot drown the task as the task's loss falls.
    (GradNorm, arXiv 1711.02257, likewise compares gradient norms at shared layers, but learns the weights towards equal
    training rates.) Norms are measured at each of the first steps and at every tenth one after, as each measurement
    costs one more pass back through the head. What counts is the geometric mean of the new ones and of what counted
    before: some twenty steps behind, so that shares hold while a rate warms up, where gradients change several times
    over within a hundred steps, and still no single batch decides. Ranks join their norms into those of all images
    together, so that all use the same factors, which are those of one process.

    Args:
        weights: by term.
        schedules: by term; a constant one where left out.
        epochs: length of the run that the schedules refer to.
        balance: `none` or `gradient`.

    Attributes:
        step: steps done in the whole run; the loop sets it before every step.
        epoch: the same in epochs, with a fraction.
        silent: terms that count nothing, whatever their weight, as their teacher is not there yet.
        left_out: terms that count nothing until a guard has looked at them again.
    """

    EAGER, EVERY = 10, 10  # steps measured at the start, steps between

    def __init__(
        self,
        weights: dict[str, float],
        schedules: dict[str, WeightSchedule] | None = None,
        epochs: int = 1,
        balance: str = "none",
    ):
        super().__init__()
        self.weights = dict(weights)
        self.schedules = {name: (schedules or {}).get(name, WeightSchedule()) for name in weights}
        self.epochs = epochs
        self.balance = balance
        self.step, self.epoch = 0, 0.0
        self.silent: frozenset[str] = frozenset()
        self.left_out: frozenset[str] = frozenset()
        self._ahead = False
        self._bad: Tensor | None = None
        self._bad_step: Tensor | None = None
        if balance == "gradient":
            # the task's first; a buffer, so that a resumed run goes on with the same averages
            self.register_buffer("gradient_norms", torch.zeros(1 + len(weights)))

    def weight(self, name: str) -> float:
        """The weight, or share, of a term at the present epoch."""
        schedule = self.schedules[name]
        if name in self.silent or (name in self.left_out and not self._ahead):
            return 0.0
        return self.weights[name] * (schedule.peak if self._ahead else schedule.at)(self.epoch, self.epochs)

    @contextmanager
    def at_most(self) -> Iterator[None]:
        """Within, terms weigh the most that they will from the present epoch on, those that are left out too: whoever
        judges them is not to be misled by a warm-up."""
        self._ahead = True
        try:
            yield
        finally:
            self._ahead = False

    def forward(
        self, task: Tensor, terms: dict[str, Tensor], features: tuple[Tensor, ...]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise, and every part of it as it enters the sum, detached.

        Args:
            task: the student's own loss, a scalar.
            terms: unweighted knowledge losses, by name; all the names of `weights`, in their order.
            features: the student's pyramid, which all of them were computed from.
        """
        weighted = {name: self.weight(name) * value for name, value in terms.items()}
        no_numbers = torch.zeros(2 + len(terms), dtype=torch.bool, device=task.device)
        if self.balance == "gradient" and terms:
            if self.training and (self.step < self.EAGER or self.step % self.EVERY == 0):
                no_numbers[:-1] = self._measure([task, *terms.values()], features)
            task_norm, *norms = self.gradient_norms.unbind()
            # a term that has shown no gradient yet has nothing to be scaled by
            factors = [torch.where(norm > 0, task_norm / norm, 0.0) for norm in norms]
            weighted = {name: factor * value for factor, (name, value) in zip(factors, weighted.items())}
        total = sum(weighted.values(), task)
        parts = {name: value.detach() for name, value in {"task": task, **weighted}.items()}
        no_numbers[:-1] |= ~torch.isfinite(torch.stack(list(parts.values())))
        self._remember(no_numbers)
        return total, parts

    def see_gradient(self, norm: Tensor) -> None:
        """Looks at the norm of a step's whole gradient, which may be no number where every loss is one."""
        no_numbers = torch.zeros(2 + len(self.weights), dtype=torch.bool, device=norm.device)
        no_numbers[-1] = ~torch.isfinite(norm)
        self._remember(no_numbers)

    def _remember(self, bad: Tensor) -> None:
        """Keeps what was no number, if it is the first time since it was last asked about."""
        if self._bad is None:
            self._bad, self._bad_step = bad, torch.full((), self.step, device=bad.device)
            return
        known = self._bad.any()
        self._bad, self._bad_step = (
            torch.where(known, self._bad, bad),
            torch.where(known, self._bad_step, self.step),
        )

    def bad_losses(self) -> tuple[int, list[str]]:
        """The first step in which something was no number, and what: `task`, terms, or, where none of these was to
        blame, `GRADIENT`; once asked, all is forgotten.

        A term is also to blame for its own gradient, where that was measured. A NaN spreads to everything within a
        step, so only the first step tells where it came from. It is kept on the device, and a GPU is made to wait only
        when someone asks.
        """
        bad, self._bad = self._bad, None
        if bad is None:
            return self.step, []
        names = ["task", *self.weights, GRADIENT]
        return int(self._bad_step), [name for name, flag in zip(names, bad.tolist()) if flag]

    def share(self, name: str, task_norm: float, norm: float) -> float:
        """How long a term's gradient is, as weighted at present, against the task's of length `task_norm`."""
        return self.weight(name) * (1.0 if self.balance == "gradient" else norm / task_norm)

    def _measure(self, losses: list[Tensor], features: tuple[Tensor, ...]) -> Tensor:
        """Brings the averages forward by the gradients of one batch; (L,) which of these were no numbers."""
        # Squares add up over images, and so over ranks. That each rank's gradients count one over the number of ranks
        # makes all norms smaller alike, and only their ratios are used.
        new = average_across_ranks(gradient_norms(losses, features).square()).sqrt()
        old = self.gradient_norms
        # where nothing was seen before there is nothing to average with; where nothing is seen now, the old one stays
        average = torch.where(old > 0, old.sqrt() * new.sqrt(), new)
        self.gradient_norms.copy_(torch.where((new > 0) & new.isfinite(), average, old))
        return ~new.isfinite()


def gradient_norms(losses: list[Tensor], features: tuple[Tensor, ...]) -> Tensor:
    """(L,) the L2 norm, over all levels together, of each loss's gradient at the features; the graph stays."""
    # float16 gradients would underflow unscaled
    scale = 2.0**12 if any(feature.dtype is torch.float16 for feature in features) else 1.0
    norms = []
    for loss in losses:
        gradients = [None] * len(features)
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss * scale, features, retain_graph=True, allow_unused=True)
        squares = [(gradient.float() / scale).square().sum() for gradient in gradients if gradient is not None]
        norms.append(sum(squares, losses[0].new_zeros(())).sqrt())
    return torch.stack(norms)
