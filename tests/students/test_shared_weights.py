import pytest
import torch

from students.shared_weights import SharedWeight, pack, unpack


def test_three_bits_in_a_row():
    codebook = torch.arange(8.0)
    shared = SharedWeight(torch.tensor([[5, 1, 7], [0, 2, 3]]), codebook, 3)
    packed = pack(shared)
    # 101 001 111 000 010 011 and six zeros to fill the byte
    assert packed.tolist() == [0b10100111, 0b10000100, 0b11000000]
    assert unpack(packed, codebook, 3, (2, 3)).weight.tolist() == [[5, 1, 7], [0, 2, 3]]


@pytest.mark.parametrize("bits", range(1, 9))
def test_there_and_back(bits):
    indices = torch.randint(2**bits, (3, 5, 3, 3), generator=torch.Generator().manual_seed(bits))
    shared = SharedWeight(indices, torch.rand(2**bits), bits)
    packed = pack(shared)
    assert len(packed) == -(-135 * bits // 8) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, shared.codebook, bits, (3, 5, 3, 3)).indices, indices)
