from typing import Any

import pytest

from ldm.drawing.keys import KEYS
from ldm.pipeline.settings import Settings
from ldm.sampling.driver import SAMPLERS, get_solver
from ldm.sampling.spacing import get_spacing
from ldm.synonyms.sampling import CLASSES, sampler_settings, translate
from ldm.synonyms.table import CALL, COMMAND, SAMPLING, Same
from ldm.synonyms.table import SAMPLERS as NAMES

TABLE = SAMPLING | COMMAND


def test_names_of_diffusers_are_translated_with_a_note_each() -> None:
    given = {"num_inference_steps": 30, "guidance_scale": 7.5, "negative_prompt": "blurry", "seed": 1}
    settings, notes = translate(given, TABLE)
    assert settings == {"steps": 30, "guidance": 7.5, "negative": "blurry", "seed": 1}
    assert notes == [
        "num_inference_steps=30 is taken as steps=30",
        "guidance_scale=7.5 is taken as guidance=7.5",
        "negative_prompt=blurry is taken as negative=blurry",
    ]


def test_settings_of_ldm_are_unchanged_and_need_no_note() -> None:
    given = {"steps": 3, "sampler": "unipc", "spacing": "karras", "strength": 0.5, "size": (64, 64)}
    assert translate(given, TABLE) == (given, [])


@pytest.mark.parametrize(("scale", "guidance"), [(0.0, 1.0), (1.0, 1.0), (3.0, 3.0)])
def test_a_guidance_scale_up_to_1_is_no_guidance_as_in_diffusers(scale: float, guidance: float) -> None:
    assert translate({"guidance_scale": scale}, TABLE)[0] == {"guidance": guidance}
    assert translate({"cfg_scale": scale}, TABLE)[0] == {"guidance": scale}  # in the web UI it is not


def test_a_height_and_a_width_are_a_size() -> None:
    assert translate({"width": 96, "height": 64}, TABLE)[0] == {"size": (64, 96)}
    assert translate({"width": 96}, TABLE, size=(32, 32))[0] == {"size": (32, 96)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 3, "num_inference_steps": 3}, "steps and num_inference_steps, which mean the same, are both given"),
        ({"size": (8, 8), "height": 8}, "height=8 and size, which mean the same, are both given"),
        ({"height": 8}, "height=8 is given alone: give both height and width"),
        ({"denoising_strength": 0.5}, "denoising_strength is not a setting: give strength"),
        ({"eta": 0.5}, "eta is not a setting: give sampler_options=eta=NUMBER"),
        ({"sampler": "LMS Karras", "spacing": "leading"}, "means spacing=karras, but spacing=leading is given"),
    ],
)
def test_what_contradicts_or_has_another_meaning_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        translate(given, TABLE)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("DPM++ 2M Karras", {"sampler": "dpmpp_2m", "spacing": "karras"}),
        ("DPM++ 2M SDE Exponential", {"sampler": "dpmpp_2m_sde", "spacing": "exponential"}),
        ("DPM++ 2S a", {"sampler": "dpmpp_2s", "sampler_options": {"eta": 1.0}}),
        ("Euler a", {"sampler": "euler_a"}),
        ("PLMS", {"sampler": "pndm", "sampler_options": {"prk": False}}),
        ("euler_ancestral", {"sampler": "euler_a"}),
        ("DDIMScheduler", {"sampler": "ddim"}),
        ("DPMSolverMultistepScheduler", {"sampler": "dpmpp_2m"}),
        ("karras", {"spacing": "karras"}),
        ("DPM adaptive", {}),
        ("LCMScheduler", {}),
        ("unipc", {}),
    ],
)
def test_samplers_of_other_programs_have_known_meanings(name: str, expected: dict[str, Any]) -> None:
    assert sampler_settings(name) == expected


def test_options_that_are_given_take_precedence_over_those_of_a_name() -> None:
    settings, notes = translate({"sampler": "UniPC", "sampler_options": {"order": 2}}, TABLE)
    assert settings == {"sampler": "unipc", "sampler_options": {"order": 2, "variant": "bh1"}}
    assert notes == ["sampler=UniPC is taken as sampler=unipc sampler_options=order=3,variant=bh1"]


@pytest.mark.parametrize("name", [*NAMES, *sorted(CLASSES), *(f"{name}_karras" for name in NAMES)])
def test_every_listed_sampler_exists_with_its_options(name: str) -> None:
    settings = sampler_settings(name) or {"sampler": name}
    get_solver(settings["sampler"], settings.get("sampler_options"))
    get_spacing(settings.get("spacing", "karras"))


def test_names_stand_for_settings_that_exist_and_hide_none() -> None:
    call = {*Settings.__annotations__, "prompts", "negative", "image", "mask", "strength", "guidance", "seeds"}
    for table, known in ((SAMPLING, call & {*KEYS}), (COMMAND, {*KEYS, "prompt"}), (CALL, call)):
        ours = {found.ours for found in table.values() if isinstance(found, Same)} - {"height", "width"}
        assert ours <= known and not table.keys() & (known - {"prompt"})
    assert not SAMPLING.keys() & call and not {*NAMES} & ({*SAMPLERS} - {name for name in NAMES if name in SAMPLERS})
