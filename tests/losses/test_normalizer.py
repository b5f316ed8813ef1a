import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from losses import average_across_ranks, dense_sigmoid


def test_alone_the_value_is_its_own_average():
    value = torch.tensor(3.0, requires_grad=True)
    average = average_across_ranks(value)
    assert average.item() == 3.0 and not average.requires_grad
    average += 1
    assert value.item() == 3.0  # a copy, not a view


def _logits() -> tuple[torch.Tensor, torch.Tensor]:
    """Two images of which the teacher is far surer about the first; (2, 3, 4, 4) each."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 4, 4, generator=generator)
    return student, teacher + torch.tensor([2.0, -2.0]).view(2, 1, 1, 1)


def _run_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    value = torch.tensor([1, 10]) if rank == 0 else torch.tensor([3, 20])
    average = average_across_ranks(value)

    # What DistributedDataParallel does with one image a rank: each rank's gradient, then the mean over ranks.
    student, teacher = (logits[rank : rank + 1] for logits in _logits())
    student.requires_grad_()
    dense_sigmoid([student], [teacher]).backward()
    torch.save({"value": value, "average": average, "gradient": student.grad / 2}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_learn_what_one_process_would(tmp_path):
    mp.spawn(_run_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for rank in ranks:
        assert rank["average"].tolist() == [2.0, 15.0]
    assert ranks[1]["value"].tolist() == [3, 20]  # left alone

    student, teacher = _logits()
    student.requires_grad_()
    dense_sigmoid([student], [teacher]).backward()
    torch.testing.assert_close(torch.cat([rank["gradient"] for rank in ranks]), student.grad)
