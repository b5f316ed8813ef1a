import pytest

from distill.pruning.schedule import cubic_left, cuts_at


def test_cuts_end_at_the_end():
    assert cuts_at(2, 6, 1) == [2, 3, 4, 5, 6]
    assert cuts_at(2, 6, 2) == [2, 4, 6]
    assert cuts_at(2, 7, 3) == [2, 5, 7]
    assert cuts_at(4, 4, 1) == [4]


def test_what_is_left_falls_on_a_cubic():
    left = [cubic_left(epoch, 1, 4, 1, 0.2) for epoch in range(6)]
    # four cuts, after which 3/4, 1/2, 1/4 and 0 of the way remain
    assert left == pytest.approx([1.0, 0.2 + 0.8 * 27 / 64, 0.2 + 0.8 / 8, 0.2 + 0.8 / 64, 0.2, 0.2])
    assert cubic_left(5, 5, 5, 1, 0.5) == 0.5
    assert cubic_left(3, 1, 4, 2, 0.2) == pytest.approx(0.2 + 0.8 / 27)  # cuts before 1, 3 and 4
