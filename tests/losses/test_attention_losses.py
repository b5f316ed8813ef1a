"""What every loss on the attention of feature maps has in common, learnt or not; what each computes is tested by its
own file."""

import pytest
import torch

from losses import (
    FGD,
    AttentionGuided,
    FGDGlobal,
    NonLocalRelation,
    attention_guided,
    attention_transfer,
    fgd_attention,
    fgd_focal,
)

BOXES = [torch.tensor([[2.0, 2, 20, 14], [0, 0, 9, 9]]), torch.zeros(0, 4)]  # on 32 x 32 pixels


def shaken(build):
    """The loss of a module whose learnt blocks are no longer the identity, in the type that it computes in."""

    def loss_of(student, teacher, *more):
        torch.manual_seed(0)
        module = build(student.shape[1], teacher.shape[1])
        for parameter in module.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        return module.to(torch.promote_types(student.dtype, torch.float32))(student, teacher, *more)

    return loss_of


fgd = shaken(lambda _, channels: FGD(channels))
LOSSES = {
    "attention_transfer": attention_transfer,
    "fgd_attention": fgd_attention,
    "fgd_focal": lambda x, y: fgd_focal(x, y, torch.ones(len(x), *x.shape[2:])),
    "FGDGlobal": shaken(lambda _, channels: FGDGlobal(channels)),
    "FGD": lambda x, y: fgd(x, y, BOXES, (32, 32)),
    "attention_guided": lambda x, y: attention_guided(x, x, y),
    "NonLocalRelation": shaken(NonLocalRelation),
    "AttentionGuided": shaken(AttentionGuided),
}


@pytest.fixture(params=LOSSES)
def loss_of(request):
    return LOSSES[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_only_the_student_learns(loss_of, dtype, autocast):
    student = torch.randn(2, 3, 4, 4, dtype=dtype, requires_grad=True)
    teacher = torch.randn(2, 3, 4, 4, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_of(student, teacher)
    assert loss.dtype == torch.float32 and loss.shape == () and loss.isfinite()
    torch.testing.assert_close(loss, loss_of(student.float(), teacher.float()))  # float32 also under autocast
    loss.backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (2, 3, 1, 4)])
def test_maps_of_one_row_or_one_pixel_are_finite(loss_of, shape):
    student = torch.randn(shape, requires_grad=True)
    loss = loss_of(student, torch.randn(shape))
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_memory_format_does_not_matter(loss_of):
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    other = loss_of(student.to(memory_format=torch.channels_last), teacher.to(memory_format=torch.channels_last))
    torch.testing.assert_close(other, loss_of(student, teacher))


# the mask of attention_guided depends on the student too, but is a constant to it: its own file checks the rest
@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"attention_guided", "AttentionGuided"}))
def test_gradients_are_those_of_the_values(name):
    student = torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 2, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, teacher), student)  # smooth almost everywhere


def test_shapes_are_checked(loss_of):
    for other in [(2, 2, 2, 4), (2, 2, 4, 3)]:
        with pytest.raises(ValueError, match=rf"\(2, 2, 4, 4\) and (teacher )?\({', '.join(map(str, other))}\)"):
            loss_of(torch.zeros(2, 2, 4, 4), torch.zeros(other))
    with pytest.raises(ValueError, match=r"must be \(B, C, H, W\), not empty"):
        loss_of(torch.zeros(2, 2, 0, 4), torch.zeros(2, 2, 0, 4))
