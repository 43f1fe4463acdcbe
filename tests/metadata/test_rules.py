import duckdb
import pytest

from ldm.metadata.rules import NORMALISED_URL, Rule, failure_mask, quoted


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
def test_equivalent_urls_have_the_same_normalised_url(url: str) -> None:
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
def test_urls_of_different_images_have_different_normalised_urls(url: str) -> None:
    assert normalised(url) != "a.org/p/1.jpg"


def test_the_failure_mask_has_one_bit_per_rule_and_null_fails_all() -> None:
    active_rules = [Rule("small", "x > 1", ("x",)), Rule("odd", "x % 2 = 0", ("x",))]
    values = duckdb.sql(
        f"SELECT {failure_mask(active_rules)} FROM (VALUES (2), (3), (0), (1), (NULL)) AS t(x)"
    ).fetchall()
    assert [value for (value,) in values] == [0b00, 0b10, 0b01, 0b11, 0b11]


def test_quotes_in_a_text_do_not_end_the_sql_literal() -> None:
    text = "it's; DROP TABLE x --"
    assert duckdb.sql(f"SELECT {quoted(text)}").fetchall() == [(text,)]
