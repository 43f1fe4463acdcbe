"""Property tests of readers of untrusted files: they return a valid result or raise a one-sentence error."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.robustness.fuzz import attempt
from experiments.robustness.targets import PICTURE, TARGETS, prepare, save_picture
from ldm.diffusion.schedule import from_config
from ldm.drawing.recorded import read_recorded
from ldm.pipeline.settings import Settings
from ldm.sampling.driver import get_solver
from ldm.sampling.grid import Grid
from ldm.sampling.spacing import get_spacing
from ldm.weights.diffusers.network_fields import TEXT, UNET, VAE
from ldm.weights.diffusers.networks import text_from, unet_from, vae_from
from ldm.weights.diffusers.scheduler import scheduler_from
from ldm.weights.diffusers.scheduler_fields import FIELDS, OF_ANY_CLASS
from ldm.weights.native import build

HERE = Path("config.json")
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3))
USUAL = st.sampled_from(
    [True, False, 1, 2, 3, 4, 8, 64, 1000, 0.5, [8, 16], [1, 1], "leading", "linspace", "trailing", "epsilon", "zero",
     "v_prediction", "heun", "bh1", "sigma_min", "linear", "squaredcos_cap_v2", "dpmsolver++", "gelu"]
)  # fmt: skip
# derandomized for reproducibility; .ci/fuzz tries other examples
FIFTY = settings(
    max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def fields(names: set[str]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(sorted(names)), USUAL | JSON, max_size=4)


@FIFTY
@given(kind=st.sampled_from(sorted(FIELDS)), config=fields({*OF_ANY_CLASS}))
def test_a_random_scheduler_config_is_refused_or_gives_valid_sampling_settings(
    kind: str, config: dict[str, Any]
) -> None:
    try:
        schedule, _, sampling = scheduler_from(config | {"_class_name": kind}, HERE)
    except ValueError as error:
        assert "config.json" in str(error)
        return
    chosen = Settings((8, 8), **sampling)
    get_solver(chosen.sampler, chosen.sampler_options)
    try:
        table = from_config(schedule)
        times = get_spacing(chosen.spacing, chosen.spacing_options)(table, 5)
        assert len(Grid.to_final(table, times, chosen.final_sigma).points) >= 5
    except ValueError as error:  # for example, betas that add no noise, or too few times for five steps
        assert len(str(error)) > 20


@pytest.mark.parametrize(
    ("kind", "reader", "names"),
    [
        ("unet", unet_from, {*UNET.honoured, *UNET.fixed}),
        ("vae", vae_from, {*VAE.honoured, *VAE.fixed}),
        ("text_tower", text_from, {*TEXT.honoured, *TEXT.fixed}),
    ],
)
def test_a_random_network_config_is_refused_or_builds_a_network(
    kind: str, reader: Callable[[dict[str, Any], Path], dict[str, Any]], names: set[str]
) -> None:
    @FIFTY
    @given(config=fields(names))
    def check(config: dict[str, Any]) -> None:
        try:
            build({"kind": kind, "config": reader(config, HERE)}, HERE)
        except ValueError as error:
            assert "config.json" in str(error)

    check()


@FIFTY
@given(edit=st.dictionaries(st.sampled_from(sorted(PICTURE)), USUAL | JSON, min_size=1, max_size=3))
def test_edited_image_settings_are_refused_or_valid(tmp_path: Path, edit: dict[str, Any]) -> None:
    try:
        save_picture(tmp_path / "x.png", PICTURE | edit)
        recorded = read_recorded(tmp_path / "x.png")
    except ValueError as error:
        assert "x.png" in str(error)
        return
    assert 1 <= recorded["threads"] <= 1024 and recorded["batch"]["position"] < len(recorded["batch"]["seeds"])


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_randomly_changed_files_are_accepted_or_refused(name: str, tmp_path: Path, sound: Path) -> None:
    """Runs a short campaign; `.ci/fuzz` runs a long one."""
    outcomes = [attempt(TARGETS[name], Random(f"test {number}"), sound) for number in range(20)]
    assert {*outcomes} <= {"accepted", "refused"} and "refused" in outcomes


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prepare(folder := tmp_path_factory.mktemp("sound"))
    return folder
