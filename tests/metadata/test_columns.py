import pytest

from ldm.metadata.columns import parse_choices, resolve

LAION = ["SAMPLE_ID", "URL", "TEXT", "HEIGHT", "WIDTH", "LICENSE", "NSFW", "similarity", "AESTHETIC_SCORE"]


def test_the_spellings_of_laion_are_ours() -> None:
    found = resolve(LAION, ["url", "caption", "width"], {}, "x.parquet")
    assert found["url"] == "URL" and found["caption"] == "TEXT" and found["aesthetic"] == "AESTHETIC_SCORE"
    assert set(found.values()) == set(LAION)


def test_columns_that_are_not_known_are_left_out() -> None:
    assert resolve(["url", "exif"], [], {}, "x.parquet") == {"url": "url"}


def test_two_columns_for_one_thing_are_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"x\.parquet has 2 columns.*width, width and original_width: .*--column width="
    ):
        resolve(["url", "width", "original_width"], ["width"], {}, "x.parquet")


def test_a_choice_settles_which_of_two_is_meant() -> None:
    found = resolve(["url", "width", "original_width"], ["width"], {"width": "original_width"}, "x.parquet")
    assert found["width"] == "original_width"


def test_a_chosen_column_is_not_also_another() -> None:
    assert resolve(["url", "text", "caption"], [], {"url": "text"}, "x.parquet") == {
        "url": "text",
        "caption": "caption",
    }


def test_a_missing_column_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"no column for aesthetic .*--column aesthetic=COLUMN; it has url, score"):
        resolve(["url", "score"], ["aesthetic"], {}, "x.parquet")


def test_a_chosen_column_must_be_there() -> None:
    with pytest.raises(ValueError, match=r"no column score2 \(--column aesthetic=score2\)"):
        resolve(["url", "score"], ["aesthetic"], {"aesthetic": "score2"}, "x.parquet")


@pytest.mark.parametrize(
    ("text", "told"), [("url", "expected name=COLUMN"), ("url=", "expected name"), ("u=x", "u is none")]
)
def test_a_wrong_choice_is_refused(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_choices([text])
