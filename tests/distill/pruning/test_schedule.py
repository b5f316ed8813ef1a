import pytest

from distill.pruning.schedule import cuts_at, share_left


def test_cuts_end_at_the_end():
    assert cuts_at(2, 6, 1) == [2, 3, 4, 5, 6]
    assert cuts_at(2, 6, 2) == [2, 4, 6]
    assert cuts_at(2, 7, 3) == [2, 5, 7]
    assert cuts_at(4, 4, 1) == [4]


@pytest.mark.parametrize(
    ("shape", "left"),
    [
        # four cuts, after which 3/4, 1/2, 1/4 and 0 of the way remain
        ("cubic", [1.0, 0.2 + 0.8 * 27 / 64, 0.2 + 0.8 / 8, 0.2 + 0.8 / 64, 0.2]),
        ("linear", [1.0, 0.8, 0.6, 0.4, 0.2]),
        ("exponential", [1.0, 0.2**0.25, 0.2**0.5, 0.2**0.75, 0.2]),
        ("constant", [1.0, 0.2, 0.2, 0.2, 0.2]),
    ],
)
def test_what_is_left_after_each_of_four_cuts(shape, left):
    assert [share_left(shape, cuts / 4, 0.2) for cuts in range(5)] == pytest.approx(left)


def test_an_unknown_shape_is_refused():
    with pytest.raises(
        ValueError, match="schedule: 'square' is not known; choose cubic, linear, exponential, constant or "
    ):
        share_left("square", 0.5, 0.2)


def test_the_asymptotic_curve_goes_through_its_three_points():
    # of the 0.8 that go: nothing, three quarters at an eighth of the time, all
    assert [share_left("asymptotic", done, 0.2) for done in (0, 1 / 8, 1)] == pytest.approx([1, 0.4, 0.2], abs=1e-4)
