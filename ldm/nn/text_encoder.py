"""The text encoder, which turns captions into conditioning for training, sampling, evaluation and caches."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.nn.clip import TextTower
from ldm.nn.tokenizer import Tokenizer


class TextEncoder(nn.Module):
    """One or more text towers, each with its own tokenizer, whose hidden states are concatenated per token.

    A caption can be split into several `chunks` of one context each, which are encoded separately.
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
        """The fields of the `Conditioning` that `encode` returns, with the width of each."""
        return {"text": sum(tower.config["width"] for tower in self.towers)}

    @property
    def settings(self) -> dict[str, int]:
        """The settings that change the states of a caption, besides the weights; caches of states record them."""
        tower, tokenizer = self.towers[0], self.tokenizers[0]
        return {"text_layers": tower.layers(0), "text_context": tokenizer.context, "text_pad": tokenizer.pad}

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def tokenize(self, captions: list[str], chunks: int = 1) -> Tensor:
        """Returns tokens (b, towers · chunks · n) on the CPU, one tower after another."""
        return tokens_of(self.tokenizers, captions, chunks)

    def encode(
        self, captions: list[str] | Tensor, chunks: int = 1, skip: int = 0, device: torch.device | None = None
    ) -> Conditioning:
        """Returns the conditioning of captions or of their tokens: text (b, chunks · n, d), d summed over the towers.

        `skip` is the number of last layers to skip. The towers run on `device`, by default the device of their
        weights.
        """
        tokens = captions if isinstance(captions, Tensor) else self.tokenize(captions, chunks)
        by_tower = tokens.to(device or self.device).chunk(len(self.towers), dim=1)  # each (b, chunks · n)
        states = [_states(tower, ids, chunks, skip) for tower, ids in zip(self.towers, by_tower, strict=True)]
        return Conditioning(text=states[0] if len(states) == 1 else torch.cat(states, dim=-1))

    def cut(self, caption: str, chunks: int = 1) -> str:
        """Returns the end of the caption that fits into the chunks of no tower, or "" if all of it fits."""
        return min((tokenizer.cut(caption, chunks) for tokenizer in self.tokenizers), key=len)

    def unknown_tokens(self, caption: str) -> list[int]:
        """Returns the tokens of the caption that are in no tower's vocabulary, sorted."""
        unknown = []
        for tower, tokenizer in zip(self.towers, self.tokenizers, strict=True):
            special = {tokenizer.begin, tokenizer.end, tokenizer.pad}
            unknown.append({*tower.unknown_tokens(tokenizer([caption]).to(self.device))} - special)
        return sorted(set.intersection(*unknown))

    def check_skip(self, skip: int) -> None:
        """Raises ValueError if skipping that many layers would leave a tower without any."""
        for tower in self.towers:
            tower.layers(skip)


def tokens_of(tokenizers: Sequence[Tokenizer], captions: list[str], chunks: int = 1) -> Tensor:
    """Returns tokens (b, tokenizers · chunks · n), one tokenizer after another."""
    return torch.cat([tokenizer(captions, chunks) for tokenizer in tokenizers], dim=1)


def _states(tower: TextTower, tokens: Tensor, chunks: int, skip: int) -> Tensor:
    """Maps tokens (b, chunks · n) to states (b, chunks · n, d), encoding each chunk separately."""
    split = tokens.unflatten(1, (chunks, -1)).flatten(0, 1).contiguous()  # (b · chunks, n)
    return tower(split, skip).unflatten(0, (len(tokens), chunks)).flatten(1, 2)
