"""Training an adapter: which weights change, what files contain, and with which base they can be used."""

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.__main__ import main
from ldm.adapters.train_only import TrainOnly
from ldm.callbacks.averages.ema import EMA
from ldm.callbacks.averages.power_ema import PowerEMA
from ldm.callbacks.checkpointing import checkpoint_file
from ldm.callbacks.checkpointing.checkpoint import Checkpoint
from ldm.callbacks.checkpointing.sharded import ShardedModelParallel
from ldm.callbacks.export import Export
from ldm.pipeline.pipeline import Pipeline
from ldm.training.diffusion import DiffusionTraining
from ldm.training.start import start_from
from ldm.weights.model import model_fingerprint, read_model, save_model
from ldm.weights.parts import first_stage, text_encoder
from tests.pipeline.tiny import assembled
from tests.tiny import save_tiny_model, tiny_about, tiny_unet
from tests.training.tiny import diffusion, fit

NAMES = ["*.text_attention.*"]
State = dict[str, Tensor]


def adapted(base: Path, names: list[str] = NAMES) -> DiffusionTraining:
    """A training module for an adapter of the tiny model in a folder."""
    backbone, adapter = tiny_unet(seed=9).train(), TrainOnly(names)
    start = start_from(backbone, str(base / "unet.safetensors"))
    adapter.adapt(backbone)
    parts: dict[str, Any] = {
        "first_stage": first_stage(str(base / "vae.safetensors")),
        "text_encoder": text_encoder(str(base / "text_tower.safetensors")),
    }
    return diffusion(backbone=backbone, base=start, adapter=adapter, **parts)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the base model."""
    folder = tmp_path_factory.mktemp("base")
    save_tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DiffusionTraining, EMA]:
    """The folder of an adapter run, its module and its averages."""
    folder, module, ema = tmp_path_factory.mktemp("run"), adapted(base), EMA(decay=0.5)
    callbacks = [ema, Checkpoint(folder), Export(folder)]
    fit(folder, module, 4, callbacks=callbacks, enable_checkpointing=True)
    return folder, module, ema


def is_text(name: str) -> bool:
    return ".text_attention." in name


def averaged(module: DiffusionTraining, ema: EMA) -> State:
    """The exported network: frozen weights of the base, and averages of the trained ones."""
    return {name: ema.averages.get(name, weight) for name, weight in module.backbone.state_dict().items()}


def test_training_changes_matching_weights_only(
    trained: tuple[Path, DiffusionTraining, EMA],
) -> None:
    before, after = tiny_unet().state_dict(), trained[1].backbone.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if is_text(name)}


def test_a_checkpoint_contains_trained_weights_only(trained: tuple[Path, DiffusionTraining, EMA]) -> None:
    names = [name for name, _ in tiny_unet().named_parameters() if is_text(name)]
    checkpoint = checkpoint_file.read(trained[0] / "last.ckpt")
    assert [*checkpoint["state_dict"]] == [f"backbone.{name}" for name in names]
    assert [*checkpoint["ema"]] == names
    moments = checkpoint["optimizer_states"][0]["state"].values()
    shapes = [weight.shape for name, weight in tiny_unet().named_parameters() if is_text(name)]
    assert [state["exp_avg"].shape for state in moments] == shapes


def test_file_sizes_are_proportional_to_the_trained_weights(base: Path, tmp_path: Path) -> None:
    """A checkpoint contains the weights, their average and Adam's two moments; the rest has a constant size."""
    sizes, counts = {}, {}
    for name, patterns in (("few", ["conv_out.bias"]), ("text", NAMES), ("all", ["*"])):
        module, folder = adapted(base, patterns), tmp_path / name
        fit(folder, module, 1, callbacks=[EMA(), Checkpoint(folder), Export(folder)], enable_checkpointing=True)
        counts[name] = sum(weight.numel() for weight in module.trainable().values())
        sizes[name] = [(folder / file).stat().st_size for file in ("last.ckpt", "adapter.safetensors")]
        with safe_open(folder / "adapter.safetensors", framework="pt") as file:
            assert set(file.keys()) == module.trainable().keys()
    for file, copies in enumerate((4, 1)):
        for name in ("text", "all"):
            growth = sizes[name][file] - sizes["few"][file]
            tensors = 4 * copies * (counts[name] - counts["few"])
            assert tensors <= growth < 1.3 * tensors + 50_000  # names and padding of tensors


@pytest.mark.parametrize("file", ["adapter.safetensors", "last.ckpt"])
def test_reading_an_adapter_restores_the_trained_network_exactly(
    trained: tuple[Path, DiffusionTraining, EMA], file: str
) -> None:
    folder, module, ema = trained
    model = read_model(folder / file)
    state = model.backbone.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in averaged(module, ema).items())
    assert model.about["kind"] == "unet" and model.about["config"] == module.backbone.config


def test_it_generates_the_same_images_as_the_trained_network(trained: tuple[Path, DiffusionTraining, EMA]) -> None:
    folder, module, ema = trained
    pipeline, unet = Pipeline.load(str(folder / "adapter.safetensors"), "cpu"), tiny_unet()
    unadapted = assembled(pipeline, backbone=tiny_unet())("a red circle").images
    unet.load_state_dict(averaged(module, ema))
    images = pipeline("a red circle").images
    assert torch.equal(images, assembled(pipeline, backbone=unet)("a red circle").images)
    assert not torch.equal(images, unadapted)


def test_an_adapter_can_be_loaded_in_half_precision(trained: tuple[Path, DiffusionTraining, EMA]) -> None:
    folder, module, ema = trained
    state = read_model(folder / "adapter.safetensors", torch.bfloat16).backbone.state_dict()
    assert all(torch.equal(state[name], weight.bfloat16()) for name, weight in averaged(module, ema).items())


def test_fingerprints_differ_between_base_and_adapters(
    base: Path, trained: tuple[Path, DiffusionTraining, EMA], tmp_path: Path
) -> None:
    fit(tmp_path, adapted(base), 1, callbacks=[Export(tmp_path)])
    fingerprints = [model_fingerprint(folder) for folder in (base / "unet.safetensors", trained[0], tmp_path)]
    assert len(set(fingerprints)) == 3
    assert model_fingerprint(trained[0] / "adapter.safetensors") == model_fingerprint(trained[0] / "last.ckpt")


@pytest.fixture
def standalone(tmp_path: Path) -> Path:
    """A folder with a base of its own and an adapter trained on it."""
    save_tiny_model(tmp_path)
    fit(tmp_path, adapted(tmp_path), 1, callbacks=[Export(tmp_path), Checkpoint(tmp_path)], enable_checkpointing=True)
    return tmp_path


def replace_base(folder: Path) -> None:
    save_model(folder / "unet.safetensors", tiny_unet(seed=5).state_dict(), tiny_about(folder))


@pytest.mark.parametrize("read", [read_model, model_fingerprint])
def test_a_base_that_has_changed_is_refused(standalone: Path, read: Callable[[Path], Any]) -> None:
    replace_base(standalone)
    with pytest.raises(
        ValueError, match=r"adapter of .*unet\.safetensors, which has changed since: restore the file whose"
    ):
        read(standalone / "adapter.safetensors")


@pytest.mark.parametrize("read", [read_model, model_fingerprint])
def test_a_base_that_is_missing_is_named(standalone: Path, read: Callable[[Path], Any]) -> None:
    (standalone / "unet.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"is an adapter of .*unet\.safetensors, which does not exist: restore"):
        read(standalone / "adapter.safetensors")


def test_a_run_does_not_resume_on_another_base(standalone: Path) -> None:
    replace_base(standalone)
    with pytest.raises(ValueError, match=r"a different model than this config builds \(base \w{64} → \w{64}\)"):
        fit(standalone, adapted(standalone), 2, standalone / "last.ckpt")


def test_a_run_does_not_resume_with_another_adapter(standalone: Path) -> None:
    with pytest.raises(ValueError, match=r"a different model than this config builds \(names \['\*.text_attention"):
        fit(standalone, adapted(standalone, ["conv_out.*"]), 2, standalone / "last.ckpt")


def test_a_run_of_the_full_network_does_not_resume_from_an_adapter(standalone: Path) -> None:
    with pytest.raises(ValueError, match=r"a different model than this config builds \(kind adapter → unet"):
        fit(standalone, diffusion(), 2, standalone / "last.ckpt")


def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(base: Path, tmp_path: Path) -> None:
    def train(folder: Path, steps: int, resume: Path | None = None) -> tuple[State, State]:
        module, ema = adapted(base), EMA(decay=0.5)
        fit(folder, module, steps, resume, callbacks=[ema, Checkpoint(folder)], enable_checkpointing=True)
        return module.backbone.state_dict(), ema.averages

    uninterrupted = train(tmp_path / "a", 5)
    train(tmp_path / "b", 3)
    resumed = train(tmp_path / "b", 5, tmp_path / "b" / "last.ckpt")
    for ours, theirs in zip(resumed, uninterrupted, strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_adapter_of_untrained_weights_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"an adapter needs the weights of a trained model: give training\.start=MODEL"
    ):
        diffusion(adapter=TrainOnly(NAMES))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.popitem(), r"expected adapter \(1 missing: \S+text_attention"),
        (
            lambda state: state.update({"conv_in.bias": torch.zeros(8)}),
            r"expected adapter \(1 unexpected: conv_in\.bias\)",
        ),
        (
            lambda state: state.update({next(iter(state)): torch.zeros(1)}),
            r"expected adapter \(.*text_attention.* \[1\]",
        ),
        (lambda state: next(iter(state.values())).fill_(torch.nan), "NaN"),
    ],
    ids=["missing", "unexpected", "misshapen", "not finite"],
)
def test_missing_unexpected_or_invalid_tensors_are_refused(
    standalone: Path, change: Callable[[State], Any], message: str
) -> None:
    path = standalone / "adapter.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(state)
    save_file(state, path, metadata)
    with pytest.raises(ValueError, match=message):
        read_model(path)


def test_averages_computed_after_training_are_adapters_too(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = adapted(base)
    callbacks = [PowerEMA(tmp_path / "ema", [0.05, 0.1], 2, "float32"), Checkpoint(tmp_path)]
    fit(tmp_path, module, 4, callbacks=callbacks, enable_checkpointing=True)
    assert main(["ema", str(tmp_path), "--length", "0.1"]) == 0
    model = read_model(tmp_path / "ema_0.100.safetensors").backbone.state_dict()
    tracked = load_file(next((tmp_path / "ema").glob("step_00000004_length_0.100*")))
    assert {name for name in model if is_text(name)} == tracked.keys()
    for name, weight in model.items():
        if name in tracked:
            torch.testing.assert_close(weight, tracked[name], rtol=1e-3, atol=1e-4)
        else:
            assert torch.equal(weight, tiny_unet().state_dict()[name])


def test_a_sharded_run_trains_and_resumes_like_a_run_on_one_device(base: Path, tmp_path: Path) -> None:
    plain, ema = adapted(base), EMA(decay=0.9)
    fit(tmp_path, plain, 4, callbacks=[ema], gradient_clip_val=1.0)
    try:
        for steps, resume in ((2, None), (4, tmp_path / "2.ckpt")):
            how = {"strategy": ShardedModelParallel(), "callbacks": [EMA(decay=0.9), Export(tmp_path)]}
            trainer = fit(tmp_path, adapted(base), steps, resume, gradient_clip_val=1.0, **how)
            trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
    finally:
        dist.destroy_process_group()
    checkpoint, exported = checkpoint_file.read(tmp_path / "4.ckpt"), load_file(tmp_path / "adapter.safetensors")
    assert checkpoint["ema"].keys() == exported.keys() == plain.trainable().keys()
    for name, weight in plain.trainable().items():
        torch.testing.assert_close(checkpoint["state_dict"][f"backbone.{name}"], weight.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(exported[name], ema.averages[name], rtol=1e-4, atol=1e-5)
    assert not any("conv_in" in name for name in chain(checkpoint["state_dict"], exported))
