"""YOLO detectors through the dependency graph: joined and added maps, pooling, merged convolutions, the head."""

import pytest
import torch

import students
from distill.distiller import Distiller
from distill.measure import count_parameters
from distill.pruning.budget import make_plan
from distill.pruning.graph import find_groups
from students.plan import apply_plan, named_tensors

SMALL = {
    "yolov4": {"width": 0.25, "depth": 0.2},
    "yolov5": {"size": "n", "depth": 0.4},
    "yolov7": {"width": 0.25},
    "yolov7_tiny": {"width": 0.5},
}


@pytest.mark.parametrize("family", SMALL)
def test_channels_that_nothing_reads_can_go(family, tmp_path, images, targets):
    """Where what reads a channel is zero, cutting the channel changes no output."""
    torch.manual_seed(0)
    size = (64, 64)
    detector = students.build(family, class_names=["a", "b"], **SMALL[family])
    unit = Distiller(detector.eval())
    groups, tensors = find_groups(unit, size), named_tensors(unit)
    cut = {(member.name, member.dim) for group in groups for member in group.members}
    kept = {f"student.{name}.weight" for name, module in detector.named_modules() if module in detector.output_layers}
    whole = [name for name, x in tensors.items() if x.dim() == 4 and (name, 0) not in cut and name not in kept]
    assert whole == [] and not any((name, 0) in cut for name in kept)
    assert all((name, 1) in cut for name in kept)

    generator = torch.Generator().manual_seed(1)
    scores = [torch.rand(group.width, generator=generator) for group in groups]
    plan = make_plan(groups, scores, [group.width // 2 for group in groups], tensors)
    before = count_parameters(detector)
    with torch.no_grad():
        for part in plan.cuts:
            gone = [index for index in range(part.width) if index not in set(part.keep)]
            for name, dim in part.slices:
                if dim == 1:
                    tensors[name].index_fill_(dim, torch.tensor(gone), 0)
        wanted = detector(images)
        apply_plan([(unit, plan)])
        found = detector(images)
    assert count_parameters(detector) < 0.4 * before
    for ours, theirs in zip(found[1:], wanted[1:]):
        for x, y in zip(ours, theirs):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        deployed = detector.deployed()(images)
    for x, y in zip(deployed.class_logits, found.class_logits):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)

    # rebuilt as it is now, and it learns on
    detector.plans.append(plan.below("student."))
    students.save(detector, tmp_path / "student")
    loaded = students.load(tmp_path / "student")
    with torch.no_grad():
        assert all(map(torch.equal, loaded(images).class_logits, found.class_logits))
    output = detector.train()(images)
    assert [x.shape[1] for x in output.features] == list(detector.feature_channels)
    sum(detector.loss(output, targets).values()).backward()
    assert all(p.grad.shape == p.shape for p in detector.parameters())
