"""The packed words, bit by bit, and against compressed-tensors."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from mbq.packing import pack, unpack

BITS = (2, 3, 4, 8)


def slow_pack(codes: list[int], bits: int) -> list[int]:
    """One row: write every code's bits into one long integer, cut it into words, and read those as signed."""
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    words = [(number >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(codes) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@st.composite
def rows_of_codes(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    bits = draw(st.sampled_from(BITS))
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 140))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8), bits


@settings(max_examples=100, deadline=None)
@given(rows_of_codes())
def test_words_are_dense_and_little_endian(case: tuple[torch.Tensor, int]) -> None:
    codes, bits = case
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.tolist() == [slow_pack(row, bits) for row in codes.tolist()]


@settings(max_examples=100, deadline=None)
@given(rows_of_codes())
def test_unpack_is_the_inverse(case: tuple[torch.Tensor, int]) -> None:
    codes, bits = case
    words = torch.tensor([slow_pack(row, bits) for row in codes.tolist()], dtype=torch.int32)
    assert torch.equal(unpack(words, bits, codes.shape[1]), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 128, 200])
def test_compressed_tensors_reads_and_writes_the_same_words(bits: int, columns: int) -> None:
    torch.manual_seed(columns)
    codes = torch.randint(0, 2**bits, (5, columns), dtype=torch.uint8)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack(codes, bits), pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(pack(codes, bits), bits, codes.shape), signed)
    assert torch.equal(pack(codes.T, bits).T, pack_to_int32(signed, bits, packed_dim=0))
    assert torch.equal(unpack(pack_to_int32(signed, bits, packed_dim=0).T, bits, 5).T, codes)


def test_three_bits_take_three_bits() -> None:
    assert pack(torch.zeros(7, 256, dtype=torch.uint8), 3).nbytes * 8 == 7 * 256 * 3
