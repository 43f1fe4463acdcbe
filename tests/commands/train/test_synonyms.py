from pathlib import Path

import pytest

from ldm.commands.train.overrides import check_overrides
from ldm.commands.train.synonyms import translate
from ldm.synonyms.table import TRAINING, Instead

CONF = Path(__file__).parents[3] / "conf"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("learning_rate=1e-4", "optimizer.lr=1e-4"),
        ("--learning_rate 1e-4", "optimizer.lr=1e-4"),
        ("--learning-rate=1e-4", "optimizer.lr=1e-4"),
        ("--max_train_steps 500 --train_batch_size=4", "trainer.max_steps=500 data.batch_size=4"),
        ("mixed_precision=bf16", "precision=bf16-mixed"),
        ("--mixed_precision no", "precision=fp32"),
        ("--gradient_checkpointing", "model.checkpointing=true"),
        ("--resolution 512", "training.size=[512,512]"),
        ("--num_train_epochs 3", "trainer.max_steps=-1 trainer.max_epochs=3"),
        ("--lr_scheduler=cosine", "lr=cosine lr.final=0"),
        ("--experiment lora", "experiment=lora"),
        ("--optimizer.lr 1e-3 seed=1", "optimizer.lr=1e-3 seed=1"),
        ("sampler=DDIMScheduler", "sampler=ddim"),
    ],
)
def test_options_of_other_scripts_are_translated_with_a_note(given: str, expected: str) -> None:
    words, notes = translate(given.split())
    assert words == expected.split() and notes
    assert all(" is taken as " in note for note in notes)


def test_values_with_spaces_stay_one_argument() -> None:
    assert translate(["--instance_prompt", "a photo of sks dog"])[0] == ["data.caption=a photo of sks dog"]
    assert translate(["sampler=DPM++ 2M Karras"])[0] == ["sampler=dpmpp_2m", "sampler.spacing=karras"]


@pytest.mark.parametrize(
    "line",
    [
        "experiment=emoji optimizer.lr=1e-3 seed=1",
        "-m sampler=ddim,euler",
        "--multirun seed=1,2",
        "--cfg job",
        "--config-dir x schedule=mine",
        "--hydra-help",
        "--multi seed=1,2",
        "--experimental-rerun x.pickle",
    ],
)
def test_arguments_of_train_py_and_of_hydra_are_unchanged(line: str) -> None:
    assert translate(line.split()) == (line.split(), [])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("gradient_accumulation_steps=4", "give data.global_batch=NUMBER, the images of an optimizer step"),
        ("--adam_beta1 0.9", r"give optimizer.betas=\[BETA1,BETA2\]"),
        ("mixed_precision=fp8", "has no counterpart: give one of precision=fp32, precision=16-mixed"),
        ("--hlep", r"there is no option --hlep: did you mean --help\?"),
        ("resolution=512,768", r"give training.size=\[NUMBER,NUMBER\]"),
    ],
)
def test_options_without_a_counterpart_are_refused_with_what_to_give(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        translate(line.split())


def command_lines() -> list[list[str]]:
    """Returns the words of all translations, with a number as the value, on lines that give no key twice."""
    meanings = [meaning for meaning in TRAINING.values() if not isinstance(meaning, Instead)]
    translations = {
        words for meaning in meanings for words in (meaning.values() if isinstance(meaning, dict) else [meaning])
    }
    lines: list[dict[str, str]] = []
    for words in sorted(translations):
        given = {word.partition("=")[0]: word.replace("{}", "8") for word in words.split()}
        line = next((line for line in lines if not line.keys() & given.keys()), None)
        if line is None:
            lines.append(line := {})
        line |= given
    return [list(line.values()) for line in lines]


@pytest.mark.slow
def test_every_translation_is_a_valid_setting_of_a_recipe() -> None:
    for line in command_lines():
        check_overrides(["experiment=dreambooth", *({"run_dir=x"} - {*line}), *line], CONF)
