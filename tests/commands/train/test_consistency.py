import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ldm.commands.train.consistency import FOLLOWS, INSIDE, disagreements
from ldm.commands.train.resolvers import register_resolvers

CONF = Path(__file__).parents[3] / "conf"
register_resolvers()
# Settings that may differ from the setting that they refer to by default.
FREE = (
    *("data.module.train", "data.module.val", "data.reference", "data.emoji", "data.limit", "data.count"),
    *("data.images", "data.validation_images", "data.memory"),
    *("evaluation.reference", "logger", "model", "trainer.profiler", "name"),
)


def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", overrides=["name=test", "run_dir=runs/a", *overrides])
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def references(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yields every setting that is an interpolation of another setting, with that setting."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from references(value, f"{path}.{name}".lstrip("."))
    elif isinstance(node, str) and (match := re.fullmatch(r"\$\{([a-z_][\w.]*)\}", node)):
        yield path, match[1]


def all_references() -> list[tuple[str, str]]:
    found = set()
    for file in CONF.rglob("*.yaml"):
        node = OmegaConf.to_container(OmegaConf.load(file))
        head = re.match(r"# @package (\w+)", file.read_text())
        group = head[1] if head else file.relative_to(CONF).parts[0].removesuffix(".yaml")
        found |= set(references(node, "" if group in ("_global_", "train") else group))
    return sorted(found)


def test_every_interpolation_in_the_configs_must_agree_or_is_listed_as_free() -> None:
    found = [(key, to) for key, to in all_references() if not key.startswith(FREE)]
    assert len(found) > 30
    for key, to in found:
        assert key in FOLLOWS and FOLLOWS[key] == to, f"{key} refers to {to}"
    assert {"callbacks.checkpoint.folder", "callbacks.previews.folder", "ema.folder"} == INSIDE.keys()


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("experiment=emoji", "data.shards=x"),
        ("experiment=emoji", "data=folder", "data.root=x", "training.size=[128,128]"),
        ("experiment=laion_sd15", "data.cache=x", "first_stage.weights=y", "ema=power"),
        ("experiment=sd15_finetune", "data.root=x", "training.start=y", "precision=bf16-true"),
        ("experiment=shapes_vae", "data=shards", "data.shards=x", "data.size=128"),
        ("experiment=shapes_clip", "data.shards=x"),
        ("debug=overfit", "strategy=ddp"),
    ],
)
def test_settings_chosen_by_groups_agree(overrides: tuple[str, ...]) -> None:
    assert disagreements(composed(*overrides)) == []


SHARDS = "experiment=emoji", "data.shards=x"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((*SHARDS, "data.size=128"), "data.size is 128 and training.size is [64, 64], so that the model would train"),
        ((*SHARDS, "training.size=[64,96]"), "data.size is 64 and training.size is [64, 96]"),
        (
            ("precision=fp32", "trainer.precision=bf16-mixed"),
            "trainer.precision is bf16-mixed and precision.name is 32",
        ),
        (("trainer.strategy=ddp",), "trainer.strategy is ddp and strategy.name is auto: set only strategy.name"),
        (
            ("training.sampling.steps=7",),
            "training.sampling.steps is 7 and sampler.steps is 20: set only sampler.steps",
        ),
        (("training.sampling.guidance=1",), "training.sampling.guidance is 1 and guidance.scale is 3"),
        (("training.seed=3",), "training.seed is 3 and seed is 0: set only seed, which training.seed follows"),
        (("data.module.batch_size=3",), "data.module.batch_size is 3 and data.batch_size is 64"),
        (("data.module.global_batch=128",), "data.module.global_batch is 128 and data.global_batch is None"),
        (("training.compute=bfloat16",), "training.compute is bfloat16 and precision.compute is None"),
        (
            ("training.lr={_target_: ldm.training.optim.constant}",),
            "training.lr._target_ is ldm.training.optim.constant",
        ),
        (("training.times=null",), "training.times is None and times is a group of settings: set only times"),
        (("callbacks.checkpoint.folder=/disk",), "callbacks.checkpoint.folder is /disk, but must be checkpoints in"),
        (
            ("callbacks.export.folder=/disk",),
            "callbacks.export.folder is /disk and run_dir is runs/a: set only run_dir",
        ),
    ],
)
def test_two_settings_that_must_agree_but_differ_are_both_reported(overrides: tuple[str, ...], message: str) -> None:
    (disagreement,) = disagreements(composed(*overrides))
    assert disagreement.startswith(message)
