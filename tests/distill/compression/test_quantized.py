"""Rounded detectors: where they round, that they can be trained, and that integers say the same."""

import copy

import pytest
import torch
from torch import nn

from distill.compression.captured import CapturedDetector
from distill.compression.fake_quant import calibrate
from distill.compression.quantized import QuantizedDetector, to_integers
from distill.distiller import Distiller
from distill.ema import EMA

SIZE = (64, 64)


def lived_in(detector):
    """With batch norms that are not as they were made, one of them turning signs around."""
    for number, norm in enumerate(m for m in detector.modules() if isinstance(m, nn.BatchNorm2d)):
        generator = torch.Generator().manual_seed(number)
        norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator) * 0.1)
        norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
        nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
    with torch.no_grad():
        detector.head.class_tower[0].norms[1].weight[3] *= -1
    return detector.eval()


def flat(output):
    return [level for levels in output for level in levels]


def test_a_captured_detector_is_the_same(build_tiny, images, targets):
    detector = lived_in(build_tiny())
    captured = CapturedDetector(detector, SIZE)
    output, expected = captured(images), detector(images)
    assert type(output) is type(expected)
    torch.testing.assert_close(flat(output), flat(expected), rtol=0, atol=0)
    assert captured.loss(output, targets) == detector.loss(expected, targets)
    assert captured(images[:1]).features[0].shape[0] == 1
    assert {id(p) for p in captured.parameters()} == {id(p) for p in detector.parameters()}
    with pytest.raises(ValueError, match=r"found \(32, 64\); this graph is for \(64, 64\)"):
        captured(torch.zeros(1, 3, 32, 64))


def test_a_copy_stands_alone(build_tiny, images):
    captured = CapturedDetector(build_tiny().eval(), SIZE)
    before = flat(captured(images))
    twin = copy.deepcopy(captured)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert all(map(torch.equal, before, flat(captured(images))))
    assert not torch.equal(flat(twin(images))[0], before[0])


def test_what_is_rounded(build_tiny):
    detector = build_tiny()
    quantized = QuantizedDetector(detector, SIZE, keep=("head.class_logits", "head.box_distances"))
    convolutions = [n for n, m in detector.named_modules() if isinstance(m, nn.Conv2d)]
    assert sorted(quantized.rounded_layers) == sorted(set(convolutions) - {"head.class_logits", "head.box_distances"})
    with pytest.raises(ValueError, match=r"keep: 'haed\.\*' fits no convolution"):
        QuantizedDetector(detector, SIZE, keep=("haed.*",))


@pytest.mark.parametrize("head", ["task_aligned", "gfl", "retinanet"])
def test_integer_weights_are_the_rounded_ones(build_tiny, images, head):
    detector = lived_in(build_tiny(head=head))
    quantized = QuantizedDetector(detector, SIZE, keep=("head.class_logits",)).eval()
    with torch.inference_mode():
        integers = flat(to_integers(quantized, activations=False)(images))
        for name in quantized.rounded_layers:
            weight = detector.get_submodule(name).weight
            weight.copy_(quantized.weights(weight))
        for ours, theirs in zip(integers, flat(detector(images))):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_integers_say_what_was_rounded(build_tiny, images):
    detector = lived_in(build_tiny())
    quantized = QuantizedDetector(detector, SIZE).eval()
    calibrate(quantized, [images])
    with torch.inference_mode():
        exact, rounded, integers = (flat(d(images)) for d in (detector, quantized, to_integers(quantized)))
    for ours, theirs, float_ones in zip(rounded, integers, exact):
        # a value between two steps may fall to either side, which later layers make more of
        noise = float((ours - float_ones).abs().mean())
        assert 0 < noise < 0.1 * float(float_ones.abs().max())
        assert float((ours - theirs).abs().mean()) < noise


def test_a_shared_weight_is_kept_once(build_tiny, images):
    quantized = QuantizedDetector(lived_in(build_tiny()), SIZE).eval()
    calibrate(quantized, [images])
    integers = to_integers(quantized)
    of_tower = [
        value
        for name, value in integers.named_buffers()
        if name.startswith("integers_") and value.shape == (16, 16, 3, 3)
    ]
    assert all(value.dtype == torch.int8 for value in of_tower)
    tower = quantized.detector.head.class_tower[0].conv.weight
    whole = quantized.weights.to_integers(tower)[0]
    turned = whole.clone()
    turned[3] *= -1
    # the one batch norm of three that turns a sign needs a weight of its own
    assert sum(torch.equal(value, whole) for value in of_tower) == 1
    assert sum(torch.equal(value, turned) for value in of_tower) == 1


def test_it_is_trained_as_the_student_is(build_tiny, images, targets):
    detector = lived_in(build_tiny())
    quantized = QuantizedDetector(detector, SIZE).eval()
    calibrate(quantized, [images])
    unit = Distiller(quantized).train()
    ema, before = EMA(quantized, 0.5), [p.clone() for p in detector.parameters()]
    optimizer = torch.optim.SGD(unit.parameters(), 1e-3)
    statistics = [b.clone() for n, b in detector.named_buffers() if "running" in n]
    loss, _ = unit(images, targets)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())
    optimizer.step()
    ema.update(quantized)
    assert any(not torch.equal(p, q) for p, q in zip(before, detector.parameters()))
    # batch norms are folded in what runs, so their statistics stay
    assert all(map(torch.equal, statistics, [b for n, b in detector.named_buffers() if "running" in n]))
    for mean, old, new in zip(ema.module.detector.parameters(), before, detector.parameters()):
        torch.testing.assert_close(mean, old.lerp(new, 1 - 2 / 11))  # once each, not twice
    assert ema.module(images).features[0].shape == quantized(images).features[0].shape
