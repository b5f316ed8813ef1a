"""What each head of the dense family adds: how it reads boxes, and what it is told."""

import math

import pytest
import torch

import students
from students import DenseOutput
from students.artifact import cut
from students.dense import HEADS
from students.locations import flatten_levels, grid_locations, to_boxes, to_distances
from students.plan import Cut, Plan
from students.retinanet_head import ANCHOR_SIZES, RetinaNetHead, to_deltas

NOTHING = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}


@pytest.fixture(params=HEADS)
def detector(request, build_tiny):
    return build_tiny(head=request.param)


def perfect_output(detector, size, box, label, logit=20.0):
    """Raw outputs that say everywhere, and surely, that there is this one object of whole distances plus a half."""
    shapes = tuple((size // stride, size // stride) for stride in detector.strides)
    locations, strides = grid_locations(shapes, detector.strides, torch.device("cpu"))
    distances = to_distances(torch.tensor([[box]]).float(), locations, strides)
    logits, levels, bins = [], [], []
    for shape, level in zip(shapes, distances.split([h * w for h, w in shapes], dim=1)):
        scores = torch.full((1, detector.anchors, len(detector.class_names), *shape), -20.0)
        scores[:, :, label] = logit
        logits.append(scores.flatten(1, 2))
        level = level.transpose(1, 2).unflatten(2, shape)
        levels.append(level.repeat(1, detector.anchors, 1, 1))
        if detector.box_bins:
            away = (torch.arange(detector.box_bins).view(-1, 1, 1) - level[:, :, None]).abs()
            bins.append(torch.where(away < 1, 0.0, -40.0).flatten(1, 2))  # half and half around the distance
    return DenseOutput((), tuple(logits), tuple(levels), tuple(bins))


def test_outputs_keep_the_contract(detector, images, targets):
    output = detector(images)
    shapes, anchors = [(8, 8), (4, 4), (2, 2)], detector.anchors
    assert detector.anchors == {"retinanet": 9}.get(detector.recipe["head"], 1)
    assert detector.box_bins == {"gfl": 17}.get(detector.recipe["head"], 0)
    assert [x.shape for x in output.class_logits] == [(2, anchors * 2, *shape) for shape in shapes]
    assert [x.shape for x in output.box_distances] == [(2, anchors * 4, *shape) for shape in shapes]
    bins = [(2, 4 * 17, *shape) for shape in shapes] if detector.box_bins else []
    assert [x.shape for x in output.box_logits] == bins
    widths = [anchors * 2, anchors * 4 * max(1, detector.box_bins)]
    assert [layer.out_channels for layer in detector.output_layers] == widths
    scores = torch.cat([x.flatten() for x in output.class_logits]).sigmoid()
    assert 0.005 < scores.median() < 0.02


@pytest.mark.parametrize("empty", [False, True])
def test_every_parameter_has_a_gradient(detector, images, targets, empty):
    losses = detector.loss(detector(images), [NOTHING, NOTHING] if empty else targets)
    assert set(losses) == {"classification", "box"}
    assert losses["classification"] > 0 and (losses["box"] == 0) == empty
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())
    assert (detector.head.box_distances.weight.grad.abs().sum() == 0) == empty


def test_it_learns_and_decodes_what_it_learnt(detector, images, targets):
    optimizer = torch.optim.AdamW(detector.parameters(), lr=5e-3)
    first = sum(detector.loss(detector(images), targets).values()).item()
    for _ in range(40):
        loss = sum(detector.loss(detector(images), targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.6 * first
    found = detector.decode(detector(images), [(64, 64)] * 2)[0]
    best = [found.boxes[found.labels == label][0] for label in (0, 1)]
    for box, target in zip(best, targets[0]["boxes"]):
        assert (box - target).abs().max() < 12


@torch.no_grad()
def test_objects_ask_for_as_much_as_their_score(detector, images, targets):
    output = detector(images)
    scored = lambda s: [t | {"scores": torch.full((len(t["labels"]),), s)} for t in targets]  # noqa: E731
    true = detector.loss(output, targets)
    assert detector.loss(output, scored(1.0)) == true
    nothing, unsure, half = detector.loss(output, [NOTHING] * 2), detector.loss(output, scored(0.0)), scored(0.5)
    assert unsure["box"] == 0
    assert detector.loss(output, half)["box"] == true["box"]  # same places, same boxes
    assert detector.loss(output, half)["classification"] != true["classification"]
    # the background alone; RetinaNet counts no anchor that is too close to call
    assert unsure["classification"] <= nothing["classification"]
    assert unsure["classification"] > 0.5 * nothing["classification"]


@torch.no_grad()
def test_boxes_of_an_image_do_not_depend_on_its_neighbours(detector, images, targets):
    output = detector.eval()(images)
    alone = DenseOutput(*(tuple(level[:1] for level in levels) for levels in output))
    swapped = DenseOutput(*(tuple(level.flip(0) for level in levels) for levels in output))
    wanted = detector.loss(alone, targets[:1])["box"]
    torch.testing.assert_close(detector.loss(output, [targets[0], NOTHING])["box"], wanted)
    torch.testing.assert_close(detector.loss(swapped, [NOTHING, targets[0]])["box"], wanted)


@torch.no_grad()
def test_low_precision_and_channels_last(detector, images, targets):
    wanted = detector.eval().loss(detector(images), targets)
    turned = detector.to(memory_format=torch.channels_last)
    found = turned.loss(turned(images.to(memory_format=torch.channels_last)), targets)
    low = turned.bfloat16()
    rough = low.loss(low(images.bfloat16()), targets)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
        assert rough[name].dtype == torch.float32
        torch.testing.assert_close(rough[name], value, rtol=0.15, atol=0.02)


@torch.no_grad()
def test_one_box_over_a_map_of_one_cell(build_tiny):
    for head in HEADS:
        detector = build_tiny(head=head, levels=(5,))
        target = {"boxes": torch.tensor([[0.0, 0, 32, 32]]), "labels": torch.tensor([1])}
        losses = detector.loss(detector.eval()(torch.rand(1, 3, 32, 32)), [target])
        assert losses["box"] > 0 and losses["classification"] > 0


@torch.no_grad()
def test_the_right_answer_costs_nothing_but_the_width_of_distributions(detector):
    box = (16, 16, 48, 48)
    target = {"boxes": torch.tensor([box]).float(), "labels": torch.tensor([1])}
    losses = detector.loss(perfect_output(detector, 64, box, 1), [target])
    # a distance between two bins leaves each edge with ln 2, a mean over the edges, weighted by 0.25
    assert losses["box"].item() == pytest.approx(0.25 * math.log(2) if detector.box_bins else 0, abs=1e-4)
    wrong = detector.loss(perfect_output(detector, 64, box, 0), [target])
    assert wrong["classification"] > losses["classification"] + 1


@torch.no_grad()
def test_gfl_loss_by_hand(build_tiny):
    # one location of stride 32, at (16, 16); its edges lie half a stride away, all said to be one stride away
    detector = build_tiny(head="gfl", levels=(5,))
    bins = torch.full((4, 17, 1, 1), -60.0)
    bins[:, 1] = 0
    output = DenseOutput(
        (),
        (torch.tensor([math.log(3), 0]).view(1, 2, 1, 1),),  # scores 3/4 and 1/2
        (torch.ones(1, 4, 1, 1),),
        (bins.view(1, -1, 1, 1),),
    )
    target = {"boxes": torch.tensor([[0.0, 0, 32, 32]]), "labels": torch.tensor([0])}
    losses = detector.loss(output, [target])
    # the box is 64 across: IoU and GIoU 1/4. The quality 1/4 against 3/4, and 0 against 1/2
    classification = 0.25 * -(0.25 * math.log(0.75) + 0.75 * math.log(0.25)) + 0.25 * math.log(2)
    assert losses["classification"].item() == pytest.approx(classification, rel=1e-5)
    # the weight 3/4 is divided by 1, the least; half a stride is half bin 0, whose log is -60, and half bin 1
    assert losses["box"].item() == pytest.approx(0.75 * (2 * 0.75 + 0.25 * 0.5 * 60), rel=1e-5)


def test_gfl_distances_are_means(build_tiny):
    head = build_tiny(head="gfl").head
    outputs = torch.full((1, 4, 17, 1, 1), -60.0)
    outputs[0, 0, 3] = outputs[0, 1, 0] = outputs[0, 2, 16] = 0
    outputs[0, 3, 4], outputs[0, 3, 6] = 0, math.log(3)
    distances, logits = head.read_boxes(outputs.flatten(1, 2))
    assert distances.flatten().tolist() == pytest.approx([3, 0, 16, 4 / 4 + 6 * 3 / 4], abs=1e-5)
    assert torch.equal(logits, outputs.flatten(1, 2))


@torch.no_grad()
def test_retinanet_reads_deltas_of_its_anchors(build_tiny):
    head = build_tiny(head="retinanet").head
    deltas = torch.zeros(1, 9, 4, 1, 1)
    distances = head.read_boxes(deltas.flatten(1, 2))[0].view(9, 4)
    sizes = (distances[:, :2] + distances[:, 2:]).tolist()
    assert sizes[3] == pytest.approx([4, 4]) and sizes[4] == pytest.approx([4 * 2 ** (1 / 3)] * 2)
    assert sizes[0] == pytest.approx([4 * 2**0.5, 4 / 2**0.5])  # flat first
    assert [w * h for w, h in sizes] == pytest.approx([16 * 4 ** (n / 3) for n in (0, 1, 2) * 3])
    deltas[0, 3, :, 0, 0] = torch.tensor([0.5, -1, math.log(2), 99])  # 2 right, 4 up, 8 wide, as high as may be
    left, top, right, bottom = head.read_boxes(deltas.flatten(1, 2))[0].view(9, 4)[3].tolist()
    assert (left, right) == pytest.approx((4 - 2, 4 + 2))
    assert (top, bottom) == pytest.approx((125 + 4, 125 - 4))


@torch.no_grad()
def test_retinanet_deltas_survive_the_way_over_boxes(build_tiny):
    head: RetinaNetHead = build_tiny(head="retinanet").head
    deltas = torch.randn(1, 36, 2, 2) / 2
    locations, strides = grid_locations(((2, 2),), (16,), torch.device("cpu"))
    locations, strides = locations.repeat_interleave(9, dim=0), strides.repeat_interleave(9)
    boxes = to_boxes(flatten_levels(head.read_boxes(deltas), 9), locations, strides)
    sizes = head.anchor_sizes.repeat(4, 1) * 16
    anchors = torch.cat((locations - sizes / 2, locations + sizes / 2), dim=1)
    torch.testing.assert_close(to_deltas(boxes, anchors), flatten_levels([deltas], 9), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_retinanet_loss_by_hand(build_tiny):
    # one cell of stride 32 at (16, 16) with anchors from 128 pixels; the object is the second of the nine
    detector = build_tiny(head="retinanet", levels=(5,))
    target = {"boxes": torch.tensor([[-48.0, -48, 80, 80]]), "labels": torch.tensor([1])}
    logits = torch.zeros(1, 9, 2, 1, 1)
    deltas = torch.zeros(1, 9, 4, 1, 1)
    deltas[0, :, 0] = 0.25
    output = DenseOutput((), (logits.flatten(1, 2),), detector.head.read_boxes(deltas.flatten(1, 2)))
    losses = detector.loss(output, [target])
    # IoUs: 0.55, 1, 0.55 with the anchors of its size, 0.52, 0.63, 0.52 with the next, and 0.40 with the largest: below
    # 0.4, so background. p = 1/2 everywhere gives ln 2 / 4, times 0.25 in the six places that should be 1, and 0.75 in
    # the six of the other class and the six of the background
    assert losses["classification"].item() == pytest.approx(math.log(2) / 4 * (0.25 * 6 + 0.75 * (6 + 6)) / 6, rel=1e-5)
    # all six are a quarter too far to the right; in size the square ones are off by nothing, and by ln 2 / 3 each way,
    # the flat and tall ones by ln 2 / 2 each way, or by 5/6 and 1/6 of ln 2
    off = [0, math.log(2), math.log(2), 2 * math.log(2) / 3, math.log(2), math.log(2)]
    assert losses["box"].item() == pytest.approx(0.25 + sum(off) / 6, rel=1e-4)


@torch.no_grad()
def test_several_anchors_of_a_location_are_decoded_each(build_tiny):
    detector = build_tiny(head="retinanet", levels=(4,))
    logits, deltas = torch.full((1, 9, 2, 4, 4), -20.0), torch.zeros(1, 9, 4, 4, 4)
    logits[0, 3, 0, 1, 2] = 3.0  # at (40, 24): 64 pixels across
    logits[0, 0, 1, 1, 2] = 2.0  # flat: 64 sqrt(2) = 90.5 by 45.25
    output = DenseOutput((), (logits.flatten(1, 2),), detector.head.read_boxes(deltas.flatten(1, 2)))
    found = detector.decode(output, [(256, 256)])[0]
    assert found.labels.tolist() == [0, 1]
    assert found.boxes[0].tolist() == pytest.approx([8, 0, 72, 56])
    assert found.boxes[1].tolist() == pytest.approx([0, 24 - 16 * 2**0.5, 40 + 32 * 2**0.5, 24 + 16 * 2**0.5])


def test_a_cut_detector_is_rebuilt(detector, images, tmp_path):
    for tower, outputs in (("class_tower", "class_logits"), ("box_tower", "box_distances")):
        leaves = [f"norms.{n}.{leaf}" for n in range(3) for leaf in ("weight", "bias", "running_mean", "running_var")]
        slices = ((f"head.{outputs}.weight", 1), *((f"head.{tower}.0.{leaf}", 0) for leaf in ("conv.weight", *leaves)))
        cut(detector, Plan((Cut(16, tuple(range(0, 16, 2)), slices),)))
    students.save(detector, tmp_path / "student")
    loaded = students.load(tmp_path / "student")
    assert type(loaded.head) is type(detector.head) and loaded.head.box_distances.in_channels == 8
    with torch.no_grad():
        found, wanted = loaded(images), detector.eval()(images)
    assert all(torch.equal(x, y) for levels in zip(found, wanted) for x, y in zip(*levels))


def test_anchors_are_torchvisions_in_its_order():
    """Else scores that a RetinaNet gives one anchor would be taught to another."""
    model = students.build("retinanet", class_names=["a"], backbone="resnet18", channels=32).model
    boxes = model.anchor_generator.cell_anchors[0]  # of stride 8, rounded to pixels
    ours = torch.tensor(ANCHOR_SIZES) * 8
    torch.testing.assert_close(ours, boxes[:, 2:] - boxes[:, :2], atol=2.5, rtol=0)
    assert (torch.cdist(ours, boxes[:, 2:] - boxes[:, :2]).argmin(dim=1) == torch.arange(9)).all()
