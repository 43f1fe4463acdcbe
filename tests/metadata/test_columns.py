import pytest

from ldm.metadata.columns import parse_choices, resolve

LAION = ["SAMPLE_ID", "URL", "TEXT", "HEIGHT", "WIDTH", "LICENSE", "NSFW", "similarity", "AESTHETIC_SCORE"]


def test_the_columns_of_laion_are_recognised() -> None:
    found = resolve(LAION, ["url", "caption", "width"], {}, "x.parquet")
    assert found["url"] == "URL" and found["caption"] == "TEXT" and found["aesthetic"] == "AESTHETIC_SCORE"
    assert set(found.values()) == set(LAION)


def test_unknown_columns_are_ignored() -> None:
    assert resolve(["url", "exif"], [], {}, "x.parquet") == {"url": "url"}


def test_two_columns_with_the_same_meaning_are_refused_with_their_names() -> None:
    with pytest.raises(
        ValueError, match=r"x\.parquet has 2 columns.*width, width and original_width: .*--column width="
    ):
        resolve(["url", "width", "original_width"], ["width"], {}, "x.parquet")


def test_a_chosen_column_takes_precedence() -> None:
    found = resolve(["url", "width", "original_width"], ["width"], {"width": "original_width"}, "x.parquet")
    assert found["width"] == "original_width"


def test_a_chosen_column_is_not_used_for_another_name() -> None:
    assert resolve(["url", "text", "caption"], [], {"url": "text"}, "x.parquet") == {
        "url": "text",
        "caption": "caption",
    }


def test_two_columns_with_exactly_the_same_name_are_refused() -> None:
    for chosen in ({}, {"width": "WIDTH"}):
        with pytest.raises(ValueError, match=r"x\.parquet has 2 columns named WIDTH: rename one of them"):
            resolve(["WIDTH", "url", "WIDTH"], ["width"], chosen, "x.parquet")


def test_a_missing_column_is_refused_with_its_name() -> None:
    with pytest.raises(ValueError, match=r"no column for aesthetic .*--column aesthetic=COLUMN; it has url, score"):
        resolve(["url", "score"], ["aesthetic"], {}, "x.parquet")


def test_a_chosen_column_must_exist() -> None:
    with pytest.raises(ValueError, match=r"no column score2 \(--column aesthetic=score2\)"):
        resolve(["url", "score"], ["aesthetic"], {"aesthetic": "score2"}, "x.parquet")


@pytest.mark.parametrize(
    ("text", "message"), [("url", "expected name=COLUMN"), ("url=", "expected name"), ("u=x", "u is not one of")]
)
def test_an_invalid_choice_of_a_column_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_choices([text])
