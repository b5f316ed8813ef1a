import copy

import pytest
import torch

from distill.combiner import Combiner, WeightSchedule


def losses_of(features, *slopes):
    """Losses whose gradients at a single feature of 4 elements have the lengths 2 * slope."""
    return [slope * features.sum() for slope in slopes]


@pytest.fixture
def features():
    return torch.ones(1, 4, 1, 1, requires_grad=True)


def test_schedules_at_known_epochs():
    assert [WeightSchedule().at(e, 10) for e in (0, 5, 10)] == [1, 1, 1]
    assert [WeightSchedule("linear", final=0.2).at(e, 10) for e in (0, 5, 10)] == pytest.approx([1, 0.6, 0.2])
    # (1 + cos(pi/3)) / 2 = 0.75 a third of the way, and 0.1 + 0.9 * 0.75
    assert [WeightSchedule("cosine", final=0.1).at(e, 9) for e in (0, 3, 9)] == pytest.approx([1, 0.775, 0.1])
    assert [WeightSchedule(warmup_epochs=2).at(e, 10) for e in (0, 0.5, 2, 9)] == pytest.approx([0, 0.25, 1, 1])
    assert [WeightSchedule(stop_epoch=3).at(e, 10) for e in (0, 2.9, 3, 9)] == [1, 1, 0, 0]
    # a ramp of one epoch on top of a line from 1 to 0 over four epochs: half of 0.875
    assert WeightSchedule("linear", warmup_epochs=1).at(0.5, 4) == pytest.approx(0.4375)


def test_the_most_that_is_still_to_come():
    assert WeightSchedule().peak(0, 10) == 1
    assert WeightSchedule(warmup_epochs=4).peak(0, 10) == 1
    assert WeightSchedule(warmup_epochs=40).peak(0, 10) == pytest.approx(0.25)  # where the run ends, 10 of 40
    assert WeightSchedule("linear").peak(4, 10) == pytest.approx(0.6)  # it only falls from here
    # e / 8 * (1 - e / 10) is largest at e = 5
    assert WeightSchedule("linear", warmup_epochs=8).peak(0, 10) == pytest.approx(0.3125, abs=1e-3)
    assert WeightSchedule(warmup_epochs=4, stop_epoch=2).peak(0, 10) == pytest.approx(0.495)  # a hundredth before it
    assert [WeightSchedule(stop_epoch=3).peak(e, 10) for e in (2.5, 3, 7)] == [1, 0, 0]


def test_a_judge_sees_what_a_warm_up_or_a_guard_hides():
    schedules = {"a": WeightSchedule(warmup_epochs=2), "b": WeightSchedule(stop_epoch=1), "c": WeightSchedule()}
    combiner = Combiner({"a": 4.0, "b": 4.0, "c": 0.0, "d": 4.0, "e": 4.0}, schedules, epochs=10)
    combiner.silent, combiner.left_out = frozenset("d"), frozenset("e")
    names = "abcde"
    assert [combiner.weight(name) for name in names] == [0, 4, 0, 0, 0]
    with combiner.at_most():
        assert [combiner.weight(name) for name in names] == [4, 4, 0, 0, 4]
        combiner.epoch = 5
        assert [combiner.weight(name) for name in names] == [4, 0, 0, 0, 4]
    assert [combiner.weight(name) for name in names] == [4, 0, 0, 0, 0]


def test_a_schedule_scales_the_weight(features):
    combiner = Combiner({"a": 4.0}, {"a": WeightSchedule("linear")}, epochs=10)
    combiner.epoch = 7.5
    task, a = losses_of(features, 1.0, 1.0)
    total, parts = combiner(task, {"a": a}, (features,))
    assert parts["task"].item() == 4 and parts["a"].item() == pytest.approx(4.0)  # 4 * 0.25 of a loss of 4
    assert total.item() == pytest.approx(8.0)


def test_balanced_terms_pull_with_their_share_of_the_tasks_gradient(features):
    combiner = Combiner({"a": 0.5, "b": 2.0}, balance="gradient")
    task, a, b = losses_of(features, 3.0, 1e6, 1e-6)
    total, parts = combiner(task, {"a": a, "b": b}, (features,))
    for name, share in (("a", 0.5), ("b", 2.0)):
        assert parts[name].item() == pytest.approx(share * parts["task"].item(), rel=1e-5)
    total.backward()
    # 3 + 0.5 * 3 + 2 * 3 in each element
    torch.testing.assert_close(features.grad, torch.full_like(features, 10.5))


def test_the_norm_runs_over_all_levels():
    fine, coarse = torch.ones(1, 1, 2, 2, requires_grad=True), torch.ones(1, 1, 1, 1, requires_grad=True)
    combiner = Combiner({"a": 1.0}, balance="gradient")
    # task: gradient 1 in five elements, norm sqrt(5); the term sees the coarse level alone, norm 2
    combiner(fine.sum() + coarse.sum(), {"a": 2 * coarse.sum()}, (fine, coarse))
    torch.testing.assert_close(combiner.gradient_norms, torch.tensor([5**0.5, 2.0]))


def test_norms_are_geometric_averages_and_rest_between_measurements(features):
    combiner = Combiner({"a": 1.0}, balance="gradient")
    for step, slope in ((0, 1.0), (1, 4.0), (15, 9.0), (20, 0.5)):
        combiner.step = step
        combiner(*(losses_of(features, slope)), {"a": features.sum()}, (features,))
    # lengths 2, 8 and 1; step 15 is not measured: sqrt(sqrt(2 * 8) * 1)
    torch.testing.assert_close(combiner.gradient_norms, torch.tensor([2.0, 2.0]))


def test_shares_hold_while_gradients_change(features):
    combiner = Combiner({"a": 0.5}, balance="gradient")
    shares = []
    for step in range(200):  # a loss grows tenfold against the task in 100 steps, then stays
        combiner.step = step
        slope = 10 ** min(1.0, step / 100)
        task, a = losses_of(features, 1.0, slope)
        _, parts = combiner(task, {"a": a}, (features,))
        shares.append(parts["a"].item() / parts["task"].item())
    # the lag is at most 20 steps and what else comes before the next measurement: 10 ** (0.3) = 2
    assert all(0.4 < share < 1.0 for share in shares[:110])
    assert shares[150:] == pytest.approx([0.5] * 50, rel=0.05)


def test_nothing_is_measured_in_eval_mode(features):
    combiner = Combiner({"a": 1.0}, balance="gradient").eval()
    combiner(features.sum(), {"a": features.sum()}, (features,))
    assert combiner.gradient_norms.tolist() == [0, 0]


def test_a_term_without_gradient_counts_nothing_until_it_has_one(features):
    combiner = Combiner({"a": 1.0}, balance="gradient")
    task, a = losses_of(features, 1.0, 1.0)
    total, parts = combiner(task, {"a": 0.0 * a}, (features,))
    assert total == task and parts["a"] == 0 and torch.isfinite(total)
    total, parts = combiner(task, {"a": torch.tensor(5.0)}, (features,))  # no graph at all
    assert parts["a"] == 0
    total, parts = combiner(task, {"a": a}, (features,))
    assert parts["a"].item() == pytest.approx(4.0)


def test_averages_travel_with_the_state(features):
    combiner = Combiner({"a": 1.0}, balance="gradient")
    combiner(features.sum(), {"a": 3 * features.sum()}, (features,))
    other = Combiner({"a": 1.0}, balance="gradient")
    other.load_state_dict(copy.deepcopy(combiner.state_dict()))
    assert torch.equal(other.gradient_norms, combiner.gradient_norms) and other.gradient_norms[1] == 6


def test_half_precision_features_are_measured_without_underflow():
    features = torch.ones(1, 4, 1, 1, dtype=torch.float16, requires_grad=True)
    combiner = Combiner({"a": 1.0}, balance="gradient")
    combiner(features.float().sum() * 1e-7, {"a": features.float().sum() * 2e-7}, (features,))
    ratio = combiner.gradient_norms[1] / combiner.gradient_norms[0]
    assert ratio.item() == pytest.approx(2.0, rel=0.01)
