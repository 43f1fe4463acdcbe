import duckdb
import pytest

from ldm.metadata.rules import NORMALISED_URL, Rule, failed, quoted


def normalised(url: str) -> str:
    return str(duckdb.sql(f"SELECT {NORMALISED_URL} FROM (SELECT {quoted(url)} AS url)").fetchall()[0][0])


@pytest.mark.parametrize(
    "url",
    [
        "http://a.org/p/1.jpg",
        "https://WWW.A.org/p/1.jpg",
        "HTTPS://a.org:443/p/1.jpg",
        "http://a.org:80/p/1.jpg?",
        "https://a.org/p/1.jpg#top",
        " https://a.org/p/1.jpg/ ",
        "https://a.org/p/1.jpg?#",
        " https://a.org/p/1.jpg/ #top ",
    ],
)
def test_spellings_of_one_address_are_one(url: str) -> None:
    assert normalised(url) == "a.org/p/1.jpg"


@pytest.mark.parametrize(
    "url",
    [
        "https://a.org/P/1.jpg",
        "https://a.org/p/1.jpg?id=2",
        "https://a.org:8080/p/1.jpg",
        "https://b.a.org/p/1.jpg",
        "https://a.org/p/11.jpg",
        "https://a.org//p/1.jpg",
    ],
)
def test_what_may_be_another_picture_stays_apart(url: str) -> None:
    assert normalised(url) != "a.org/p/1.jpg"


def test_a_set_of_failed_rules_has_a_bit_for_each_and_null_fails() -> None:
    asked = [Rule("small", "x > 1", ("x",)), Rule("odd", "x % 2 = 0", ("x",))]
    values = duckdb.sql(f"SELECT {failed(asked)} FROM (VALUES (2), (3), (0), (1), (NULL)) AS t(x)").fetchall()
    assert [value for (value,) in values] == [0b00, 0b10, 0b01, 0b11, 0b11]


def test_a_quote_in_a_text_ends_no_literal() -> None:
    text = "it's; DROP TABLE x --"
    assert duckdb.sql(f"SELECT {quoted(text)}").fetchall() == [(text,)]
