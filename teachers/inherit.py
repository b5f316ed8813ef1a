"""A student that starts from what its teacher knows, where the two are built alike."""

from collections.abc import Sequence

import torch

from students import Detector


@torch.no_grad()
def inherit(student: Detector, teacher: Detector, parts: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Copies the teacher's tensors into the student, those of the same name and shape ("inheriting", Yang 2022).

    FGD and MGD (arXiv 2111.11837, 2205.01529) start students so, with the teacher's neck and head. Adam's state and
    averaged copies must be made afterwards.

    Args:
        student: changed in place.
        teacher: anything that shares module names with it.
        parts: names of the student's modules, such as `neck` and `head`, or dotted, `model.backbone.fpn`.

    Returns:
        For each part the parameters taken, and how many it has.

    Raises:
        ValueError: the student has no such part, nothing fits, or there are classes that the teacher does not know.
    """
    if teacher.unknown:
        names = ", ".join(teacher.class_names[label] for label in teacher.unknown)
        raise ValueError(f"inherit: the teacher does not know {names}, and a student could not learn it from there on")
    taken = {}
    for part in parts:
        try:
            module = student.get_submodule(part)
        except AttributeError:
            there = ", ".join(name for name, _ in student.named_children())
            raise ValueError(f"inherit: the student has no part {part!r}; it has {there}") from None
        try:
            theirs = teacher.get_submodule(part).state_dict()
        except AttributeError:
            theirs = {}
        fits = 0
        for name, tensor in module.state_dict().items():
            found = theirs.get(name)
            if found is not None and found.shape == tensor.shape:
                tensor.copy_(found)
                fits += 1 if tensor.dim() == 0 else tensor.numel()
        taken[part] = (fits, sum(tensor.numel() for tensor in module.state_dict().values()))
    if not any(fits for fits, _ in taken.values()):
        raise ValueError(
            f"inherit: nothing in {', '.join(parts)} has the teacher's shapes; give student.channels and "
            "student.head_depth the teacher's values, or leave inherit out"
        )
    return taken
