"""CLIP: a text tower, an image tower and their contrastive head (Radford et al. 2021, arXiv:2103.00020)."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

END = 49407  # CLIP's end-of-text token, whose hidden state represents the caption


def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid approximation of GELU with which OpenAI's weights were trained."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class SelfAttention(nn.Module):
    """Multi-head self-attention over (b, n, d); if `causal`, a token attends to itself and earlier tokens only."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        split = (self.heads, -1)
        q, k, v = (p(x).unflatten(2, split).transpose(1, 2) for p in (self.q, self.k, self.v))  # (b, heads, n, d/heads)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(x.transpose(1, 2).flatten(2))  # (b, n, d)


class Block(nn.Module):
    """Pre-norm transformer block: self-attention, then an MLP of four times the width."""

    def __init__(self, width: int, heads: int, activation: str, causal: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


def blocks(width: int, layers: int, heads: int, activation: str, causal: bool) -> nn.ModuleList:
    """Returns the blocks of a tower with CLIP's initialisation, which scales the layers that add to the residual stream
    by 1/sqrt(2·layers)."""
    if width % heads:
        raise ValueError(f"a tower of width {width} cannot be split into {heads} heads: choose a divisor of the width")
    if activation not in ACTIVATIONS:
        raise ValueError(f"the activation is '{activation}', but must be one of {', '.join(ACTIVATIONS)}")
    tower = nn.ModuleList(Block(width, heads, activation, causal) for _ in range(layers))
    residual = (2 * layers) ** -0.5
    for block in tower.children():
        for name, linear in block.named_modules():
            if isinstance(linear, nn.Linear):
                std = (2 * width if name == "fc1" else width) ** -0.5
                nn.init.normal_(linear.weight, std=std * (residual if name in ("attention.out", "fc2") else 1))
                nn.init.zeros_(linear.bias)
    return tower


def check_token_ids(token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises ValueError unless the ids increase strictly and are in the vocabulary."""
    ids = list(token_ids)
    if not ids or ids != sorted(set(ids)) or ids[0] < 0 or ids[-1] >= vocab_size:
        raise ValueError(f"token_ids must be at least one id, strictly increasing, from 0 to {vocab_size - 1}")


class TextTower(nn.Module):
    """CLIP's text transformer; the defaults are those of ViT-L/14, the text encoder of Stable Diffusion 1.x.

    Stable Diffusion 2.x has width=1024, layers=24, heads=16, activation="gelu", skip=1. `skip` is the number of last
    layers that `forward` skips; `pooled` and `embed` run all layers. `token_ids`, strictly increasing, limits the
    vocabulary of a small tower: row i of its embedding table is that of token_ids[i], the last row that of every other
    token.
    """

    known: Tensor | None

    def __init__(
        self,
        vocab_size: int = 49408,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        context: int = 77,
        activation: str = "quick_gelu",
        projection: int | None = None,
        skip: int = 0,
        token_ids: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if token_ids is not None:
            check_token_ids(token_ids, vocab_size)
        self.config: dict[str, Any] = {
            "vocab_size": vocab_size,
            "width": width,
            "layers": layers,
            "heads": heads,
            "context": context,
            "activation": activation,
            "projection": projection,
            "skip": skip,
            "token_ids": None if token_ids is None else list(token_ids),
        }
        self.context = context
        self.skip = skip
        self.next_id = vocab_size  # id of the next new token
        # part of the state dict, so that loading weights restores it in a tower built on the meta device
        self.register_buffer("known", None if token_ids is None else torch.tensor(token_ids, dtype=torch.int64))
        self.token_embedding = nn.Embedding(vocab_size if token_ids is None else len(token_ids) + 1, width)
        self.position_embedding = nn.Parameter(torch.empty(context, width))
        self.blocks = blocks(width, layers, heads, activation, causal=True)
        self.norm = nn.LayerNorm(width)
        self.projection = None if projection is None else nn.Linear(width, projection, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding, std=0.01)
        if self.projection is not None:
            nn.init.normal_(self.projection.weight, std=width**-0.5)

    def forward(self, tokens: Tensor, skip: int = 0) -> Tensor:
        """Returns the hidden states (b, n, d) of tokens (b, n) after the final norm, skipping `skip` more layers."""
        return self._hidden(tokens, self.layers(skip))

    def layers(self, skip: int) -> int:
        """Returns the number of layers that `forward` runs with this `skip`. Raises ValueError if it is zero."""
        skipped = self.skip + skip
        if not 0 <= skipped < len(self.blocks):
            raise ValueError(f"a text tower of {len(self.blocks)} layers cannot skip {skipped} of them")
        return len(self.blocks) - skipped

    def pooled(self, tokens: Tensor) -> Tensor:
        """Returns the last layer's state (b, d) at the first end token of each caption; every row must have one."""
        hidden = self._hidden(tokens, len(self.blocks))
        end = (tokens == END).int().argmax(dim=1)  # the first one, because captions may be padded with this token
        return hidden[torch.arange(len(tokens), device=tokens.device), end]

    def embed(self, tokens: Tensor) -> Tensor:
        """Projects captions (b, n) to the joint embedding space: (b, p), not normalised."""
        if self.projection is None:
            raise ValueError("this text tower has no projection: build it with projection=P to compare with images")
        return self.projection(self.pooled(tokens))

    def add_tokens(self, vectors: Tensor) -> list[int]:
        """Embeds new tokens by vectors (n, d), and returns their ids, which no other token has."""
        table = self.token_embedding.weight
        vectors = vectors.to(table)
        if self.known is None:
            first, rows = self.next_id, torch.cat([table.detach(), vectors])
        else:  # the last row stays that of every other token
            first = self.next_id
            rows = torch.cat([table.detach()[:-1], vectors, table.detach()[-1:]])
            self.known = torch.cat([self.known, first + torch.arange(len(vectors), device=self.known.device)])
        self.token_embedding = nn.Embedding.from_pretrained(rows, freeze=not table.requires_grad)
        self.next_id = first + len(vectors)
        return list(range(first, self.next_id))

    def unknown_tokens(self, tokens: Tensor) -> list[int]:
        """Returns the ids in `tokens` that are not in the tower's vocabulary, each once, in order of appearance."""
        if self.known is None:
            return []
        return list(dict.fromkeys(tokens[~torch.isin(tokens, self.known)].tolist()))

    def _hidden(self, tokens: Tensor, layers: int) -> Tensor:
        n = tokens.shape[1]
        if n > self.context:
            raise ValueError(f"the captions have {n} tokens, but this text tower takes at most {self.context}")
        x = self.token_embedding(self.rows(tokens)) + self.position_embedding[:n]
        for block in self.blocks[:layers]:
            x = block(x)
        return self.norm(x)

    def rows(self, tokens: Tensor) -> Tensor:
        """Returns the row of each token in the embedding table."""
        if self.known is None:
            return tokens
        row = torch.searchsorted(self.known, tokens)
        unknown = len(self.known)
        return torch.where(self.known[row.clamp(max=unknown - 1)] == tokens, row, unknown)


class ImageTower(nn.Module):
    """CLIP's vision transformer; OpenAI's ViT-L/14 is (224, 14, 1024, 24, 16, projection=768).

    Images are floats (b, 3, size, size), normalised as in training: to [-1, 1] for weights trained by ldm, by CLIP's
    channel means and standard deviations for OpenAI's.
    """

    def __init__(
        self,
        size: int,
        patch: int,
        width: int,
        layers: int,
        heads: int,
        projection: int | None = None,
        activation: str = "quick_gelu",
    ) -> None:
        super().__init__()
        if size % patch:
            raise ValueError(f"images of {size} pixels cannot be cut into patches of {patch} pixels: choose a divisor")
        self.config: dict[str, Any] = {
            "size": size,
            "patch": patch,
            "width": width,
            "layers": layers,
            "heads": heads,
            "projection": projection,
            "activation": activation,
        }
        self.size = size
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.position_embedding = nn.Parameter(torch.empty((size // patch) ** 2 + 1, width))
        self.pre_norm = nn.LayerNorm(width)
        self.blocks = blocks(width, layers, heads, activation, causal=False)
        self.post_norm = nn.LayerNorm(width)
        self.projection = None if projection is None else nn.Linear(width, projection, bias=False)
        nn.init.normal_(self.class_embedding, std=width**-0.5)
        nn.init.normal_(self.position_embedding, std=0.5)  # the scale of a patch; with less, positions are learned late
        if self.projection is not None:
            nn.init.normal_(self.projection.weight, std=width**-0.5)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the last layer's hidden states (b, 1 + patches, d), class token first, before the post-norm."""
        if images.shape[1:] != (3, self.size, self.size):
            raise ValueError(
                f"the images have shape {tuple(images.shape[1:])}, but this tower takes (3, {self.size}, {self.size})"
            )
        x = self.patch_embedding(images).flatten(2).transpose(1, 2)  # (b, h·w, d)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)  # (b, 1 + h·w, d)
        x = self.pre_norm(x + self.position_embedding)
        for block in self.blocks:
            x = block(x)
        return x

    def pooled(self, images: Tensor) -> Tensor:
        """Returns the class token's state (b, d) after the post-norm."""
        return self.post_norm(self(images)[:, 0])

    def embed(self, images: Tensor) -> Tensor:
        """Projects images to the joint embedding space: (b, p), not normalised."""
        if self.projection is None:
            raise ValueError("this image tower has no projection: build it with projection=P to compare with text")
        return self.projection(self.pooled(images))


class CLIP(nn.Module):
    """Both towers and the learned scale of their cosine similarities, stored as its logarithm."""

    def __init__(self, text: TextTower, image: ImageTower) -> None:
        super().__init__()
        widths = text.config["projection"], image.config["projection"]
        if None in widths or widths[0] != widths[1]:
            raise ValueError(
                f"the towers project to {widths[0]} and {widths[1]} dimensions: give both the same projection"
            )
        self.config: dict[str, Any] = {"text": text.config, "image": image.config}
        self.text = text
        self.image = image
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, tokens: Tensor, images: Tensor) -> Tensor:
        """Returns the scaled cosine similarities (c, i) of c captions, tokens (c, n), and i images (i, 3, h, w)."""
        text = F.normalize(self.text.embed(tokens), dim=-1)
        image = F.normalize(self.image.embed(images), dim=-1)
        return self.logit_scale.exp() * text @ image.T


def clip_from_configs(text: dict[str, Any], image: dict[str, Any]) -> CLIP:
    """Builds a CLIP from the configs of its towers."""
    return CLIP(TextTower(**text), ImageTower(**image))
