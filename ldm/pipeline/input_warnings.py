"""What of a call is not drawn as it was given."""

import re
from collections.abc import Iterator, Sequence

from ldm.nn.text_encoder import TextEncoder
from ldm.pipeline.inputs import Item, ends


def remarks_of(items: Sequence[Item], size: tuple[int, int], chunks: int, encoder: TextEncoder) -> list[str]:
    """Each different one once; pictures are drawn at this size, texts read in so many chunks."""
    prompts, others, _ = ends([item.prompt for item in items])
    texts = dict.fromkeys(prompts + others + [item.negative for item in items])
    return list(dict.fromkeys([*of_text(encoder, list(texts), chunks), *of_sizes(items, size)]))


def of_text(encoder: TextEncoder, texts: Sequence[str], chunks: int) -> Iterator[str]:
    """What the text encoder will not read: ends that are too long, and unknown words; one remark on each."""
    cuts = {text: end for text in texts if (end := encoder.cut(text, chunks))}
    if cuts:
        text, end = next(iter(cuts.items()))
        others = f", as of {len(cuts)} prompts in all" if len(cuts) > 1 else ""
        yield (
            f"the prompt {_short(text)} is longer than the {chunks * encoder.context} tokens that the text encoder "
            f"reads; this end was cut off: {end!r}{others} (chunks={chunks + 1} reads more)"
        )
    known = encoder.tokenizers[0].without_added
    words = dict.fromkeys(word for text in texts for word in _words(known(text)))
    unknown = [word for word in words if encoder.unknown_tokens(word)]
    if unknown:
        met = [text for text in texts if not {*unknown}.isdisjoint(_words(text))]
        where = f"{len(met)} prompts, such as {_short(met[0])}" if len(met) > 1 else _short(met[0])
        yield f"the text encoder does not know {_listed(unknown)} in {where}; the model was not trained on such words"


def of_sizes(items: Sequence[Item], size: tuple[int, int]) -> Iterator[str]:
    """Images that are not of the `size` (height, width) that is drawn, and masks that are not of their image's."""
    drawn = f"{size[0]}x{size[1]}"
    for item in items:
        image, mask = item.image, item.mask
        if image is not None and image.size != size[::-1]:
            yield f"the image is {image.height}x{image.width}; it was scaled and cropped to the {drawn} that is drawn"
        if image is not None and mask is not None and mask.size != image.size:
            yield f"the mask is {mask.height}x{mask.width}; it was scaled to the image's {image.height}x{image.width}"


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(re.findall(r"\w+|[^\w\s]+", text)))


def _listed(words: Sequence[str], most: int = 12) -> str:
    rest = f" and {len(words) - most} other words" if len(words) > most else ""
    return ", ".join(map(repr, words[:most])) + rest


def _short(text: str, most: int = 60) -> str:
    return repr(text if len(text) <= most else text[: most - 1] + "…")
