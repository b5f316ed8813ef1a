import time

import pytest
import torch
from torch import nn

from distill.measure import count_macs, count_parameters, eval_mode, measure_cuts, measure_latency, time_in_turns
from students.artifact import cut
from students.plan import Cut, Plan


def test_parameters_count_once_and_frozen_ones_too():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, second, nn.BatchNorm1d(4))
    first.weight.requires_grad_(False)
    assert count_parameters(model) == 16 + 4 + 8  # the shared weight, a bias, scale and shift; no running statistics


@pytest.mark.parametrize(
    ("model", "macs"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), 8 * 3 * 9 * 10 * 20),  # every weight at each of 10 x 20 locations; no bias
        (nn.Conv2d(3, 8, 3, padding=1, stride=2), 8 * 3 * 9 * 5 * 10),
        (nn.Conv2d(3, 6, 3, padding=1, groups=3), 6 * 1 * 9 * 10 * 20),  # depthwise: each output sees one input channel
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 10 * 20, 7)), 600 * 7),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2)), 0),
    ],
    ids=["conv", "strided conv", "depthwise conv", "linear", "nothing multiplied"],
)
def test_macs_of_known_layers(model, macs):
    assert count_macs(model, (10, 20)) == macs
    assert count_macs(model.to("meta"), (10, 20)) == macs


def test_macs_follow_a_cut():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1))
    assert count_macs(model, (5, 5)) == (3 * 8 + 8 * 4) * 25
    model[0], model[1] = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 4, 1)
    assert count_macs(model, (5, 5)) == (3 * 2 + 2 * 4) * 25
    assert count_parameters(model) == (3 * 2 + 2) + (2 * 4 + 4)


def test_macs_do_not_depend_on_precision():
    assert count_macs(nn.Conv2d(3, 8, 1).bfloat16(), (5, 5)) == 3 * 8 * 25


class Probe(nn.Module):
    """Notes how it is called, in a list that its copies share, and takes a scripted time."""

    def __init__(self, seconds: tuple[float, ...] = ()):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.seconds, calls = seconds, []
        self.note = lambda call: calls.append(call) or calls

    def forward(self, images):
        calls = self.note((tuple(images.shape), self.training, torch.is_inference_mode_enabled()))
        time.sleep(self.seconds[len(calls) - 1] if self.seconds else 0)
        return self.norm(images)


def test_latency_is_the_median_after_the_warmup():
    model = Probe(seconds=(0.3, 0.01, 0.01, 0.3, 0.01))
    # One slow pass warms up and one of four is an outlier: the mean would be over 80 ms.
    assert 10 <= measure_latency(model, (6, 4), warmup=1, repeats=4) < 60
    assert model.note("end") == [((1, 3, 6, 4), False, True)] * 5 + ["end"]


def test_candidates_take_turns():
    order = []

    def candidate(name, seconds):
        return lambda: (order.append(name), time.sleep(seconds))

    cpu = torch.device("cpu")
    slow, quick = time_in_turns([candidate("a", 0.02), candidate("b", 0)], warmup=1, repeats=2, device=cpu)
    assert "".join(order) == "ab" + "aabb" * 2  # each turn begins with a pass that does not count
    assert len(slow) == len(quick) == 2 and min(slow) >= 20 > max(quick)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_latency_waits_for_the_gpu():
    model = nn.Sequential(*[nn.Conv2d(3 if i == 0 else 256, 256, 3, padding=1) for i in range(8)]).cuda()
    small = measure_latency(model, (64, 64), warmup=5, repeats=10)
    large = measure_latency(model, (1024, 1024), warmup=5, repeats=10)
    assert large > 5 * small  # without waiting both would take the time of the launches


def test_latency_needs_a_pass():
    with pytest.raises(ValueError, match="repeats is 0; it must be at least 1"):
        measure_latency(Probe(), (6, 4), repeats=0)


@pytest.mark.parametrize(
    "measure",
    [lambda model: count_macs(model, (6, 4)), lambda model: measure_latency(model, (6, 4), warmup=0, repeats=1)],
    ids=["macs", "latency"],
)
def test_measuring_leaves_the_model_as_it_was(measure):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Dropout())
    model.train()
    model[0].eval()  # as detectors freeze their batch normalisation
    state = {name: value.clone() for name, value in model.state_dict().items()}
    measure(model)
    assert [module.training for module in model.modules()] == [True, False, True, True]
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_eval_mode_ends_with_an_error_too():
    model = Probe()
    with pytest.raises(RuntimeError), eval_mode(model):
        assert not model.training
        raise RuntimeError
    assert model.training


def test_what_each_cut_left(build_tiny):
    detector = build_tiny()
    tower = "head.class_tower.0"
    slices = [(f"{tower}.conv.weight", 0), ("head.class_logits.weight", 1)]
    slices += [
        (f"{tower}.norms.{i}.{key}", 0) for i in range(3) for key in detector.head.class_tower[0].norms[0].state_dict()
    ]
    slices = tuple(pair for pair in slices if not pair[0].endswith("num_batches_tracked"))
    for width, keep in ((16, range(8)), (8, range(4))):
        cut(detector, Plan((Cut(width, tuple(keep), slices),)))
    stages = measure_cuts(detector, (64, 64), repeats=2)
    # 8*8 + 4*4 + 2*2 locations, 9 taps: a tower of 16 inputs, and two class logits
    steps = [84 * 9 * (16 * width + 2 * width) for width in (16, 8, 4)]
    assert [stages[0]["macs"] - stage["macs"] for stage in stages] == [steps[0] - step for step in steps]
    assert stages[-1]["params"] == count_parameters(detector) and all(stage["latency_ms"] > 0 for stage in stages)
