"""Encodes prompts in the web UI's syntax: chunks of the text encoder's context, and states multiplied by weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.nn.text_encoder import TextEncoder
from ldm.nn.tokenizer import Tokenizer
from ldm.pipeline.prompt_syntax import Token, chunks_of, parse


def chunk_count(encoder: TextEncoder, prompts: Sequence[str]) -> int:
    """Returns the number of chunks of the longest prompt."""
    return max(len(_chunks(tokenizer, prompt)) for tokenizer in encoder.tokenizers for prompt in prompts)


def encode_emphasis(
    encoder: TextEncoder, prompts: Sequence[str], chunks: int, skip: int = 0, device: torch.device | None = None
) -> Conditioning:
    """Returns the conditioning of prompts, text (b, chunks · n, d); shorter prompts are padded with empty chunks.

    The states of each token are multiplied by its weight, and each chunk is then rescaled to its original mean over all
    states. The web UI takes the mean over all prompts of a batch, this function over each prompt separately, so that an
    image does not depend on the other prompts. `chunks` must be at least `chunk_count`.
    """
    framed = [[_framed(tokenizer, prompt, chunks) for prompt in prompts] for tokenizer in encoder.tokenizers]
    tokens = torch.cat([torch.stack([ids for ids, _ in rows]) for rows in framed], dim=1)  # (b, towers · chunks · n)
    states = encoder.encode(tokens, chunks, skip, device).get("text")
    widths = [tower.config["width"] for tower in encoder.towers]
    weighted = [
        _weighted(own, torch.stack([weights for _, weights in rows]).to(own.device), chunks)
        for own, rows in zip(states.split(widths, dim=-1), framed, strict=True)
    ]
    return Conditioning(text=torch.cat(weighted, dim=-1))


def _chunks(tokenizer: Tokenizer, prompt: str) -> list[list[Token]]:
    (comma,) = tokenizer.ids(",")
    return chunks_of(parse(prompt), tokenizer.groups, comma, tokenizer.room)


def _framed(tokenizer: Tokenizer, prompt: str, chunks: int) -> tuple[Tensor, Tensor]:
    """Returns the tokens and the weights (chunks · n,) of a prompt; begin, end and padding have weight 1."""
    filled = _chunks(tokenizer, prompt)
    filled += [[] for _ in range(chunks - len(filled))]
    tokens = tokenizer.frame([[token for token, _ in chunk] for chunk in filled])
    weights = torch.ones(tokens.shape)
    for row, chunk in zip(weights, filled, strict=True):
        row[1 : 1 + len(chunk)] = torch.tensor([weight for _, weight in chunk])
    return tokens.flatten(), weights.flatten()


def _weighted(states: Tensor, weights: Tensor, chunks: int) -> Tensor:
    """Multiplies states (b, chunks · n, d) by weights (b, chunks · n), keeping the mean of each chunk."""
    split = states.float().unflatten(1, (chunks, -1))  # (b, chunks, n, d)
    scaled = split * weights.unflatten(1, (chunks, -1)).unsqueeze(-1)
    scaled = scaled * (split.mean((2, 3), keepdim=True) / scaled.mean((2, 3), keepdim=True))
    return scaled.flatten(1, 2).to(states.dtype)
