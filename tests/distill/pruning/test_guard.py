import pytest

from distill.pruning.guard import CutGuard


def test_a_step_is_halved_three_times_and_then_left_out():
    guard = CutGuard([2, 5], epochs=9, ap=0.3)
    failed = [{"epoch": 2}]
    assert [guard.step(2, failed * n) for n in range(5)] == [1, 0.5, 0.25, 0.125, 0]
    assert guard.step(5, failed * 4) == 1


@pytest.mark.parametrize(
    ("cut_epoch", "judged_after"),
    [(2, 5), (5, 7), (7, 9), (None, None)],  # its recovery, the next cut, the end
)
def test_a_cut_is_judged_once(cut_epoch, judged_after):
    guard = CutGuard([2, 5, 7], epochs=9, recovery=3, ap=0.3)
    found = [done for done in range(1, 10) if guard.judges(done, cut_epoch)]
    assert found == ([] if judged_after is None else [judged_after])


def test_what_was_halved_is_tried_again_once_it_was_judged():
    guard, halved = CutGuard([2], epochs=9, recovery=3, ap=0.3), [{"epoch": 2}]
    assert [epoch for epoch in range(9) if guard.tries_again(epoch, 2, halved)] == [
        5,
        6,
    ]  # three are left to recover in
    assert not any(guard.tries_again(epoch, 2, []) for epoch in range(9))
    # given up at 5: nothing more until the next planned one
    assert not any(guard.tries_again(epoch, 2, [*halved, {"epoch": 5}]) for epoch in range(9))


def test_floors():
    guard = CutGuard([2], epochs=9, ap=0.3, loss=2.0)
    assert guard.objection(0.3, 2.0) is None
    assert guard.objection(0.299, 1.0) == "AP 0.299 is under the floor of 0.3"
    assert guard.objection(None, 1.0) == "AP 0.000 is under the floor of 0.3"
    assert guard.objection(0.4, 2.5) == "the task's loss, 2.500, is over 2"
    assert guard.objection(0.4, float("nan")) == "the task's loss, nan, is over 2"
    assert CutGuard([2], epochs=9, ap=0.3).objection(0.4, 99.0) is None


def test_all_is_tried_once_nothing_is_planned_and_the_last_cut_is_judged():
    guard = CutGuard([2, 5], epochs=9, recovery=2, ap=0.3)
    assert [done for done in range(1, 10) if guard.is_through(done, 5)] == [7, 8, 9]
    # where the last cut failed for good, or what was planned last was no cut
    assert [done for done in range(1, 10) if guard.is_through(done, 2)] == [6, 7, 8, 9]
    assert not guard.is_through(5, None) and guard.is_through(6, None)
