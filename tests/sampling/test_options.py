from pathlib import Path

import pytest
import yaml

from ldm.sampling.driver import SAMPLERS, get_solver
from ldm.sampling.spacing import SPACINGS, get_spacing

CONF = Path(__file__).parents[2] / "conf" / "sampler"


def test_samplers_and_their_configs_have_the_same_names():
    assert {path.stem for path in CONF.glob("*.yaml")} == {*SAMPLERS}


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_config_of_a_sampler_is_valid_and_sets_no_options(name):
    config = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert config["name"] == name and config["spacing"] in SPACINGS
    assert config["options"] == {}
    get_solver(name, config["options"])
    get_spacing(config["spacing"], config["spacing_options"])
