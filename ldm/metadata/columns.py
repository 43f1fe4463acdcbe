"""Maps the column names of public metadata dumps to standard names and types."""

from collections.abc import Iterable, Mapping

# Standard name → spellings in the files of LAION, COYO, DataComp and img2dataset, compared case-insensitively.
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
# The type that each column is coerced to. Identifiers (hash, sample_id) keep their own type.
TYPES = (
    dict.fromkeys(("url", "caption", "nsfw", "language", "license"), "VARCHAR")
    | dict.fromkeys(SIDES, "DOUBLE")
    | dict.fromkeys(("similarity", "punsafe", "pwatermark", "aesthetic"), "FLOAT")
)
NUMBERS = tuple(name for name, kind in TYPES.items() if kind != "VARCHAR")


def resolve(found: Iterable[str], needed: Iterable[str], chosen: Mapping[str, str], where: str) -> dict[str, str]:
    """Maps standard names to the columns `found` in the file `where`, for every known column that is present.

    `chosen` takes precedence over the alias table. Raises ValueError, with the option to set, if a needed column is
    missing or two columns match the same name.
    """
    found = list(found)
    columns = {}
    for name, spellings in ALIASES.items():
        if name in chosen:
            if chosen[name] not in found:
                raise ValueError(
                    f"{where} has no column {chosen[name]} (--column {name}={chosen[name]}); {_has(found)}"
                )
            if found.count(chosen[name]) > 1:
                raise ValueError(
                    f"{where} has {found.count(chosen[name])} columns named {chosen[name]}: rename one of them"
                )
            columns[name] = chosen[name]
            continue
        matches = [column for column in found if column.lower() in spellings and column not in chosen.values()]
        if len(matches) > 1 and len({*matches}) == 1:
            raise ValueError(f"{where} has {len(matches)} columns named {matches[0]}: rename one of them")
        if len(matches) > 1:
            raise ValueError(
                f"{where} has {len(matches)} columns that could be the {name}, {' and '.join(matches)}: "
                f"choose one with --column {name}={matches[0]}"
            )
        if matches:
            columns[name] = matches[0]
    for name in needed:
        if name not in columns:
            raise ValueError(
                f"{where} has no column for {name} (looked for {', '.join(ALIASES[name])}): "
                f"choose one with --column {name}=COLUMN; {_has(found)}"
            )
    return columns


def parse_choices(texts: Iterable[str]) -> dict[str, str]:
    """Parses the `name=COLUMN` of --column. Raises ValueError for another form or an unknown name."""
    chosen: dict[str, str] = {}
    for text in texts:
        name, equals, column = text.partition("=")
        if not (equals and column):
            raise ValueError(f"--column {text}: expected name=COLUMN, such as url=URL")
        if name not in ALIASES:
            raise ValueError(f"--column {text}: {name} is not one of {', '.join(ALIASES)}")
        chosen[name] = column
    return chosen


def _has(found: list[str]) -> str:
    return f"it has {', '.join(found)}"
