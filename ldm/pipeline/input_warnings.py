"""Warns of inputs that the model cannot use as given: truncated prompts, unknown words, resized images."""

import re
from collections.abc import Iterator, Sequence

from ldm.errors import shortened
from ldm.nn.text_encoder import TextEncoder
from ldm.pipeline.inputs import ImageRequest, prompt_texts
from ldm.pipeline.prompt_syntax import parse
from ldm.pipeline.settings import Settings

HALF = 128  # of a mask: pixels below it are not repainted
WEB_UI = re.compile(r"\([^()]*:\s*[+-]?[\d.]+\s*\)|<\w+:[^<>]*>|\(\([^()]*\)\)|\bBREAK\b")  # weights, tags, …
# What the web UI reads as more than emphasis: [from:to:when], [one|other], AND; and tags without a closing bracket.
UNSUPPORTED = re.compile(r"(?<!\\)\[[^\[\]]*(?::\s*[\d.]+\s*|\|[^\[\]]*)\]|\bAND\b|<\s*(?:lora|lyco)\b[^<>]*>?")


def input_warnings(
    requests: Sequence[ImageRequest],
    settings: Settings,
    encoder: TextEncoder,
    trained_size: tuple[int, int],
    weak: bool = False,
) -> list[str]:
    """Returns each distinct warning once; `trained_size` is the model's own (height, width).

    `weak` says whether a weak model guides in place of the negative prompts.
    """
    texts, syntax = prompt_texts(requests), list(syntax_warnings(prompt_texts(requests)))
    if settings.prompt_syntax == "a1111":
        syntax = list(unsupported_warnings(texts))
        texts = [" ".join("".join(span.text for span in section) for section in parse(text)) for text in texts]
    found = [*syntax, *text_warnings(encoder, texts, settings.chunks), *size_warnings(requests, settings.size)]
    found += [*effect_warnings(requests, weak)]
    if any(request.image is None for request in requests):
        found += area_warnings(settings.size, trained_size)
    return list(dict.fromkeys(found))


def syntax_warnings(texts: Sequence[str]) -> Iterator[str]:
    """Yields at most one warning about plain prompts in the syntax of AUTOMATIC1111's web UI."""
    if found := [(text, match[0]) for text in texts if (match := WEB_UI.search(text))]:
        text, part = found[0]
        how = "prompt_syntax=a1111" + (" with lora_dir" if part.startswith("<") else "")
        yield f"{part!r} in {shortened(text)} is read as plain words; {how} reads it as the web UI does"


def unsupported_warnings(texts: Sequence[str]) -> Iterator[str]:
    """Yields at most one warning about syntax of the web UI that prompt_syntax=a1111 does not have."""
    if found := [(text, match[0]) for text in texts if (match := UNSUPPORTED.search(text))]:
        text, part = found[0]
        yield (
            f"{part!r} in {shortened(text)} is read as words: prompt_syntax=a1111 reads weights, BREAK and "
            "<lora:NAME:0.8>, but no prompt editing, alternating words or AND"
        )


def text_warnings(encoder: TextEncoder, texts: Sequence[str], chunks: int) -> Iterator[str]:
    """Yields at most one warning about truncated texts and one about words that its vocabulary lacks."""
    cuts = {text: end for text in texts if (end := encoder.cut(text, chunks))}
    if cuts:
        text, end = next(iter(cuts.items()))
        scope = f" ({len(cuts)} prompts are too long)" if len(cuts) > 1 else ""
        yield (
            f"the prompt {shortened(text)} is longer than the {chunks * encoder.context} tokens that the text encoder "
            f"reads; this end was cut off: {shortened(end)}{scope}; chunks={chunks + 1} reads more"
        )
    known = encoder.tokenizers[0].without_added
    words = dict.fromkeys(word for text in texts for word in _words(known(text)))
    unknown = [word for word in words if encoder.unknown_tokens(word)]
    if unknown:
        affected = [text for text in texts if not {*unknown}.isdisjoint(_words(text))]
        where = shortened(affected[0])
        if len(affected) > 1:
            where = f"{len(affected)} prompts, such as {where}"
        yield (
            f"the vocabulary of the text encoder lacks {_joined(unknown)} in {where}; it reads all such words as the "
            "same word"
        )


def size_warnings(requests: Sequence[ImageRequest], size: tuple[int, int]) -> Iterator[str]:
    """Yields a warning for each image that is not of `size` (height, width) and each mask unlike its image."""
    target = f"{size[0]}x{size[1]}"
    for request in requests:
        image, mask = request.image, request.mask
        if image is not None and image.size != size[::-1]:
            yield f"the image is {image.height}x{image.width}; it was scaled and cropped to the output size {target}"
        if image is not None and mask is not None and mask.size != image.size:
            yield (
                f"the mask is {mask.height}x{mask.width}; it was scaled to the size of the image, "
                f"{image.height}x{image.width}"
            )


def effect_warnings(requests: Sequence[ImageRequest], weak: bool) -> Iterator[str]:
    """Yields a warning for each negative prompt and each mask that has no effect."""
    for request in requests:
        if request.negative and (weak or request.guidance == 1):
            why = "a weak model takes its place" if weak else "guidance=1 is no guidance"
            yield f"the negative prompt {shortened(request.negative)} has no effect, because {why}"
        if request.mask is not None and max(request.mask.convert("L").tobytes()) < HALF:
            yield (
                "the mask is white nowhere, so that nothing is repainted: make it white where the image should change "
                "(its transparent pixels count as black)"
            )


def area_warnings(size: tuple[int, int], trained: tuple[int, int]) -> Iterator[str]:
    """Yields a warning if images without a source differ in area from those of training by more than a factor of two.

    A network generates larger images like several of the trained size: objects repeat (Du et al. 2024, DemoFusion).
    """
    ratio = size[0] * size[1] / (trained[0] * trained[1])
    if not 0.5 <= ratio <= 2:
        factor = f"{ratio:.3g} times" if ratio > 1 else f"1/{1 / ratio:.3g} of"
        effect = "repeat objects" if ratio > 1 else "cut objects off"
        own = f"{trained[0]}x{trained[1]}"
        yield (
            f"{size[0]}x{size[1]} has {factor} the area of the model's {own}, and such images often {effect}; "
            f"generate at about {own} and scale the image"
        )


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(re.findall(r"\w+|[^\w\s]+", text)))


def _joined(words: Sequence[str], limit: int = 12) -> str:
    rest = f" and {len(words) - limit} other words" if len(words) > limit else ""
    return ", ".join(map(repr, words[:limit])) + rest
