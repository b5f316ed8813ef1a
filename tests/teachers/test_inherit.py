import pytest
import torch

from teachers import inherit


def test_what_fits_is_taken_and_the_rest_stays(build_tiny):
    student = build_tiny()
    teacher = build_tiny(seed=1, backbone="test_efficientnet")  # other backbone, other widths into the neck
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    taken = inherit(student, teacher, ["neck", "head"])
    theirs = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        part = name.partition(".")[0]
        fits = part in ("neck", "head") and theirs[name].shape == tensor.shape
        assert torch.equal(tensor, theirs[name] if fits else before[name]), name
    tensors = {part: getattr(student, part).state_dict().values() for part in ("neck", "head")}
    whole = {part: sum(t.numel() for t in found if t.is_floating_point()) for part, found in tensors.items()}
    assert taken["head"] == (whole["head"], whole["head"])
    assert 0 < taken["neck"][0] < taken["neck"][1] == whole["neck"]
    assert not any(p.data_ptr() == q.data_ptr() for p, q in zip(student.head.parameters(), teacher.head.parameters()))


def test_parts_within_parts(build_tiny):
    student, teacher = build_tiny(), build_tiny(seed=1)
    taken = inherit(student, teacher, ["neck.laterals"])
    assert torch.equal(student.neck.laterals[0][0].weight, teacher.neck.laterals[0][0].weight)
    assert not torch.equal(student.neck.outputs[0][0].weight, teacher.neck.outputs[0][0].weight)
    assert list(taken) == ["neck.laterals"]


def test_what_cannot_be_inherited_is_said(build_tiny):
    with pytest.raises(ValueError, match="no part 'nek'; it has backbone, neck, head"):
        inherit(build_tiny(), build_tiny(), ["nek"])
    wider = build_tiny(channels=24, backbone="test_efficientnet")
    shapes = {name: t.shape for name, t in wider.head.state_dict().items()}
    student = build_tiny()
    assert any(t.shape == shapes[name] for name, t in student.head.state_dict().items())  # a bias of the class count
    with pytest.raises(ValueError, match="inherit: no weight in head has the teacher's shape; give the student the"):
        inherit(student, wider, ["head"])
    wider.unknown = (1,)
    with pytest.raises(ValueError, match="inherit: the teacher does not know b"):
        inherit(student, wider, ["neck"])
