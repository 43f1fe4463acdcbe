import pytest

from ldm.pipeline.prompt_syntax import Span, Tag, chunks_of, parse, without_tags


def spans(prompt: str) -> list[tuple[str, float]]:
    (section,) = parse(prompt)
    return [(span.text, span.weight) for span in section]


# The rules in the web UI's documentation, and the examples in that of its parser.
@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("un)balanced]", [("un)balanced]", 1)]),
        (r"\(literal\]", [("(literal]", 1)]),
        (r"a \\ b", [("a \\ b", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("[less]", [("less", 1 / 1.1)]),
        ("([cancelled])", [("cancelled", 1)]),
        ("(word:1.5) at 3:15", [("word", 1.5), (" at 3:15", 1)]),
        ("(word: 1.5 )", [("word", 1.5)]),
        ("(word:-0.5)", [("word", -0.5)]),
        ("no brackets:1.5)", [("no brackets:1.5)", 1)]),
        ("[word:1.5)", [("word:1.5)", 1 / 1.1)]),
        ("(word:)", [("word:", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1),
                ("house", 1.3 * 1.1 * 1.1),
                (" ", 1.1),
                ("on", 1),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.1**4),
                (".", 1.1),
            ],
        ),
    ],
)
def test_brackets_weigh_words_as_documented(prompt: str, expected: list[tuple[str, float]]) -> None:
    found = spans(prompt)
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected], rel=1e-12)


def test_an_empty_prompt_has_one_empty_section() -> None:
    assert parse("") == [[]]


def test_break_begins_a_section_also_inside_brackets() -> None:
    assert parse("a BREAK  b BREAKS") == [[Span("a", 1.0)], [Span("b BREAKS", 1.0)]]
    assert parse("(a BREAK b)") == [[Span("a", 1.1)], [Span("b", 1.1)]]


def characters(text: str) -> list[list[int]]:
    return [[ord(character)] for character in text]


def words(text: str) -> list[list[int]]:
    """Returns the characters of each word as one group, as the vectors of a textual inversion are."""
    return [[ord(character) for character in word] for word in text.split()]


def chunked(prompt: str, room: int) -> list[str]:
    chunks = chunks_of(parse(prompt), characters, comma=ord(","), room=room)
    return ["".join(chr(token) for token, _ in chunk) for chunk in chunks]


def test_a_long_prompt_fills_one_chunk_after_another() -> None:
    assert chunked("x" * 75 + "y" * 75 + "z", room=75) == ["x" * 75, "y" * 75, "z"]


def test_a_full_chunk_ends_at_a_near_comma() -> None:
    near, far = "x" * 55 + "," + "y" * 19, "x" * 54 + "," + "y" * 20
    assert chunked(near + "z", room=75) == ["x" * 55 + ",", "y" * 19 + "z"]
    assert chunked(far + "z", room=75) == [far, "z"]
    assert chunked(near + ",z", room=75) == [near, ",z"]  # a comma itself begins the next chunk


def test_break_begins_a_chunk_and_none_at_the_end() -> None:
    assert chunked("ab BREAK c BREAK", room=75) == ["ab", "c"]
    assert chunked("BREAK a", room=75) == ["", "a"]
    assert chunked("", room=75) == [""]


def test_the_vectors_of_a_textual_inversion_stay_in_one_chunk() -> None:
    def chunked_words(prompt: str) -> list[str]:
        chunks = chunks_of(parse(prompt), words, comma=ord(","), room=5)
        return ["".join(chr(token) for token, _ in chunk) for chunk in chunks]

    assert chunked_words("a b c def g") == ["abc", "defg"]
    assert chunked_words("a b cde f") == ["abcde", "f"]
    assert chunked_words("a bcdefgh") == ["abcde", "fgh"]  # longer than a chunk


def test_tokens_carry_the_weight_of_their_span() -> None:
    assert chunks_of(parse("a(b:2)"), characters, comma=0, room=75) == [[(ord("a"), 1.0), (ord("b"), 2.0)]]


def test_tags_are_removed_from_the_prompt() -> None:
    assert without_tags("a cat<lora:ink:0.8>, <lora:v2.1 x>") == ("a cat, ", [Tag("ink", 0.8), Tag("v2.1 x", 1.0)])
    assert without_tags("1 < 2 > 0") == ("1 < 2 > 0", [])


@pytest.mark.parametrize(
    ("weights", "unet", "text"),
    [
        (":0.5:0.6", 0.6, 0.5),
        (":te=0.5:unet=0.6", 0.6, 0.5),
        (":unet=0.6:te=0.5", 0.6, 0.5),
        (":0.5:unet=0.6", 0.6, 0.5),
        (":unet=0.6", 0.6, 1.0),
        (":te=0.5", 0.5, None),
        (":0.5:0.5", 0.5, None),
    ],
)
def test_a_tag_weighs_text_encoder_and_unet_as_the_web_ui_does(weights: str, unet: float, text: float | None) -> None:
    assert without_tags(f"<lora:x{weights}>") == ("", [Tag("x", unet, text)])


@pytest.mark.parametrize(
    "tag", ["<lora:x:y>", "<lora:x:nan>", "<lora:x:>", "<lora:x:1:inf>", "<lora:x:1:2:3>", "<lora:x:1:dyn=4>"]
)
def test_weights_that_cannot_be_read_are_refused_with_what_to_write(tag: str) -> None:
    with pytest.raises(
        ValueError, match=f"the tag {tag} of the prompt .* write <lora:NAME:0.8>, or <lora:NAME:0.5:0.6>"
    ):
        without_tags(f"a cat {tag}")


@pytest.mark.parametrize("tag", ["<hypernet:x:1>"])
def test_a_tag_that_cannot_be_honoured_is_refused(tag: str) -> None:
    with pytest.raises(ValueError, match="the prompt"):
        without_tags(f"a cat {tag}")
