"""Published files: made here, as the real ones cannot be had, from networks with their modules' and layers' names."""

import struct
import sys
import types

import numpy as np
import pytest
import torch
import yolo_published
from safetensors.torch import save_file

import students
from students.yolo.blocks import Conv
from students.yolo.weights import published_blocks


@pytest.fixture
def publish(small_settings, shake, monkeypatch, tmp_path):
    """Writes a file as a family's authors do, of a network whose modules' classes only they have; gives its path and
    the network."""
    module = types.ModuleType("models.common")
    for name, kind in vars(yolo_published).items():
        if isinstance(kind, type):
            monkeypatch.setattr(kind, "__module__", "models.common")
            setattr(module, name, kind)

    def publish(family, num_classes=2, names=None, key="model"):
        torch.manual_seed(5)
        names = names or [f"name {n}" for n in range(num_classes)]
        settings = {"width": 1.0, "depth": 0.33} | small_settings[family]
        network = yolo_published.Model(family, settings["width"], settings["depth"], num_classes, names)
        shake(network).half().float()  # as exact as the file will be
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "models", types.ModuleType("models"))
            patch.setitem(sys.modules, "models.common", module)
            torch.save({"epoch": 3, key: network.half(), "optimizer": None}, tmp_path / f"{family}.pt")
        return tmp_path / f"{family}.pt", network.float()

    return publish


@pytest.mark.parametrize("family", yolo_published.NETWORKS)
@pytest.mark.parametrize("key", ["model", "ema"])
def test_a_published_network_says_what_it_said(build_small, publish, images, family, key):
    path, network = publish(family, key=key)
    detector = build_small(family, weights=str(path)).eval()
    assert detector.recipe["weights"] == "none"
    with torch.no_grad():
        output, wanted = detector(images), network(images)
    for level, stride in enumerate((8, 16, 32)):
        raw = wanted[level].unflatten(1, (3, 7))  # (B, 3, 7, H, W): x, y, w, h, object, classes
        torch.testing.assert_close(output.objectness[level], raw[:, :, 4], atol=1e-4, rtol=1e-4)
        classes = output.conditional_logits[level].unflatten(1, (3, 2))
        torch.testing.assert_close(classes, raw[:, :, 5:], atol=1e-4, rtol=1e-4)
        # as the authors read them: centre (2 s - 0.5 + cell) * stride, size (2 s)^2 * anchor
        s = raw[:, :, :4].sigmoid()
        rows, columns = torch.meshgrid(*(torch.arange(n) for n in s.shape[-2:]), indexing="ij")
        centre = (2 * s[:, :, :2] - 0.5 + torch.stack((columns, rows))) * stride
        size = (2 * s[:, :, 2:]) ** 2 * network.model[-1].anchors[level][..., None, None] * stride
        boxes = torch.cat((centre - size / 2, centre + size / 2), dim=2)
        ours = output.box_distances[level].unflatten(1, (3, 4)) * stride
        middle = (torch.stack((columns, rows)) + 0.5) * stride
        ours = torch.cat((middle - ours[:, :, :2], middle + ours[:, :, 2:]), dim=2)
        torch.testing.assert_close(ours, boxes, atol=1e-3, rtol=1e-4)


def test_classes_are_found_by_name(build_small, publish):
    path, network = publish("yolov5", num_classes=4, names={0: "cat", 1: "b", 2: "a", 3: "dog"})
    detector = build_small("yolov5", weights=str(path))  # of a and b
    wanted = network.model[-1].m[1].weight.view(3, 9, -1)[:, [7, 6]]
    torch.testing.assert_close(detector.head.class_logits[1].weight.view(3, 2, -1), wanted, atol=1e-3, rtol=1e-3)
    assert detector.notes == []


def test_classes_of_other_names_are_told(build_small, publish):
    path, _ = publish("yolov5", names=["cat", "dog"])
    assert build_small("yolov5", weights=str(path)).notes == [
        f"its 2 classes are taken for those of {path} in their order, cat, dog"
    ]


@pytest.mark.parametrize("family", yolo_published.NETWORKS)
def test_other_classes_are_refused_unless_the_head_is_new(build_small, publish, family):
    path, network = publish(family, num_classes=5)
    with pytest.raises(ValueError) as error:
        build_small(family, weights=str(path))
    assert str(error.value) == (
        f"weights: {path} has 5 classes, none of them 'a', here there are 2; say new_head: true to start the class "
        "layers anew"
    )
    detector, fresh = build_small(family, weights=str(path), new_head=True), build_small(family)
    assert detector.notes == [f"its class layers start anew, all else comes from {path}"]
    assert torch.equal(detector.head.class_logits[0].weight, fresh.head.class_logits[0].weight)
    assert not torch.equal(detector.head.objectness[0].weight, fresh.head.objectness[0].weight)
    assert torch.equal(next(published_blocks(detector)).conv.weight, network.model[0].conv.weight)
    assert torch.equal(detector.head.anchor_sizes[2], network.model[-1].anchors[2] * 32)


def test_another_networks_file_is_told_by_its_first_differences(build_small, publish):
    path, _ = publish("yolov7_tiny")
    with pytest.raises(ValueError) as error:
        build_small("yolov5", weights=str(path))
    message = str(error.value)
    assert message.startswith(
        f"weights: {path} is of another network: it lacks model.2.cv1.conv.weight (8, 16, 1, 1) and "
    )
    assert "; model.0.conv.weight is (8, 3, 3, 3), here (8, 3, 6, 6) and " in message
    assert "; it has 56 layers, this network 19; give the settings it was made with" in message
    assert "\n" not in message
    # the same network in another width
    with pytest.raises(ValueError, match=r"another network: model\.0\.conv\.weight is \(8, 3, 3, 3\), here \(16, 3, 3"):
        build_small("yolov7_tiny", width=0.5, weights=str(path))


@pytest.mark.parametrize("change", ["less", "more", "deeper"])
def test_every_tensor_has_its_place(build_small, publish, tmp_path, change):
    _, network = publish("yolov5")
    tensors = dict(network.state_dict())
    if change == "less":
        del tensors["model.9.cv1.bn.running_mean"]
        message = r"it lacks model\.9\.cv1\.bn\.running_mean \(64\)"
    elif change == "more":
        tensors["model.2.cv4.conv.weight"] = torch.zeros(3, 1)
        message = r"it has model\.2\.cv4\.conv\.weight \(3, 1\), which is not here"
    else:
        tensors["more.weight"] = torch.zeros(2)
        message = r"it has more\.weight \(2\), which is not here"
    save_file({name: x.contiguous() for name, x in tensors.items()}, tmp_path / "changed.safetensors")
    with pytest.raises(ValueError, match=f"is of another network: {message}; give the settings it was made with$"):
        build_small("yolov5", weights=str(tmp_path / "changed.safetensors"))


def test_plain_tensors_do_as_well(build_small, publish, tmp_path):
    _, network = publish("yolov5")
    state = {
        f"module.{name}": x for name, x in network.state_dict().items() if not name.endswith("num_batches_tracked")
    }
    torch.save({"state_dict": state}, tmp_path / "state.pth")
    detector = build_small("yolov5", weights=str(tmp_path / "state.pth"))
    assert torch.equal(detector.neck.up5.cv3.conv.weight, network.model[23].cv3.conv.weight)
    torch.save({"layer.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"has no numbered layers, such as model\.0\.conv\.weight, but layer\.weight"):
        build_small("yolov5", weights=str(tmp_path / "other.pth"))
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        build_small("yolov5", weights=str(tmp_path / "text.safetensors"))


def test_a_darknet_file_fills_layer_after_layer(build_small, tmp_path):
    generator = np.random.default_rng(0)
    content, layers, cursor = [], [], 0
    fresh = build_small("yolov4")
    for item in fresh.darknet_order():
        if isinstance(item, Conv):
            out, columns, kernel, _ = item.conv.weight.shape
            parts = [generator.random(out, dtype=np.float32) for _ in range(4)]
            parts.append(generator.standard_normal((out, columns, kernel, kernel), dtype=np.float32))
        else:
            columns = fresh.head.boxes[item].in_channels
            parts = [generator.standard_normal(21, dtype=np.float32)]
            parts.append(generator.standard_normal((21, columns, 1, 1), dtype=np.float32))
        layers.append(parts)
        content += [part.tobytes() for part in parts]
        cursor += sum(part.size for part in parts)
    path = tmp_path / "yolov4.weights"
    path.write_bytes(struct.pack("<iiiq", 0, 2, 5, 32013312) + b"".join(content))
    detector = build_small("yolov4", weights=str(path))
    assert detector.recipe["weights"] == "none"

    order = list(detector.darknet_order())
    for item, parts in zip(order, layers):
        parts = [torch.from_numpy(part) for part in parts]
        if isinstance(item, Conv):
            bias, weight, mean, variance, kernel = parts
            assert torch.equal(item.bn.bias, bias) and torch.equal(item.bn.weight, weight)
            assert torch.equal(item.bn.running_mean, mean) and torch.equal(item.bn.running_var, variance)
            assert torch.equal(item.conv.weight, kernel)
        else:
            bias, weight = parts[0].view(3, 7), parts[1].view(3, 7, -1)
            head = detector.head
            assert torch.equal(head.boxes[item].bias, bias[:, :4].flatten())
            assert torch.equal(head.objectness[item].weight.flatten(1), weight[:, 4])
            assert torch.equal(head.class_logits[item].weight.view(3, 2, -1), weight[:, 5:])

    # other classes: their number follows from the length
    with pytest.raises(ValueError, match=r"has 2 classes, without names, here there are 3; say new_head: true"):
        build_small("yolov4", weights=str(path), class_names=["a", "b", "c"])
    anew = build_small("yolov4", weights=str(path), class_names=["a", "b", "c"], new_head=True)
    assert torch.equal(anew.backbone.stem.conv.weight, detector.backbone.stem.conv.weight)
    # older versions count images in four bytes
    path.write_bytes(struct.pack("<iiii", 0, 1, 0, 7) + b"".join(content))
    old = build_small("yolov4", weights=str(path))
    assert torch.equal(old.head.boxes[2].weight, detector.head.boxes[2].weight)

    path.write_bytes(struct.pack("<iiiq", 0, 2, 5, 0) + b"".join(content)[:-4])
    with pytest.raises(ValueError, match=rf"holds {cursor - 1} numbers, .* with 2 it has {cursor}, its first conv"):
        build_small("yolov4", weights=str(path))
    path.write_bytes(b"a text of some length, longer than a header")
    with pytest.raises(ValueError, match="is no Darknet file"):
        build_small("yolov4", weights=str(path))


def test_darknets_order_at_full_width():
    """Output channels in the order that the published configuration lists them in."""
    with torch.device("meta"):
        detector = students.build("yolov4", class_names=["a"])
    widths = [item if isinstance(item, int) else item.out_channels for item in detector.darknet_order()]
    stages = [64, 64, 64, 32, 64, 64, 64]
    for channels, number in ((128, 2), (256, 8), (512, 8), (1024, 4)):
        half = channels // 2
        stages += [channels, half, half, *[half, half] * number, half, channels]
    down = [512, 1024, 512, 512, 1024, 512, 256, 256, 256, 512, 256, 512, 256, 128, 128, 128, 256, 128, 256, 128]
    up4, up5 = [256, 256, 512, 256, 512, 256, 512], [512, 512, 1024, 512, 1024, 512, 1024]
    assert widths == [32, *stages, *down, 256, 0, *up4, 1, *up5, 2]
    assert len([item for item in widths if item > 2]) + 3 == 110  # convolutions of the configuration
