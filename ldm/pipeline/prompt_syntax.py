"""Parses prompts in the syntax of AUTOMATIC1111's web UI: emphasis, BREAK, and tags that name LoRA files.

Source: https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/Features, section "Attention/emphasis".
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite

MORE = 1.1  # the weight of one pair of parentheses; square brackets divide by it
BACKTRACK = 20  # a full chunk ends at its last comma if at most this many tokens follow
_PIECE = re.compile(r"\\[()\[\]\\]|\(|\[|\)|\]|:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)|[^\\()\[\]:]+|[\\:]")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_TAG = re.compile(r"<(\w+):([^<>]*)>")


@dataclass(frozen=True)
class Span:
    """A part of a prompt and the factor by which its states are multiplied."""

    text: str
    weight: float


@dataclass(frozen=True)
class Tag:
    """A LoRA that a prompt names: `<lora:name:0.8>`.

    `weight` is that in the denoising network, and in the text encoder unless `text_weight` is another one.
    """

    name: str
    weight: float
    text_weight: float | None = None


Token = tuple[int, float]  # its id and its weight


def without_tags(prompt: str) -> tuple[str, list[Tag]]:
    """Returns the prompt without its `<lora:name:weight>` tags, and the tags; the default weight is 1.

    Two weights are those in the text encoder and in the denoising network, in this order, or by the names te and unet.
    Raises ValueError for a tag of another kind or a weight that is not a number.
    """
    tags = []
    for kind, arguments in _TAG.findall(prompt):
        if kind not in ("lora", "lyco"):
            raise ValueError(f"the prompt has the tag <{kind}:{arguments}>, but only <lora:NAME:WEIGHT> is supported")
        name, *weights = arguments.split(":")
        tags.append(Tag(name.strip(), *_weights(weights, f"<{kind}:{arguments}>")))
    return _TAG.sub("", prompt), tags


def parse(prompt: str) -> list[list[Span]]:
    """Returns the sections between BREAKs, each as a list of spans with one weight.

    `(x)` multiplies the weight of x by 1.1, `[x]` divides it by 1.1, `(x:1.3)` multiplies it by 1.3; they nest, and a
    backslash escapes a bracket. A bracket that is never closed extends to the end of the prompt, and one that was never
    opened is a literal character.
    """
    pieces: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # positions of the brackets that are still open

    def multiply(begin: int, factor: float) -> None:
        pieces[begin:] = [(text, weight * factor) for text, weight in pieces[begin:]]

    for piece in _PIECE.findall(prompt):
        if piece in opened:
            opened[piece].append(len(pieces))
        elif piece[0] == ":" and len(piece) > 1 and opened["("]:
            multiply(opened["("].pop(), float(piece[1:-1]))
        elif piece == ")" and opened["("]:
            multiply(opened["("].pop(), MORE)
        elif piece == "]" and opened["["]:
            multiply(opened["["].pop(), 1 / MORE)
        else:
            pieces.append((piece[1:] if piece[0] == "\\" else piece, 1.0))
    for begin in opened["("]:
        multiply(begin, MORE)
    for begin in opened["["]:
        multiply(begin, 1 / MORE)
    return _sections(pieces)


def chunks_of(
    sections: Sequence[Sequence[Span]], tokenize: Callable[[str], list[list[int]]], comma: int, room: int
) -> list[list[Token]]:
    """Returns chunks of at most `room` tokens, at least one; each section begins a new chunk.

    A full chunk ends after its last comma if at most BACKTRACK tokens follow; they are moved to the next chunk.
    `tokenize` returns groups of tokens, such as the vectors of a textual inversion; a group that does not fit into the
    rest of a chunk begins the next one.
    """
    chunks: list[list[Token]] = []
    for section in sections:
        chunk: list[Token] = []
        for group in _groups(section, tokenize, room):
            if len(chunk) == room:
                end = room if group[0][0] == comma else _end(chunk, comma)
                chunks.append(chunk[:end])
                chunk = chunk[end:]
            if len(chunk) + len(group) > room:
                chunks.append(chunk)
                chunk = []
            chunk += group
        chunks.append(chunk)
    return chunks if len(chunks) == 1 or chunks[-1] else chunks[:-1]  # a BREAK at the end begins no chunk


def _groups(section: Sequence[Span], tokenize: Callable[[str], list[list[int]]], room: int) -> Iterator[list[Token]]:
    """Yields the groups of tokens of a section; a group that no chunk has room for is divided."""
    for span in section:
        for group in tokenize(span.text):
            tokens = [(token, span.weight) for token in group]
            yield from [tokens] if len(tokens) <= room else ([token] for token in tokens)


def _end(chunk: Sequence[Token], comma: int) -> int:
    """Returns the position at which a full chunk ends."""
    after = next((k for k in range(len(chunk), 0, -1) if chunk[k - 1][0] == comma), 0)  # the place after the last comma
    return after if after and len(chunk) - after < BACKTRACK else len(chunk)


def _sections(pieces: Sequence[tuple[str, float]]) -> list[list[Span]]:
    """Splits spans at BREAK, and joins neighbours of equal weight."""
    sections: list[list[Span]] = [[]]
    for text, weight in pieces:
        for k, part in enumerate(_BREAK.split(text)):
            if k:
                sections.append([])
            last = sections[-1]
            if last and last[-1].weight == weight:
                last[-1] = Span(last[-1].text + part, weight)
            elif part:
                last.append(Span(part, weight))
    return sections


def _weights(given: Sequence[str], tag: str) -> tuple[float, float | None]:
    """Returns the weight of a tag in the denoising network, and that in the text encoder if it is another one.

    As in the web UI, the weight in the text encoder is 1 by default, and that in the denoising network the same.
    """
    placed = [text for text in given if "=" not in text]
    named = dict(text.split("=", 1) for text in given if "=" in text)
    text_encoder = named.pop("te", placed[0] if placed else "1")
    unet = named.pop("unet", placed[1] if len(placed) > 1 else text_encoder)
    if named or len(placed) > 2 or not (_is_finite(text_encoder) and _is_finite(unet)):
        raise ValueError(
            f"the tag {tag} of the prompt has no weights that can be read: write <lora:NAME:0.8>, or "
            "<lora:NAME:0.5:0.6> for the weights in the text encoder and in the UNet"
        )
    return float(unet), None if float(text_encoder) == float(unet) else float(text_encoder)


def _is_finite(text: str) -> bool:
    try:
        return isfinite(float(text))
    except ValueError:
        return False
