"""Random numbers keyed by (seed, stream, sample id, draw).

The same key gives the same numbers for any batch size, order or number of ranks, because the generator,
Philox-4x32-10 (Salmon et al., SC 2011), is a function of a counter and has no state.
"""

import math
import zlib

import torch
from torch import Tensor

from ldm.kernels.available import can_run

WORD = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Applies ten Philox rounds to 32-bit words, stored in int64 tensors that may broadcast with each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The products are unsigned: int64 overflow keeps all 64 bits, and the mask removes the sign extension.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = ((p1 >> 32) ^ c1).bitwise_xor_(k0).bitwise_and_(WORD)
        c2 = ((p0 >> 32) ^ c3).bitwise_xor_(k1).bitwise_and_(WORD)
        c1, c3 = p1, p0
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1 & WORD, c2, c3 & WORD


def _words(key: tuple[int, int], ids: Tensor, draws: Tensor, count: int) -> Words:
    """Returns at least `count` words per sample, as four tensors (b, ceil(count / 4)) on the device of `ids`."""
    blocks = torch.arange(-(-count // 4), device=ids.device)[None, :]
    column = ids[:, None]
    return philox((blocks, draws[:, None] & WORD, column & WORD, (column >> 32) & WORD), key)


def _uniform(key: tuple[int, int], ids: Tensor, draws: Tensor, count: int) -> Tensor:
    words = torch.stack(_words(key, ids, draws, count), dim=-1).flatten(1)  # (b, 4·blocks)
    return words[:, :count].double() * 2.0**-32


def _normal(key: tuple[int, int], ids: Tensor, draws: Tensor, count: int) -> Tensor:
    w0, w1, w2, w3 = _words(key, ids, draws, count)
    radius = torch.stack((w0, w2), dim=-1).double()  # (b, blocks, 2)
    radius = radius.add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
    angle = torch.stack((w1, w3), dim=-1).double().mul_(2 * math.pi * 2.0**-32)
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)  # (b, blocks, 2, 2)
    return pairs.flatten(1)[:, :count].float()


DISTRIBUTIONS = {"uniform": _uniform, "normal": _normal}


def _numbers(
    distribution: str, seed: int, stream: str, ids: Tensor, draw: int | Tensor, shape: tuple[int, ...]
) -> Tensor:
    """Returns numbers (b, *shape); GPUs compute the same in one kernel where Triton is installed."""
    if not 0 <= seed <= WORD:
        raise ValueError(f"the seed is {seed}, but must be between 0 and {WORD}")
    key = seed, zlib.crc32(stream.encode())
    draws = (draw.to(ids.device) if isinstance(draw, Tensor) else torch.full_like(ids, draw)).expand_as(ids)
    if can_run(ids.device):
        from ldm.kernels.noise import numbers

        flat = numbers(distribution, key, ids, draws, math.prod(shape))
    else:
        flat = DISTRIBUTIONS[distribution](key, ids, draws, math.prod(shape))
    return flat.view(len(ids), *shape)


def uniform(seed: int, stream: str, ids: Tensor, draw: int | Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Returns uniform numbers in [0, 1), float64 (b, *shape), for sample ids (b,) int64; `draw` is an int or (b,)."""
    return _numbers("uniform", seed, stream, ids, draw, shape)


def normal(seed: int, stream: str, ids: Tensor, draw: int | Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns standard normal numbers, float32 (b, *shape), for sample ids (b,) int64; `draw` is an int or (b,).

    Box-Muller is computed in float64 and rounded once, so that devices whose logarithms differ in the last bit agree,
    except for about one number in 10⁸, which is rounded differently.
    """
    return _numbers("normal", seed, stream, ids, draw, shape)
