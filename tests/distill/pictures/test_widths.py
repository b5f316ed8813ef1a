from distill.pictures.widths import Width, group_widths
from students.artifact import cut
from students.plan import Cut, Plan, named_tensors


def slices(detector, *parts):
    """The rows of all tensors below some modules."""
    tensors = named_tensors(detector)
    return tuple((name, 0) for name in tensors if name.startswith(parts) and tensors[name].dim())


def test_layers_that_are_cut_alike_are_one_group(build_tiny):
    detector = build_tiny()
    assert group_widths(detector) == []
    pyramid = slices(detector, "neck.outputs.")
    towers = (("head.class_tower.0.conv.weight", 1), ("head.box_tower.0.conv.weight", 1))
    tower = (*slices(detector, "head.class_tower.0."), ("head.class_logits.weight", 1))
    cut(detector, Plan((Cut(16, tuple(range(12)), pyramid + towers), Cut(16, tuple(range(4, 16)), tower))))
    cut(detector, Plan((Cut(12, (0, 1, 2, 5, 6, 7, 8, 9), pyramid + towers),)))
    # from the uncut width to what is there; batch norms and inputs make no groups
    assert group_widths(detector) == [
        Width(("neck.outputs.0.0", "neck.outputs.1.0", "neck.outputs.2.0"), 16, 8),
        Width(("head.class_tower.0.conv",), 16, 12),
    ]
