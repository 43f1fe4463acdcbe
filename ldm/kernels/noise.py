"""Random numbers keyed by sample, see `ldm.random`, in one kernel instead of more than a hundred.

Every program fills a part of one sample: each Philox block of four words becomes four numbers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCKS = 256  # of four numbers, per program


@triton.jit
def _words(ids, draws, seed, BLOCKS: tl.constexpr):
    sample = tl.program_id(0)
    block = (tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)).to(tl.uint32)
    identity, draw = tl.load(ids + sample), tl.load(draws + sample)
    nothing = tl.zeros_like(block)
    low, high = (identity & 0xFFFFFFFF).to(tl.uint32), ((identity >> 32) & 0xFFFFFFFF).to(tl.uint32)
    counter = block, nothing + (draw & 0xFFFFFFFF).to(tl.uint32), nothing + low, nothing + high
    return tl.philox(seed, counter[0], counter[1], counter[2], counter[3])


@triton.jit
def _positions(BLOCKS: tl.constexpr):
    return 4 * (tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS))


@triton.jit
def _uniform(out, ids, draws, seed, count, BLOCKS: tl.constexpr):
    words = _words(ids, draws, seed, BLOCKS)
    at, start = _positions(BLOCKS), out + tl.program_id(0).to(tl.int64) * count
    for i in tl.static_range(4):
        tl.store(start + at + i, words[i].to(tl.float64) * 2.0**-32, mask=at + i < count)


@triton.jit
def _pair(first, second):
    radius = tl.sqrt(tl.log((first.to(tl.float64) + 0.5) * 2.0**-32) * -2)
    angle = second.to(tl.float64) * (6.283185307179586 * 2.0**-32)
    return (radius * tl.cos(angle)).to(tl.float32), (radius * tl.sin(angle)).to(tl.float32)


@triton.jit
def _normal(out, ids, draws, seed, count, BLOCKS: tl.constexpr):
    words = _words(ids, draws, seed, BLOCKS)
    a, b = _pair(words[0], words[1])
    c, d = _pair(words[2], words[3])
    numbers = a, b, c, d
    at, start = _positions(BLOCKS), out + tl.program_id(0).to(tl.int64) * count
    for i in tl.static_range(4):
        tl.store(start + at + i, numbers[i], mask=at + i < count)


KERNELS = {"uniform": (_uniform, torch.float64), "normal": (_normal, torch.float32)}


def numbers(distribution: str, key: tuple[int, int], ids: Tensor, draws: Tensor, count: int) -> Tensor:
    """Returns `count` numbers for each sample, (b, count), of the distribution "uniform" or "normal".

    `ids` and `draws` are int64 (b,); the two words of the key come from the seed and the stream.
    """
    kernel, dtype = KERNELS[distribution]
    out = torch.empty(len(ids), count, dtype=dtype, device=ids.device)
    programs = len(ids), triton.cdiv(count, 4 * BLOCKS)
    if out.numel():
        with torch.cuda.device_of(ids):  # Triton starts kernels on the current device
            kernel[programs](
                out, ids.contiguous(), draws.contiguous(), key[0] | key[1] << 32, count, BLOCKS, enable_fp_fusion=False
            )
    return out
