"""Prepares a text encoder for training of all weights in use, or only of the vectors of a new token."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ldm.nn.backbone import Backbone
from ldm.nn.clip import TextTower
from ldm.nn.text_encoder import TextEncoder


def train_all(encoder: TextEncoder) -> None:
    """Makes every weight trainable that the hidden states depend on, and freezes the others."""
    encoder.requires_grad_(False)
    for tower in encoder.towers:
        for part in (tower.token_embedding, *used_blocks(tower).values(), tower.norm):
            part.requires_grad_(True)
        tower.position_embedding.requires_grad_(True)


def used_blocks(tower: TextTower) -> dict[str, nn.Module]:
    """Returns the blocks that the hidden states depend on, by name; a tower with a `skip` does not run the last."""
    return {f"blocks.{index}": block for index, block in enumerate(tower.blocks[: tower.layers(0)])}


class NewVectors(nn.Module):
    """An embedding table whose n rows starting at `first` are the trained `vectors` (n, d); other rows are frozen."""

    def __init__(self, table: nn.Embedding, first: int, count: int) -> None:
        super().__init__()
        self.table, self.first = table.requires_grad_(False), first
        self.vectors = nn.Parameter(table.weight.detach()[first : first + count].clone())

    @property
    def weight(self) -> Tensor:
        """The complete table, detached from the gradient."""
        rows = self.table.weight.detach().clone()
        rows[self.first : self.first + len(self.vectors)] = self.vectors.detach()
        return rows

    def forward(self, rows: Tensor) -> Tensor:
        index = rows - self.first
        count = len(self.vectors)
        new = (index >= 0) & (index < count)
        return torch.where(new[..., None], self.vectors[index.clamp(0, count - 1)], self.table(rows))


class TextualInversion:
    """Trains only the vectors of a new `token` (textual inversion, Gal et al. 2022).

    The vectors are initialised from those of the words in `initial`, repeated or truncated to `vectors` vectors.
    """

    def __init__(self, token: str, initial: str, vectors: int = 1) -> None:
        if vectors < 1:
            raise ValueError(f"adapter.vectors={vectors}: expected at least 1 vector for the new token")
        self.token, self.initial, self.vectors = token, initial, vectors
        self.ids: list[list[int]] = []  # token ids of the new token, one list per tower

    @property
    def config(self) -> dict[str, Any]:
        return {
            "name": "textual_inversion",
            **{"token": self.token, "initial": self.initial, "vectors": self.vectors},
        }

    def adapt(self, backbone: Backbone, /) -> None:
        backbone.requires_grad_(False)

    def merge(self, backbone: Backbone, /) -> None:
        """Does nothing, because the network is unchanged."""

    def adapt_text(self, encoder: TextEncoder, /) -> None:
        """Adds the token to a text encoder.

        Raises ValueError if the token exists, or if `initial` is empty or has unknown words.
        """
        encoder.requires_grad_(False)
        for tower, tokenizer in zip(encoder.towers, encoder.tokenizers, strict=True):
            try:
                tokenizer.check_new(self.token)
            except ValueError as error:
                raise ValueError(f"adapter.token={self.token!r}: {error}") from error
            if self.vectors > tokenizer.room:
                raise ValueError(
                    f"adapter.vectors={self.vectors}: the text encoder reads at most {tokenizer.room} tokens of a "
                    "caption, and each vector is one of these"
                )
            words = tokenizer.ids(self.initial)
            if not words or (unknown := tower.unknown_tokens(torch.tensor(words))):
                what = f"has words that the text encoder does not know ({tokenizer.words(unknown)})" if words else ""
                raise ValueError(
                    f"adapter.initial={self.initial!r} {what or 'is empty'}: give one or more known words to start "
                    "from, such as the class of the subject"
                )
            chosen = torch.tensor([words[k % len(words)] for k in range(self.vectors)])
            start = tower.token_embedding.weight.detach()[tower.rows(chosen)]
            ids = tower.add_tokens(start)
            first = int(tower.rows(torch.tensor(ids[:1])))
            tower.token_embedding = NewVectors(tower.token_embedding, first, self.vectors)  # type: ignore[assignment]
            tokenizer.add(self.token, ids)
            self.ids.append(ids)

    def trained(self, encoder: TextEncoder) -> Iterator[Tensor]:
        """Yields the vectors (n, d) of each tower."""
        for tower in encoder.towers:
            assert isinstance(tower.token_embedding, NewVectors)
            yield tower.token_embedding.vectors.detach()

    def check_caption(self, encoder: TextEncoder, caption: str) -> None:
        """Raises ValueError if a caption does not contain the token, because it would train nothing."""
        if not all(set(ids) <= set(encoder.tokenize([caption]).flatten().tolist()) for ids in self.ids):
            raise ValueError(
                f"the caption {caption!r} does not contain adapter.token={self.token!r} within the tokens that the "
                "text encoder reads, so that nothing would be trained on it: give captions with the token, such as "
                f"data.caption='a photo of {self.token}'"
            )
