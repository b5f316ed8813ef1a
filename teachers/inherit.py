"""A student that starts from what its teacher knows, where the two are built alike."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

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
        For each part the values taken, and how many it has; counters of batch norms are taken, and not counted.

    Raises:
        ValueError: the student has no such part, no weight of a part fits, or there are classes that the teacher does
            not know.
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
        ours = module.state_dict()
        fitting = {key: tensor for key, tensor in ours.items() if key in theirs and theirs[key].shape == tensor.shape}
        # norms and biases of a network of other widths fit here and there, and are worth nothing without its weights
        if has_weights(ours) and not has_weights(fitting):
            raise ValueError(
                f"inherit: no weight in {part} has the teacher's shape; give the student the teacher's widths and "
                f"depths there, such as student.channels and student.head_depth, or leave {part} out"
            )
        for name, tensor in fitting.items():
            tensor.copy_(theirs[name])
        taken[part] = (count_values(fitting), count_values(ours))
    return taken


def has_weights(tensors: Mapping[str, Tensor]) -> bool:
    return any(tensor.dim() > 1 for tensor in tensors.values())


def count_values(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point())
