"""Implements low-rank adapters: LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023), DoRA (Liu et al. 2024)."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from math import inf
from typing import Any

import torch
from torch import nn

from ldm.adapters.low_rank import LowRank
from ldm.adapters.merging import merged
from ldm.adapters.presets import PRESETS
from ldm.adapters.targets import Network, layers, low_rank_layers, replace_layer, targets_of
from ldm.adapters.text import used_blocks
from ldm.nn.text_encoder import TextEncoder

DTYPES = ("bfloat16", "float16", "float32")


class LoRA:
    """Trains only low-rank changes of the layers that `targets` selects (see `targets_of`).

    `rank`, `alpha`, `dropout`, `stabilised` and `decomposed` are defined by `LowRank`. `ranks` maps patterns of layer
    names to other ranks; the first matching pattern applies. The changes are trained in float32. `base_dtype` is the
    dtype in which the weights of all linear and convolution layers are stored, by default unchanged; any dtype except
    float32 requires autocast. `seed` determines the initial values.
    """

    def __init__(
        self,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        stabilised: bool = False,
        decomposed: bool = False,
        targets: str | Sequence[str] = "attention",
        ranks: Mapping[str, int] | None = None,
        base_dtype: str | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 <= dropout < 1:
            raise ValueError(f"adapter.dropout is {dropout}, but must be in [0, 1)")
        if alpha is not None and not (isinstance(alpha, int | float) and 0 < alpha < inf):
            raise ValueError(f"adapter.alpha is {alpha}, but nothing is learned unless it is a positive number")
        if base_dtype not in (None, *DTYPES):
            raise ValueError(f"adapter.base_dtype is {base_dtype}, but must be one of {', '.join(DTYPES)}, or null")
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.stabilised, self.decomposed = stabilised, decomposed
        self.targets = targets if isinstance(targets, str) else list(targets)
        self.ranks, self.base_dtype, self.seed = dict(ranks or {}), base_dtype, seed

    @property
    def config(self) -> dict[str, Any]:
        return {
            "name": "lora",
            "rank": self.rank,
            "alpha": self.alpha,
            "dropout": self.dropout,
            "stabilised": self.stabilised,
            "decomposed": self.decomposed,
            "targets": self.targets,
            "ranks": self.ranks,
            "base_dtype": self.base_dtype,
            "seed": self.seed,
        }

    def adapt(self, network: Network) -> None:
        """Freezes a backbone or text tower and adds trainable changes to its layers."""
        names, generator = targets_of(network, self.targets), torch.Generator().manual_seed(self.seed)
        if unused := [one for one in self.ranks if not any(fnmatchcase(name, one) for name in names)]:
            raise ValueError(
                f"adapter.ranks: {', '.join(unused)} matches none of the layers that adapter.targets chooses"
            )
        network.requires_grad_(False)
        found = layers(network)
        self._before = {name: layer.weight.dtype for name, layer in found.items()}
        if self.base_dtype is not None:
            for layer in found.values():
                layer.weight.data = layer.weight.data.to(getattr(torch, self.base_dtype))
        settings = self.alpha, self.dropout, self.stabilised, self.decomposed
        for name in names:
            replace_layer(network, name, LowRank(found[name], self._rank(name), *settings, generator))

    def adapt_text(self, encoder: TextEncoder) -> None:
        """Adds changes to the same presets of layers in all blocks in use; without a preset, to "attention"."""
        given = [self.targets] if isinstance(self.targets, str) else self.targets
        presets = [one for one in given if one in PRESETS] or ["attention"]
        for tower in encoder.towers:
            chosen = targets_of(tower, presets)
            used = [name for name in chosen if any(name.startswith(f"{block}.") for block in used_blocks(tower))]
            settings = {key: value for key, value in self.config.items() if key not in ("name", "targets", "ranks")}
            LoRA(targets=used, **settings).adapt(tower)

    def _rank(self, name: str) -> int:
        return next((rank for pattern, rank in self.ranks.items() if fnmatchcase(name, pattern)), self.rank)

    def merge(self, network: Network) -> None:
        for name, layer in layers(network).items():
            layer.weight.data = layer.weight.data.to(self._before[name])
        for name, adapted in low_rank_layers(network).items():
            adapted.base.weight.data = merged(adapted.base.weight.data, [(adapted.change, 1.0)])
            replace_layer(network, name, adapted.base)


def remove(network: nn.Module) -> None:
    """Replaces the adapted layers by their plain base layers and discards the changes."""
    for name, adapted in low_rank_layers(network).items():
        replace_layer(network, name, adapted.base)
