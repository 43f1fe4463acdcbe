"""Captions → conditioning: the one encoder that training, sampling, evaluation and caches share."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.nn.clip import TextTower
from ldm.nn.tokenizer import Tokenizer


class TextEncoder(nn.Module):
    """One or more text towers, each with its tokenizer, whose states are joined token by token.

    A caption of several `chunks` is split into that many contexts, each of which is encoded by itself.
    """

    def __init__(self, towers: Sequence[TextTower], tokenizers: Sequence[Tokenizer]) -> None:
        super().__init__()
        if not towers or len(towers) != len(tokenizers) or len({tower.context for tower in towers}) > 1:
            raise ValueError("a text encoder needs one or more towers of the same context, each with a tokenizer")
        self.towers: Sequence[TextTower] = nn.ModuleList(towers)  # type: ignore[assignment]
        self.tokenizers = list(tokenizers)

    @property
    def context(self) -> int:
        """Tokens per chunk."""
        return self.towers[0].context

    @property
    def widths(self) -> dict[str, int]:
        """The fields of a `Conditioning` that it gives, and the width of each."""
        return {"text": sum(tower.config["width"] for tower in self.towers)}

    @property
    def settings(self) -> dict[str, int]:
        """What decides the states of a caption besides the weights, as caches of states record it."""
        tower, tokenizer = self.towers[0], self.tokenizers[0]
        return {"text_layers": tower.layers(0), "text_context": tokenizer.context, "text_pad": tokenizer.pad}

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def tokenize(self, captions: list[str], chunks: int = 1) -> Tensor:
        """Tokens (b, towers · chunks · n) on the CPU, one tower after another."""
        return torch.cat([tokenizer(captions, chunks) for tokenizer in self.tokenizers], dim=1)

    def encode(
        self, captions: list[str] | Tensor, chunks: int = 1, skip: int = 0, device: torch.device | None = None
    ) -> Conditioning:
        """The conditioning of captions, or of their tokens; text (b, chunks · n, d), d over all towers.

        `skip` leaves out that many of the last layers. `device` is where the towers compute, by default where their
        weights are.
        """
        tokens = captions if isinstance(captions, Tensor) else self.tokenize(captions, chunks)
        own = tokens.to(device or self.device).chunk(len(self.towers), dim=1)
        states = [_states(tower, ids, chunks, skip) for tower, ids in zip(self.towers, own, strict=True)]
        return Conditioning(text=states[0] if len(states) == 1 else torch.cat(states, dim=-1))

    def cut(self, caption: str, chunks: int = 1) -> str:
        """The end of the caption that no tower has room for in so many chunks, "" if there is none."""
        return min((tokenizer.cut(caption, chunks) for tokenizer in self.tokenizers), key=len)

    def unknown_tokens(self, caption: str) -> list[int]:
        """The tokens of the caption that no tower embeds."""
        unknown = []
        for tower, tokenizer in zip(self.towers, self.tokenizers, strict=True):
            own = {tokenizer.begin, tokenizer.end, tokenizer.pad}
            unknown.append({*tower.unknown_tokens(tokenizer([caption]).to(self.device))} - own)
        return sorted(set.intersection(*unknown))

    def check_skip(self, skip: int) -> None:
        """Raises ValueError where leaving out that many layers would leave none."""
        for tower in self.towers:
            tower.layers(skip)


def _states(tower: TextTower, tokens: Tensor, chunks: int, skip: int) -> Tensor:
    """Tokens (b, chunks · n) → states (b, chunks · n, d), each chunk encoded by itself."""
    split = tokens.unflatten(1, (chunks, -1)).flatten(0, 1).contiguous()  # (b · chunks, n)
    return tower(split, skip).unflatten(0, (len(tokens), chunks)).flatten(1, 2)
