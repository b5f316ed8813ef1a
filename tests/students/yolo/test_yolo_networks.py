import itertools
import math

import pytest
import torch

import students
from benchmarks.detectors import PUBLISHED, costs_as_published
from distill.measure import count_parameters
from students.yolo.head import AnchorHead, joint_logits
from teachers import ScaledDetector


@pytest.mark.parametrize("network", PUBLISHED, ids="-".join)
def test_costs_are_the_published_ones(network):
    millions, billions = PUBLISHED[network]
    params, flops = costs_as_published(network)
    # 1.9 is 1.87 rounded, 1.5% more
    rounding = 0.05 / millions
    assert params / 1e6 == pytest.approx(millions, rel=max(0.01, rounding))
    assert flops / 1e9 == pytest.approx(billions, rel=0.03)


def test_output_is_that_of_a_dense_head(build_small, family, images):
    detector = build_small(family)
    output = detector(images)
    assert detector.strides == (8, 16, 32) and detector.anchors == 3
    assert [x.shape[1] for x in output.features] == list(detector.feature_channels)
    for level, side in enumerate((8, 4, 2)):
        assert output.features[level].shape[2:] == (side, side)
        assert output.class_logits[level].shape == output.conditional_logits[level].shape == (2, 6, side, side)
        assert output.box_distances[level].shape == (2, 12, side, side)
        assert output.objectness[level].shape == (2, 3, side, side)
        product = output.conditional_logits[level].sigmoid().unflatten(1, (3, 2))
        product = (product * output.objectness[level].sigmoid()[:, :, None]).flatten(1, 2)
        torch.testing.assert_close(output.class_logits[level].sigmoid(), product)


def test_joint_logits_are_those_of_the_product():
    # odds of a product p are p / (1 - p); 0.5 * 0.5 = 1/4: odds of 1/3
    logits = joint_logits(torch.tensor([0.0, 0.0]).view(1, 2, 1, 1), torch.zeros(1, 1, 1, 1))
    assert logits.flatten().tolist() == pytest.approx([-math.log(3)] * 2)
    # far out: sure of the object, the class decides; not at all sure, both add up; no overflow either way
    classes, objectness = torch.tensor([3.0, -300.0, 200.0]), torch.tensor([200.0, -200.0, 200.0])
    logits = joint_logits(classes.view(3, 1, 1, 1), objectness.view(3, 1, 1, 1)).flatten()
    assert logits.tolist() == pytest.approx([3.0, -500.0, 200 - math.log(2)])
    extremes = torch.tensor(list(itertools.product((-100.0, 0, 100.0), repeat=2)), requires_grad=True)
    joint_logits(extremes[:, :1, None, None], extremes[:, 1:, None, None]).sum().backward()
    assert extremes.grad.isfinite().all()
    # two anchors with three classes each: the objectness is the anchor's own
    classes, objectness = torch.randn(1, 6, 1, 1), torch.randn(1, 2, 1, 1)
    wanted = classes.sigmoid().view(2, 3) * objectness.sigmoid().view(2, 1)
    torch.testing.assert_close(joint_logits(classes, objectness).sigmoid().view(2, 3), wanted)


def test_boxes_of_known_outputs():
    anchors = (((10, 20),), ((30, 40),), ((50, 60),))
    head = AnchorHead((1, 1, 1), 2, anchors)
    # nothing said: in the cell's centre, as large as the anchor; in strides of 8
    assert head.read_boxes(torch.zeros(1, 4, 1, 1), 0).flatten().tolist() == [5 / 8, 10 / 8, 5 / 8, 10 / 8]
    # a sigmoid of 3/4 moves by half a cell and makes a side (2 * 3/4)^2 = 9/4 as long
    three_quarters = math.log(3)
    found = head.read_boxes(torch.tensor([three_quarters, 0, 0, three_quarters]).view(1, 4, 1, 1), 1).flatten().tolist()
    assert found == pytest.approx([15 / 16 - 0.5, 20 * 9 / 4 / 16, 15 / 16 + 0.5, 20 * 9 / 4 / 16])
    # YOLOv4: centres move by the scale, sizes are exponentials
    head = AnchorHead((1, 1, 1), 2, anchors, box_scales=(1.2, 1.1, 1.05))
    found = head.read_boxes(torch.tensor([three_quarters, 0, math.log(2), 0]).view(1, 4, 1, 1), 1).flatten().tolist()
    assert found == pytest.approx([30 / 16 - 1.1 / 4, 20 / 16, 30 / 16 + 1.1 / 4, 20 / 16])


@pytest.mark.parametrize("size", [(64, 96), (50, 70)])
def test_candidates_are_boxes_around_their_cells(build_small, shake, family, size):
    detector = shake(build_small(family))
    with torch.no_grad():
        output = detector(torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)))
        boxes, scores = detector.candidates(output)
        found = detector.decode(output, [size])[0]
    number = 0
    for level, stride in enumerate(detector.strides):
        _, _, height, width = output.class_logits[level].shape
        assert height == -(-size[0] // stride) or height == size[0] // stride
        for row, column, anchor in itertools.product(range(height), range(width), range(3)):
            x, y = (column + 0.5) * stride, (row + 0.5) * stride
            left, top, right, bottom = output.box_distances[level][0, anchor * 4 : anchor * 4 + 4, row, column] * stride
            wanted = torch.stack((x - left, y - top, x + right, y + bottom))
            torch.testing.assert_close(boxes[0, number], wanted)
            logits = output.class_logits[level][0, anchor * 2 : anchor * 2 + 2, row, column]
            torch.testing.assert_close(scores[0, number], logits.sigmoid())
            number += 1
    assert number == boxes.shape[1]
    assert len(found.scores) and (found.scores.diff() <= 0).all()
    assert (found.boxes >= 0).all() and (found.boxes[:, 2] <= size[1]).all() and (found.boxes[:, 3] <= size[0]).all()


@pytest.mark.parametrize("empty", [False, True])
def test_losses_reach_every_parameter(build_small, family, images, targets, empty):
    detector = build_small(family)
    losses = detector.loss(detector(images), targets[1:] * 2 if empty else targets)
    assert set(losses) == {"classification", "objectness", "box"}
    assert all(loss.dtype == torch.float32 and loss.isfinite() and loss.dim() == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert [name for name, p in detector.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in detector.parameters())
    if empty:
        assert losses["classification"] == losses["box"] == 0 and losses["objectness"] > 0


def test_low_precision_leaves_the_losses_whole(build_small, family, images, targets):
    detector = build_small(family, class_names=["one"])
    targets = [target | {"labels": target["labels"] * 0} for target in targets]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = detector.loss(detector(images.to(memory_format=torch.channels_last)), targets)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    lowered = detector.bfloat16()
    losses = lowered.loss(lowered(images.bfloat16()), targets)
    assert all(loss.isfinite() for loss in losses.values())


def test_it_learns(build_small, family):
    """A square, bright on dark, at one of four places."""
    generator = torch.Generator().manual_seed(0)
    images, targets = 0.1 * torch.rand(8, 3, 64, 64, generator=generator), []
    for number, image in enumerate(images):
        x, y = 4 + 24 * (number % 2), 4 + 24 * (number // 2 % 2)
        image[:, y : y + 24, x : x + 24] = 0.9
        boxes = torch.tensor([[x, y, x + 24, y + 24]], dtype=torch.float32)
        targets.append({"boxes": boxes, "labels": torch.tensor([0])})
    detector = build_small(family, class_names=["square"])
    optimizer = torch.optim.AdamW(detector.parameters(), lr=5e-3)
    history = []
    for _ in range(40):
        losses = detector.loss(detector(images), targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 10)
        optimizer.step()
        history.append(sum(losses.values()).item())
    assert sum(history[-5:]) < 0.5 * sum(history[:5])


def test_saved_and_loaded(build_small, shake, family, tmp_path, images):
    detector = shake(build_small(family))
    detector.head.anchor_sizes += 1  # as of a checkpoint that has its own
    students.save(detector, tmp_path / "student")
    loaded = students.load(tmp_path / "student")
    assert loaded.recipe == detector.recipe
    with torch.no_grad():
        for ours, theirs in zip(loaded(images), detector(images)):
            assert all(map(torch.equal, ours, theirs))


def test_settings_that_cannot_be_met(build_small, family):
    for changes, message in [
        ({"class_names": []}, "class_names: the list of classes is empty"),
        ({"width": -1.0}, "width: -1 is no multiple of a network's width; give a number above 0"),
        ({"weights": "nowhere.pt"}, "weights: no file nowhere.pt"),
    ]:
        with pytest.raises(ValueError, match=message):
            build_small(family, **changes)


def test_sizes_of_yolov5(build_small):
    with pytest.raises(ValueError, match="size: 't' does not exist; choose n, s, m, l, x"):
        build_small("yolov5", size="t")
    assert build_small("yolov5").title == "yolov5 n"


def test_deployed_is_the_same_with_less(build_small, shake, images):
    detector = shake(build_small("yolov7"))
    before, state = count_parameters(detector), {name: x.clone() for name, x in detector.state_dict().items()}
    detector.train()
    deployed = detector.deployed()
    assert detector.training and not deployed.training
    assert all(torch.equal(x, state[name]) for name, x in detector.state_dict().items())
    with torch.no_grad():
        for ours, theirs in zip(deployed(images), detector.eval()(images)):
            for x, y in zip(ours, theirs):
                torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
    # of each of the three: the weight of a 1x1 convolution, and of four vectors one is left
    widths = [(tower.rbr_1x1[0].in_channels, tower.out_channels) for tower in detector.head.towers]
    assert before - count_parameters(deployed) == sum(c * wider + 3 * wider for c, wider in widths)
    scaled = ScaledDetector(detector, 2.0)
    assert count_parameters(scaled.deployed()) == count_parameters(deployed) and scaled.deployed().scale == 2
    plain = build_small("yolov5")
    assert plain.deployed() is plain
