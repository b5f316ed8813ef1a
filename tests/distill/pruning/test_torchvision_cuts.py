"""torchvision's detectors through the dependency graph."""

import pytest
import torch

import students
from distill.distiller import Distiller
from distill.measure import count_parameters
from distill.pruning.budget import make_plan
from distill.pruning.graph import find_groups
from students.plan import apply_plan, named_tensors

NETS = {
    "fcos": ("fcos", {"head_depth": 1, "channels": 64}),
    "retinanet": ("retinanet", {}),
    "retinanet v2": ("retinanet", {"version": 2, "channels": 64}),
    "faster_rcnn": ("faster_rcnn", {}),
    "faster_rcnn v2": ("faster_rcnn", {"version": 2}),
    "faster_rcnn mobilenet": ("faster_rcnn", {"backbone": "mobilenet_v3_large"}),
    "ssd300": ("ssd300", None),
    "ssdlite320": ("ssdlite320", None),
}


@pytest.mark.parametrize("net", NETS)
def test_channels_that_nothing_reads_can_go(net):
    """Where what reads a channel is zero, cutting the channel changes no output."""
    torch.manual_seed(0)
    family, settings = NETS[net]
    size = (268, 268) if family == "ssd300" else (128, 128)
    settings = {} if settings is None else {"backbone": "resnet18", "channels": 32} | settings
    detector = students.build(family, class_names=["a", "b"], **settings)
    unit = Distiller(detector.eval())
    groups, tensors = find_groups(unit, size), named_tensors(unit)
    names = {member.name for group in groups for member in group.members}
    for part in ("backbone", "head") if family.startswith("ssd") else ("backbone.body", "fpn", "head"):
        assert any(part in name for name in names)
    # SSD300 normalises over channels: there what goes must be zero itself
    dims = (0, 1) if family == "ssd300" else (1,)
    generator = torch.Generator().manual_seed(1)
    scores = [torch.rand(group.width, generator=generator) for group in groups]
    plan = make_plan(groups, scores, [group.width // 2 for group in groups], tensors)
    images, before = torch.rand(2, 3, *size), count_parameters(detector)
    with torch.no_grad():
        for cut in plan.cuts:
            gone = [index for index in range(cut.width) if index not in set(cut.keep)]
            for name, dim in cut.slices:
                if dim in dims:
                    tensors[name].index_fill_(dim, torch.tensor(gone), 0)
        wanted = outputs(detector, images)
        apply_plan([(unit, plan)])
        found = outputs(detector, images)
    assert count_parameters(detector) < 0.6 * before
    for ours, theirs in zip(found, wanted):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def outputs(detector, images):
    """What has the same shape after a cut: all but the pyramid."""
    output = detector(images)
    return detector.traced(output, num_boxes=8)[len(output.features) :]
