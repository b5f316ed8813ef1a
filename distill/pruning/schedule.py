"""How much of the student is left, and when."""

import math

# of the curve that takes three quarters of all in the first eighth of the time
ASYMPTOTIC_RATE = 11.09


def cuts_at(start: int, end: int, every: int) -> list[int]:
    """Epochs before which a cut is made: from start in steps of `every`, and always the end."""
    return sorted({*range(start, end + 1, every), end})


def share_left(shape: str, done: float, target: float) -> float:
    """Share of the budget left once a share `done` of all cuts is made: 1 before the first, `target` after the last.

    Args:
        shape: `cubic` takes most at first (Zhu & Gupta 2017, arXiv 1710.01878), `linear` always the same share of the
            uncut, `exponential` always the same share of what is left, `constant` all at once and `asymptotic` nearly
            so: a e^(-k done) + b through 0, three quarters at an eighth of the time, and all at its end (ASFP, He 2019,
            arXiv 1808.07471).
        done: in [0, 1]; time is counted in cuts, so that the first one already takes its part.
        target: what is left in the end.
    """
    match shape:
        case "cubic":
            return target + (1 - target) * (1 - done) ** 3
        case "linear":
            return 1 - (1 - target) * done
        case "exponential":
            return target**done
        case "constant":
            return target if done > 0 else 1.0
        case "asymptotic":
            return 1 - (1 - target) * math.expm1(-ASYMPTOTIC_RATE * done) / math.expm1(-ASYMPTOTIC_RATE)
    raise ValueError(f"schedule: {shape!r} is not known; choose cubic, linear, exponential, constant or asymptotic")
