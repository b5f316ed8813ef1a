"""How much of the student is left, and when."""


def cuts_at(start: int, end: int, every: int) -> list[int]:
    """Epochs before which a cut is made: from start in steps of `every`, and always the end."""
    return sorted({*range(start, end + 1, every), end})


def cubic_left(epoch: int, start: int, end: int, every: int, target: float) -> float:
    """Share left after the cut before `epoch`: 1 before the first cut, `target` after the last, cubic between.

    Zhu & Gupta 2017, arXiv 1710.01878, with time counted in cuts, so that the first one already takes its part.
    """
    epochs = cuts_at(start, end, every)
    done = sum(1 for e in epochs if e <= epoch) / len(epochs)
    return target + (1 - target) * (1 - done) ** 3
