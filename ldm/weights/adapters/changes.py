"""Builds the change of one layer from the tensors of a file."""

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from ldm.adapters.change import Change, FullChange, LowRankChange, Shape

Parts = Mapping[str, Tensor]
LORA = {"down", "up"}
HADAMARD = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}


def change_of(parts: Parts, alpha: float | None, shape: Shape) -> Change:
    """Returns the change of a weight of this shape, or of another shape if the tensors do not fit.

    The scale is alpha / rank, or 1 without `alpha`. Raises ValueError if the tensors do not form a change.
    """
    rank: int | None
    given = parts.keys() - {"alpha", "magnitude", "output magnitude"}
    for part, tensor in parts.items():
        if part != "alpha" and not (tensor.ndim and tensor.is_floating_point()):
            raise ValueError(f"holds {part} {list(tensor.shape)} of {tensor.dtype}, but needs a floating-point tensor")
    if given >= LORA and given <= LORA | {"mid"}:
        return _low_rank(parts, alpha)
    if given >= HADAMARD and given <= HADAMARD | {"hada_t1", "hada_t2"}:
        delta, rank = _hadamard(parts), len(parts["hada_w1_b"])
    elif given and all(one.startswith("lokr_") for one in given):
        delta, rank = _kronecker(parts)
    else:
        raise ValueError(f"holds {', '.join(sorted(given)) or 'nothing'}, which is not all of a change")
    scale = 1.0 if alpha is None or rank is None else alpha / rank
    whole = delta.view(shape) if delta.numel() == prod(shape) and delta.shape[0] == shape[0] else delta
    return FullChange(scale * whole, _magnitude(parts, tuple(whole.shape)))


def _low_rank(parts: Parts, alpha: float | None) -> LowRankChange:
    down, up = parts["down"], parts["up"]
    if "mid" in parts:  # the Tucker core is multiplied into the down factor
        core = parts["mid"].float()
        if core.ndim != 4 or core.shape[1] != len(down):
            raise ValueError(f"holds a core {list(core.shape)}, which does not fit its factor {list(down.shape)}")
        down = torch.einsum("rskl,sc->rckl", core, down.float().flatten(1))
        up = up.float()
    if up.ndim not in (2, 4) or down.ndim not in (2, 4) or up.shape[1] != len(down) or prod(up.shape[2:]) != 1:
        raise ValueError(f"holds factors {list(down.shape)} and {list(up.shape)}, which cannot be multiplied")
    up = up.reshape(*up.shape[:2], *[1] * (down.ndim - 2))
    magnitude = _magnitude(parts, (len(up), *down.shape[1:]))
    return LowRankChange(down, up, float(len(down) if alpha is None else alpha), magnitude)


def _magnitude(parts: Parts, shape: Shape) -> Tensor | None:
    """Returns the magnitude of outputs, (out, 1[, 1, 1]), or of inputs, (1, in[, 1, 1]), as its shape implies."""
    outputs, inputs, *kernel = shape
    ones = [1] * len(kernel)
    if (vector := parts.get("output magnitude")) is not None:
        if vector.numel() != outputs:
            raise ValueError(f"holds a magnitude {list(vector.shape)} for {outputs} outputs")
        return vector.reshape(outputs, 1, *ones)
    if (vector := parts.get("magnitude")) is None:
        return None
    found = tuple(vector.shape)
    if vector.numel() == outputs and (found[0] == outputs and (len(found) > 1 or outputs != inputs)):
        return vector.reshape(outputs, 1, *ones)
    if vector.numel() == inputs and (found[0] == inputs != outputs or found[:2] == (1, inputs)):
        return vector.reshape(1, inputs, *ones)
    raise ValueError(
        f"holds a magnitude {list(found)} for {outputs} outputs and {inputs} inputs, which does not say whose it is"
        if vector.numel() in (outputs, inputs)
        else f"holds a magnitude {list(found)} for {outputs} outputs and {inputs} inputs"
    )


def _hadamard(parts: Parts) -> Tensor:
    """Returns ΔW of LoHa (Hyeon-Woo et al. 2022), the elementwise product of two low-rank matrices."""
    one, two = (_product(parts[f"hada_w{k}_a"], parts[f"hada_w{k}_b"], parts.get(f"hada_t{k}")) for k in (1, 2))
    return one * two


def _kronecker(parts: Parts) -> tuple[Tensor, int | None]:
    """Returns ΔW of LoKr (Edalati et al. 2022), the Kronecker product of two matrices, and the rank of their factors.

    Each matrix is stored in full or as two factors. The rank is None if neither matrix is factorised.
    """
    factors, rank = [], None
    for k in (1, 2):
        if f"lokr_w{k}" in parts:
            factors.append(parts[f"lokr_w{k}"].float())
        elif f"lokr_w{k}_a" in parts and f"lokr_w{k}_b" in parts:
            factors.append(_product(parts[f"lokr_w{k}_a"], parts[f"lokr_w{k}_b"], parts.get(f"lokr_t{k}")))
            rank = len(parts[f"lokr_w{k}_b"])
        else:
            raise ValueError(f"holds {', '.join(sorted(parts))}, which is not all of a change")
    one, two = factors
    one = one.view(*one.shape, *[1] * (two.ndim - one.ndim))
    return torch.kron(one.contiguous(), two.contiguous()), rank


def _product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """Returns a · b or, with a Tucker core (r, r, k, k), Σ core[i, j] · a[i, o] · b[j, c], (o, c, k, k)."""
    if core is None:
        return a.float() @ b.float()
    return torch.einsum("ijkl,io,jc->ockl", core.float(), a.float(), b.float())
