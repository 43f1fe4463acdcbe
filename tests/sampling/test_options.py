from pathlib import Path

import pytest
import yaml

from ldm.sampling.driver import SAMPLERS, get_solver
from ldm.sampling.spacing import SPACINGS, get_spacing

CONF = Path(__file__).parents[2] / "conf" / "sampler"


def test_every_sampler_has_a_config_and_every_config_a_sampler():
    assert {path.stem for path in CONF.glob("*.yaml")} == {*SAMPLERS}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_config_of_a_sampler_leaves_the_options_to_the_function(name):
    config = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert config["name"] == name and config["spacing"] in SPACINGS
    assert config["options"] == {}
    get_solver(name, config["options"])
    get_spacing(config["spacing"], config["spacing_options"])
