"""Whether a student got over a cut, and what happens if not: back to before it, and half as much."""

from collections.abc import Mapping, Sequence
from typing import Any

MOST = 3  # times that one cut is halved; what fails at an eighth is left out


class CutGuard:
    """Judges each cut after its recovery.

    Where it fails, training goes back to the state before the cut, which then takes half of what it would have taken.
    Where a smaller one holds, the rest is tried as soon as it has been judged, if there are epochs left to recover in.

    Args:
        planned: epochs before which channels, blocks or weights are to go, counted from 0.
        epochs: of the whole run.
        recovery: epochs after a cut, until it is judged; what is planned next or the end may come sooner.
        ap: least on the val split; None: it does not matter.
        loss: most that the task's loss may be, its mean over an epoch's training; None: it does not matter.
    """

    def __init__(
        self,
        planned: Sequence[int],
        epochs: int,
        recovery: int = 2,
        ap: float | None = None,
        loss: float | None = None,
    ):
        self.planned, self.epochs, self.recovery = tuple(planned), epochs, recovery
        self.ap, self.loss = ap, loss

    def step(self, epoch: int, retreats: Sequence[Mapping[str, Any]]) -> float:
        """Share of what is due that a cut before an epoch takes: 0 once it failed too often.

        Args:
            epoch: counted from 0.
            retreats: all so far; each has the `epoch` of the cut that failed.
        """
        failed = sum(retreat["epoch"] == epoch for retreat in retreats)
        return 0.5**failed if failed <= MOST else 0.0

    def tries_again(self, epoch: int, cut_epoch: int | None, retreats: Sequence[Mapping[str, Any]]) -> bool:
        """Whether what the last cut left out when it was halved may be cut before this epoch."""
        halved = bool(retreats) and retreats[-1]["epoch"] == cut_epoch
        return halved and epoch >= cut_epoch + self.recovery and epoch + self.recovery <= self.epochs

    def judges(self, done: int, cut_epoch: int | None) -> bool:
        """Whether the last cut, made before the epoch `cut_epoch`, is judged when `done` epochs are done."""
        return cut_epoch is not None and done == self._verdict(cut_epoch)

    def is_through(self, done: int, cut_epoch: int | None) -> bool:
        """Whether all that is planned has been tried by then, and the last cut has been judged."""
        return done > max(self.planned) and (cut_epoch is None or done >= self._verdict(cut_epoch))

    def objection(self, ap: float | None, loss: float) -> str | None:
        """What speaks against a student; None where it may stay."""
        if self.ap is not None and (ap or 0.0) < self.ap:
            return f"AP {ap or 0.0:.3f} is under the floor of {self.ap:g}"
        if self.loss is not None and not loss <= self.loss:
            return f"the task's loss, {loss:.3f}, is over {self.loss:g}"
        return None

    def _verdict(self, cut_epoch: int) -> int:
        following = min((epoch for epoch in self.planned if epoch > cut_epoch), default=self.epochs)
        return min(cut_epoch + self.recovery, following, self.epochs)
