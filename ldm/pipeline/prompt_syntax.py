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
    """A LoRA that a prompt names: `<lora:name:0.8>`."""

    name: str
    weight: float


Token = tuple[int, float]  # its id and its weight


def without_tags(prompt: str) -> tuple[str, list[Tag]]:
    """Returns the prompt without its `<lora:name:weight>` tags, and the tags; the default weight is 1.

    Raises ValueError for a tag of another kind or a weight that is not a number.
    """
    tags = []
    for kind, arguments in _TAG.findall(prompt):
        if kind not in ("lora", "lyco"):
            raise ValueError(f"the prompt has the tag <{kind}:{arguments}>, but only <lora:NAME:WEIGHT> is supported")
        name, *weights = arguments.split(":")
        tags.append(Tag(name.strip(), _number(weights, f"<{kind}:{arguments}>")))
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


def _number(weights: Sequence[str], tag: str) -> float:
    """Returns the weight of a tag, 1 by default."""
    try:
        (weight,) = map(float, weights or ["1"])
    except ValueError:
        raise ValueError(f"the tag {tag} of the prompt has no single weight: write <lora:NAME:0.8>") from None
    if not isfinite(weight):
        raise ValueError(f"the weight of the tag {tag} in the prompt must be finite")
    return weight
