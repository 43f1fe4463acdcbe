"""Checks the tables of config fields against the libraries that write the configs."""

import ast
import inspect
from pathlib import Path

import diffusers
import pytest
from transformers import CLIPTextConfig, CLIPVisionConfig

from ldm.weights.diffusers.fields import Fields
from ldm.weights.diffusers.network_fields import IMAGE, TEXT, UNET, VAE
from ldm.weights.diffusers.scheduler_fields import FIELDS


def known(fields: Fields) -> set[str]:
    return {*fields.honoured, *fields.fixed, *fields.ignored}


def parameters_of(kind: str) -> set[str]:
    """Reads the fields of a scheduler from diffusers' source, which works without its optional packages."""
    for file in Path(diffusers.__file__).parent.glob("schedulers/scheduling_*.py"):
        if f"class {kind}(" not in file.read_text():
            continue
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name == kind:
                [init] = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
                return {argument.arg for argument in init.args.args} - {"self"}
    raise LookupError(kind)


@pytest.mark.parametrize("kind", FIELDS)
def test_every_field_of_a_scheduler_of_diffusers_is_in_the_table(kind: str) -> None:
    parameters = parameters_of(kind)
    assert parameters and parameters <= known(FIELDS[kind])


@pytest.mark.parametrize(("kind", "fields"), [("UNet2DConditionModel", UNET), ("AutoencoderKL", VAE)])
def test_every_field_of_a_network_of_diffusers_is_in_the_table(kind: str, fields: Fields) -> None:
    parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters.keys() - {"self"}
    assert parameters and parameters <= known(fields)


@pytest.mark.parametrize(("config", "fields"), [(CLIPTextConfig(), TEXT), (CLIPVisionConfig(), IMAGE)])
def test_every_field_of_a_clip_tower_of_transformers_is_in_the_table(
    config: CLIPTextConfig | CLIPVisionConfig, fields: Fields
) -> None:
    written = {name for name in config.to_dict() if not name.startswith("_")}
    assert written and written <= known(fields)


@pytest.mark.parametrize("fields", [*FIELDS.values(), UNET, VAE, TEXT, IMAGE])
def test_no_field_is_in_two_columns_of_a_table(fields: Fields) -> None:
    assert len(known(fields)) == len(fields.honoured) + len(fields.fixed) + len(fields.ignored)
