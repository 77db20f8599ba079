"""Codes to int32 words and back, in the dense layout of compressed-tensors (``pack-quantized``, since 0.18).

Code i of a row takes the bits i·b .. i·b + b - 1 of the row's words, lowest bit first, without padding between codes:
32 codes of b bits fill b words. With 3 bits, c10 and c21 lie across two words:

    word 0   c0 c1 c2 ... c9 | low 2 bits of c10
    word 1   high bit of c10 | c11 ... c20 | low bit of c21
    word 2   high 2 bits of c21 | c22 ... c31

A row whose length is no multiple of 32 ends in a part of such a group: ceil(columns · b / 32) words.
Weights are packed along their input channels, zero points along the output channels (transpose them first).
"""

from __future__ import annotations

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """``codes`` [rows, columns], integers in 0 .. 2^bits - 1, as int32 words [rows, ceil(columns · bits / 32)]."""
    half = 2 ** (bits - 1)
    return pack_to_int32((codes.to(torch.int16) - half).to(torch.int8), bits).contiguous()


def unpack(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The inverse of ``pack``: uint8 codes [rows, columns] of int32 ``words``.

    One strided write a position in the group of 32, for all groups at once: several times faster than the gather of
    compressed-tensors, which matters because the reference kernel unpacks a weight at every forward pass.
    """
    groups = -(-words.shape[-1] // bits)
    words = torch.nn.functional.pad(words, (0, groups * bits - words.shape[-1])).unflatten(-1, (groups, bits))
    codes = torch.empty(*words.shape[:-1], 32, dtype=torch.uint8, device=words.device)
    for i in range(32):
        word, start = divmod(i * bits, 32)
        code = words[..., word] >> start
        here = 32 - start
        if here < bits:  # the shift is arithmetic: clear the copies of the sign before the rest comes in
            code = code & (2**here - 1) | words[..., word + 1] << here
        codes[..., i] = code & (2**bits - 1)
    return codes.flatten(-2)[..., :columns]
