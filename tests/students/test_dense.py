import math

import pytest
import torch
from torch import nn

from students import DenseOutput, Detector
from students.locations import _grid_locations, grid_locations


def normalisers(detector):
    return [m for m in detector.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def blank_output(detector, size, logit=-20.0, distance=1.0, batch=1):
    """Raw outputs for an image of `size` (height, width): the same everywhere."""
    shapes = [(math.ceil(size[0] / s), math.ceil(size[1] / s)) for s in detector.strides]
    return DenseOutput(
        tuple(torch.zeros(batch, 16, *shape) for shape in shapes),
        tuple(torch.full((batch, len(detector.class_names), *shape), logit) for shape in shapes),
        tuple(torch.full((batch, 4, *shape), distance) for shape in shapes),
    )


@pytest.mark.parametrize(
    ("levels", "neck", "backbone"),
    [
        ((3, 4, 5), "fpn", "test_resnet"),
        ((3, 4, 5, 6, 7), "fpn", "test_efficientnet"),
        ((2, 3, 4), "fpn", "test_resnet"),
        ((3, 4, 5, 6), "pan", "test_efficientnet"),
        ((2, 3, 4), "pan", "test_efficientnet"),  # timm's EfficientNets bring stages beyond the last level
        ((2, 3, 4), "fpn", "mobilenetv3_small_050"),
        ((5, 6), "pan", "test_resnet"),
    ],
)
def test_shapes_and_gradients(build_tiny, targets, levels, neck, backbone):
    detector = build_tiny(levels=levels, neck=neck, backbone=backbone)
    output = detector(torch.rand(2, 3, 64, 96))
    shapes = [(math.ceil(64 / 2**n), math.ceil(96 / 2**n)) for n in levels]
    assert detector.strides == tuple(2**n for n in levels)
    assert detector.feature_channels == (16,) * len(levels)
    assert [x.shape for x in output.features] == [(2, 16, *shape) for shape in shapes]
    assert [x.shape for x in output.class_logits] == [(2, 2, *shape) for shape in shapes]
    assert [x.shape for x in output.box_distances] == [(2, 4, *shape) for shape in shapes]
    assert all((x >= 0).all() for x in output.box_distances)

    # a parameter without a gradient would stop DistributedDataParallel, which runs without find_unused_parameters
    sum(detector.loss(output, targets).values()).backward()
    assert [name for name, p in detector.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in detector.parameters())
    assert next(detector.backbone.parameters()).grad.abs().sum() > 0


def test_every_parameter_has_a_gradient_without_any_object(build_tiny, images, targets):
    detector = build_tiny()
    losses = detector.loss(detector(images), [targets[1], targets[1]])
    assert losses["box"] == 0 and losses["classification"] > 0
    sum(losses.values()).backward()
    assert [name for name, p in detector.named_parameters() if p.grad is None] == []


def test_train_and_eval_mode_differ_by_batch_norm_alone(build_tiny, images):
    detector = build_tiny(backbone="test_efficientnet")
    with torch.no_grad():
        wanted = detector.eval()(images)
        detector.train()
        assert not torch.equal(detector(images).class_logits[0], wanted.class_logits[0])
        detector = build_tiny(backbone="test_efficientnet").train()
        for norm in normalisers(detector):
            norm.eval()
        found = detector(images)
    for field, other in zip(found, wanted):
        assert all(torch.equal(x, y) for x, y in zip(field, other))


def test_loss_of_the_right_answer_is_zero(build_tiny):
    # one object as large as the image: all five locations lie inside it, and all of them answer right
    detector = build_tiny(levels=(4, 5))
    target = [{"boxes": torch.tensor([[0.0, 0, 32, 32]]), "labels": torch.tensor([1])}]
    output = blank_output(detector, (32, 32))
    for level, stride in enumerate(detector.strides):
        output.class_logits[level][:, 1] = 20
        for row in range(32 // stride):
            for column in range(32 // stride):
                x, y = column + 0.5, row + 0.5
                edges = torch.tensor([x, y, 32 / stride - x, 32 / stride - y])
                output.box_distances[level][0, :, row, column] = edges
    losses = detector.loss(output, target)
    assert losses["classification"] < 1e-6 and losses["box"] < 1e-6

    wrong_class = detector.loss(output, [target[0] | {"labels": torch.tensor([0])}])
    # the qualities are 1 all the same; five locations err fully on either class: 2 * 5 * |1|^2 * 20 / 5
    assert wrong_class["classification"].item() == pytest.approx(40, rel=1e-4)

    fine, coarse = output.box_distances
    shrunk = DenseOutput(output.features, output.class_logits, (fine * 0.5, coarse))
    # at four locations the box is a quarter of the object and inside it, GIoU = IoU = 1/4; at the fifth it is right.
    # Their qualities differ, yet each counts alike; weighted by 5
    losses = detector.loss(shrunk, target)
    assert losses["box"].item() == pytest.approx(5 * (4 * 0.75 + 0) / 5, rel=1e-4)


def test_an_object_asks_for_as_much_as_its_score(build_tiny, images, targets):
    detector = build_tiny()
    output = detector(images)
    sure = [target | {"scores": torch.ones(len(target["labels"]))} for target in targets]
    assert detector.loss(output, sure) == detector.loss(output, targets)
    unsure = [target | {"scores": torch.zeros(len(target["labels"]))} for target in targets]
    nothing = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}] * 2
    # objects of score 0 are background
    assert detector.loss(output, unsure)["classification"] == detector.loss(output, nothing)["classification"]
    assert detector.loss(output, unsure)["box"] == 0
    half = [target | {"scores": torch.full((len(target["labels"]),), 0.5)} for target in targets]
    assert detector.loss(output, half)["box"] == detector.loss(output, targets)["box"]  # same locations, same boxes


def test_loss_without_objects_is_the_quality_focal_loss_of_background(build_tiny):
    detector = build_tiny(levels=(4, 5))
    losses = detector.loss(
        blank_output(detector, (32, 32), logit=0.0),
        [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}],
    )
    assert losses["classification"].item() == pytest.approx(5 * 2 * 0.25 * math.log(2))
    assert losses["box"] == 0


def test_loss_is_float32_in_low_precision(build_tiny, images, targets):
    detector = build_tiny().bfloat16()
    losses = detector.loss(detector(images.bfloat16()), targets)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}


def test_decode_gives_the_box_around_the_location_and_clips_it(build_tiny):
    detector = build_tiny(levels=(3, 4))
    output = blank_output(detector, (64, 64))
    output.class_logits[1][0, 1, 1, 2] = 2.0  # stride 16, row 1, column 2: at (40, 24)
    output.box_distances[1][0, :, 1, 2] = torch.tensor([1.0, 0.5, 1.5, 3.0])
    found = detector.decode(output, [(64, 60)])[0]
    assert found.boxes.tolist() == [[24, 16, 60, 64]]  # to (64, 72), if the image were larger
    assert found.scores.tolist() == pytest.approx([1 / (1 + math.exp(-2))])
    assert found.labels.tolist() == [1]


def test_decode_suppresses_within_a_class_only(build_tiny):
    detector = build_tiny(levels=(3, 4))
    output = blank_output(detector, (64, 64), distance=4.0)
    logits, distances = output.class_logits[0], output.box_distances[0]
    logits[0, 0, 3, 3], logits[0, 0, 3, 4] = 1.0, 3.0  # neighbours of one class: the better one stays
    logits[0, 1, 3, 3] = 2.0  # the same place, another class: stays
    logits[0, 0, 0, 0] = 0.5  # the first class elsewhere: stays
    distances[0, :, 0, 0] = torch.tensor([0.5, 0.5, 0.5, 0.5])
    found = detector.decode(output, [(64, 64)])[0]
    assert found.labels.tolist() == [0, 1, 0]
    assert found.boxes.tolist() == [[4, 0, 64, 60], [0, 0, 60, 60], [0, 0, 8, 8]]
    assert found.scores.tolist() == pytest.approx([1 / (1 + math.exp(-x)) for x in (3, 2, 0.5)])


def test_decode_keeps_to_its_limits(build_tiny):
    detector = build_tiny(levels=(3, 4))
    output = blank_output(detector, (64, 64), distance=0.4, batch=2)
    output.class_logits[0][0] = torch.arange(128.0).view(2, 8, 8) / 64  # boxes of 6.4 pixels, 8 apart: no overlap
    limited = detector.decode(output, [(64, 64)] * 2, max_detections=5)
    assert limited[0].scores.tolist() == pytest.approx([1 / (1 + math.exp(-(127 - n) / 64)) for n in range(5)])
    assert limited[1].boxes.shape == (0, 4) and limited[1].labels.dtype == torch.int64
    above = detector.decode(output, [(64, 64)] * 2, score_threshold=1 / (1 + math.exp(-125.5 / 64)))
    assert len(above[0].scores) == 2
    assert len(detector.decode(output, [(64, 64)] * 2, max_candidates=3)[0].scores) == 3


def test_images_are_normalised_once(build_tiny, images):
    detector = build_tiny(backbone="mobilenetv3_small_050")
    assert detector.normalization == (
        pytest.approx((0.485, 0.456, 0.406)),
        pytest.approx((0.229, 0.224, 0.225)),
    )
    seen = []
    detector.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    detector(images)
    by_hand = torch.stack([(images[:, c] - m) / s for c, (m, s) in enumerate(zip(*detector.normalization))], dim=1)
    assert torch.allclose(seen[0], by_hand, atol=1e-6)


def test_output_layers_are_those_that_mean_something_by_position(build_tiny):
    detector = build_tiny()
    assert isinstance(detector, Detector)
    assert [layer.out_channels for layer in detector.output_layers] == [2, 4]


def test_locations_are_cell_centres_also_when_cached_in_inference_mode():
    _grid_locations.cache_clear()
    with torch.inference_mode():
        grid_locations(((1, 2), (1, 1)), (8, 16), torch.device("cpu"))
    locations, strides = grid_locations(((1, 2), (1, 1)), (8, 16), torch.device("cpu"))
    assert locations.tolist() == [[4, 4], [12, 4], [8, 8]] and strides.tolist() == [8, 8, 16]
    (locations * torch.ones(1, requires_grad=True)).sum().backward()  # raises on an inference tensor


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": []}, "class_names: the list of classes is empty"),
        ({"levels": ()}, "levels: the list is empty"),
        ({"levels": (3, 5)}, r"levels: \[3, 5\] must ascend without gaps"),
        ({"levels": (5, 4)}, r"levels: \[5, 4\] must ascend without gaps"),
        ({"levels": (6, 7)}, r"levels: \[6, 7\] has none that a backbone gives"),
        ({"levels": (0, 1)}, r"backbone: test_resnet has maps at strides .* none at \[1\]"),
        ({"backbone": "test_vit"}, r"backbone: test_vit has maps at strides \[16, 16, 16\], none at \[8, 32\]"),
    ],
)
def test_settings_that_cannot_be_met(build_tiny, changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        build_tiny(**changes)
