import re
import subprocess
import sys
from collections.abc import Iterable

import pytest

from ldm.commands.sample.arguments import help_text, parse
from ldm.commands.sample.listing import listing
from ldm.drawing.keys import KEYS
from ldm.errors import UsageError
from ldm.sampling.driver import SAMPLERS
from ldm.sampling.spacing import SPACINGS


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat, a dog; 'quoted' and \"double\"",
        "x=1",
        "e=mc2",
        "a sign that says steps=20",
        "1=2",
        "[1, 2] {a: b} (c) <d> $e `f` \\ ~ %",
        "",
        "=",
        "- a list",
        "-1",
        "--",
        "painting --no frames",
        "colour=red",
        "猫=ねこ",
        "two\nlines",
    ],
)
def test_an_argument_without_a_known_key_is_a_prompt(prompt: str) -> None:
    arguments = parse([prompt]) if prompt != "--" else parse(["--", prompt])
    assert arguments.prompts == [prompt] and not arguments.given


def test_keys_and_prompts_may_be_mixed() -> None:
    arguments = parse(
        ["seed=7", "a cat", "size=64x96", "guidance=2.5", "negative=a=b, c", "a dog", "out=my folder", "n=2"]
    )
    assert arguments.prompts == ["a cat", "a dog"]
    assert arguments.given == {
        "seed": 7, "size": (64, 96), "guidance": 2.5, "negative": "a=b, c", "out": "my folder", "n": 2,
    }  # fmt: skip


def test_all_arguments_after_two_dashes_are_prompts() -> None:
    assert parse(["seed=1", "--", "steps=20", "--help", "--", "stpes=3"]).prompts == [
        "steps=20", "--help", "--", "stpes=3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "suggestion"),
    [
        ("stpes=20", "steps=20"),
        ("step=20", "steps=20"),
        ("Seed=1", "seed=1"),
        ("guidence=2", "guidance=2"),
        ("modle=x=y", "model=x=y"),
        ("Negative_prompt=ugly", "negative=ugly"),
        ("--guidence-scale=3", "guidance=3"),
        ("--hlep", "--help"),
    ],
)
def test_a_misspelt_key_is_refused_with_a_suggestion(text: str, suggestion: str) -> None:
    with pytest.raises(UsageError, match=f"looks like {re.escape(suggestion)}; write that, or put it after --"):
        parse([text])


@pytest.mark.parametrize(
    ("line", "given"),
    [
        ("--seed=1", {"seed": 1}),
        ("--seed 1 --batch-size 2", {"seed": 1, "batch_size": 2}),
        ("num_inference_steps=30 guidance_scale=7.5", {"steps": 30, "guidance": 7.5}),
        ("--guidance-scale=3", {"guidance": 3.0}),
        ("image=cat.png mask_image=x.png", {"init": "cat.png", "mask": "x.png"}),
        ("height=64 width=96", {"size": (64, 96)}),
        ("sampler=DPM++_2M_Karras", {"sampler": "dpmpp_2m", "spacing": "karras"}),
        ("--scheduler DDIMScheduler", {"sampler": "ddim"}),
        ("--H 64 --W 96", {"size": (64, 96)}),
        ("CLIP_stop_at_last_layers=2", {"clip_skip": 1}),
    ],
)
def test_a_name_of_another_program_is_taken_for_a_key_with_a_note(line: str, given: dict[str, object]) -> None:
    arguments = parse(["red", *line.split()])
    assert arguments.given == given and arguments.prompts == ["red"]
    assert arguments.notes and all(" is taken as " in note for note in arguments.notes)
    assert parse(["--", *line.split()]).prompts == line.split()


def test_a_prompt_may_be_given_as_in_other_programs() -> None:
    arguments = parse(["--prompt", "a red circle", "steps=2"])
    assert arguments.prompts == ["a red circle"]
    assert arguments.notes == []  # since nothing was renamed


@pytest.mark.parametrize("option", ["--fp16", "--skip_grid", "--config=v1.yaml"])
def test_an_unknown_option_is_refused_instead_of_taken_for_a_prompt(option: str) -> None:
    with pytest.raises(UsageError, match=f"there is no option {option.partition('=')[0]}: "):
        parse(["red", option])
    assert parse(["--", option]).prompts == [option]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("generator=1", "generator is not a setting: give seed=SEED, with noise=diffusers"),
        ("--plms", "plms is not a setting: give sampler=PLMS"),
        ("--steps", "--steps has no value: write steps=VALUE"),
        ("num_inference_steps=0", "num_inference_steps must be an integer >= 1"),
    ],
)
def test_a_name_of_another_program_without_a_counterpart_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(["red", text])


def test_a_question_mark_asks_for_the_values_of_a_key_except_for_text() -> None:
    arguments = parse(["sampler=?", "scheduler=?", "negative=?"])
    assert arguments.listed == ["sampler", "sampler"] and arguments.given == {"negative": "?"}


@pytest.mark.parametrize(("key", "names"), [("sampler", SAMPLERS), ("spacing", SPACINGS), ("steps", ())])
def test_a_listing_has_a_line_for_each_value(key: str, names: Iterable[str]) -> None:
    title, *lines = listing(key)
    assert title.startswith(f"{key}: ") and [line.split()[0] for line in lines] == [*names]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps=abc", "an integer >= 1"),
        ("steps=0", "an integer >= 1"),
        ("steps=2.5", "an integer >= 1"),
        ("seed=-1", "an integer >= 0"),
        ("seed=1,2,3", "one integer: n=3 uses it and the next two"),
        ("n=", "an integer >= 1"),
        ("guidance=nan", "a number"),
        ("guidance=high", "a number"),
        ("size=64", "HEIGHTxWIDTH"),
        ("strength=0", "a number above 0 and at most 1"),
        ("strength=1.1", "a number above 0 and at most 1"),
        ("guidance_interval=3", "LOW,HIGH of sigma/alpha"),
        ("size=64 x 64", "HEIGHTxWIDTH"),
        ("precision=64", "one of auto, 32, bf16, 16"),
        ("model=", "a name or path"),
        ("fixed_steps=yes", "one of true, false"),
        ("offload=disk", "one of none, idle, sequential"),
        ("preview=png", "one of gif, terminal"),
    ],
)
def test_an_invalid_value_is_refused_with_what_was_given(text: str, expected: str) -> None:
    with pytest.raises(UsageError, match=f"{re.escape(text)} was given, but .* must be {expected}"):
        parse([text])


def test_a_key_given_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="steps= is given twice"):
        parse(["steps=1", "steps=2"])


def test_help_and_debug_are_not_prompts() -> None:
    arguments = parse(["--help", "-h", "--debug", "a cat"])
    assert arguments.help and arguments.debug and arguments.prompts == ["a cat"]


def test_help_lists_every_key() -> None:
    assert all(f"\n  {name}= " in help_text() for name in KEYS)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("eta=0.5", {"eta": 0.5}),
        ("order=3,variant=bh1,corrector=false", {"order": 3, "variant": "bh1", "corrector": False}),
        ("sigmas=[10,3,0.5]", {"sigmas": [10, 3, 0.5]}),
        ("times=[1,0.5],x=1", {"times": [1, 0.5], "x": 1}),
    ],
)
def test_options_are_parsed_as_names_and_values(text: str, parsed: dict[str, object]) -> None:
    assert parse(["red", f"sampler_options={text}"]).given["sampler_options"] == parsed


@pytest.mark.parametrize("text", ["eta", "eta=", "eta=1,", "=1", "sigmas=[1,2"])
def test_malformed_options_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="sampler_options must be name=value,name=value"):
        parse(["red", f"sampler_options={text}"])


@pytest.mark.parametrize("text", ["caf\udce9", "model=\udce9", "\ud83d"])
def test_an_argument_that_is_not_utf_8_is_refused_before_the_model_is_loaded(text):
    with pytest.raises(UsageError, match="is not UTF-8 text"):
        parse(["a cat", text])


def test_a_size_that_is_too_large_is_refused_before_the_model_is_loaded():
    with pytest.raises(UsageError, match=r"size=96000x96000 was given, but size must be .* at most 33,554,432 pixels"):
        parse(["a cat", "size=96000x96000"])


def test_the_help_and_the_arguments_are_read_without_torch() -> None:
    code = "import sys; from ldm.commands.sample import arguments; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
