"""What the columns of a metadata file hold, whatever the dump that wrote it calls them."""

from collections.abc import Iterable, Mapping

# Our name → the spellings of LAION's, COYO's, DataComp's and img2dataset's files, compared without case.
ALIASES = {
    "url": ("url", "image_url", "img_url"),
    "caption": ("caption", "text", "top_caption", "alt_text"),
    "width": ("width", "original_width", "image_width"),
    "height": ("height", "original_height", "image_height"),
    "similarity": ("similarity", "clip_similarity", "clip_l14_similarity_score", "clip_similarity_vitl14"),
    "punsafe": ("punsafe", "unsafe", "p_unsafe"),
    "pwatermark": ("pwatermark", "watermark", "watermark_score", "p_watermark"),
    "aesthetic": ("aesthetic", "aesthetic_score", "aesthetic_score_laion_v2"),
    "nsfw": ("nsfw",),
    "language": ("language", "lang"),
    "hash": ("hash", "phash", "sha256", "md5"),
    "license": ("license", "licence"),
    "sample_id": ("sample_id", "uid", "id"),
}
SIDES = ("width", "height")
# The type that each is coerced to. What only names a row keeps its own type.
TYPES = (
    dict.fromkeys(("url", "caption", "nsfw", "language", "license"), "VARCHAR")
    | dict.fromkeys(SIDES, "DOUBLE")
    | dict.fromkeys(("similarity", "punsafe", "pwatermark", "aesthetic"), "FLOAT")
)
NUMBERS = tuple(name for name, kind in TYPES.items() if kind != "VARCHAR")


def resolve(found: Iterable[str], needed: Iterable[str], chosen: Mapping[str, str], where: str) -> dict[str, str]:
    """Our name → the column of the file `where`, for every column that is known and there.

    `chosen` goes before the alias table. ValueError where a needed column is missing, and where two columns
    could be the same one: both name the columns and how to choose.
    """
    found = list(found)
    columns = {}
    for name, spellings in ALIASES.items():
        if name in chosen:
            if chosen[name] not in found:
                raise ValueError(
                    f"{where} has no column {chosen[name]} (--column {name}={chosen[name]}); {_has(found)}"
                )
            columns[name] = chosen[name]
            continue
        free = [column for column in found if column.lower() in spellings and column not in chosen.values()]
        if len(free) > 1:
            raise ValueError(
                f"{where} has {len(free)} columns that could be the {name}, {' and '.join(free)}: "
                f"choose one with --column {name}={free[0]}"
            )
        if free:
            columns[name] = free[0]
    for name in needed:
        if name not in columns:
            raise ValueError(
                f"{where} has no column for {name} (looked for {', '.join(ALIASES[name])}): "
                f"name it with --column {name}=COLUMN; {_has(found)}"
            )
    return columns


def parse_choices(texts: Iterable[str]) -> dict[str, str]:
    """`name=COLUMN` of --column, as a dict; ValueError for another form or an unknown name."""
    chosen: dict[str, str] = {}
    for text in texts:
        name, equals, column = text.partition("=")
        if not (equals and column):
            raise ValueError(f"--column {text}: expected name=COLUMN, such as url=URL")
        if name not in ALIASES:
            raise ValueError(f"--column {text}: {name} is none of {', '.join(ALIASES)}")
        chosen[name] = column
    return chosen


def _has(found: list[str]) -> str:
    return f"it has {', '.join(found)}"
