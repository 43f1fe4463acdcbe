"""Tests LoRA training: the contents of checkpoints and adapter files, resuming, and loading."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ldm.adapters.adapter import from_config
from ldm.adapters.lora import LoRA
from ldm.callbacks.averages.ema import EMA
from ldm.callbacks.checkpointing import checkpoint_file
from ldm.callbacks.checkpointing.checkpoint import Checkpoint
from ldm.callbacks.checkpointing.sharded import ShardedModelParallel
from ldm.callbacks.export import Export
from ldm.nn.backbone import Backbone, trainable
from ldm.pipeline.pipeline import Pipeline
from ldm.training.diffusion import DiffusionTraining
from ldm.training.start import start_from
from ldm.weights.adapters.reader import networks_of, open_adapter
from ldm.weights.model import model_fingerprint, read_model, save_model
from ldm.weights.native import save_network
from ldm.weights.parts import first_stage, text_encoder
from tests.pipeline.tiny import assembled
from tests.tiny import save_tiny_model, tiny_about, tiny_dit, tiny_unet
from tests.training.tiny import ADAM, STEADY, diffusion, fit

KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"stabilised": True, "alpha": 2.0},
    "DoRA": {"decomposed": True, "targets": "all", "ranks": {"*.conv1": 1}},
}
NETWORKS = {"unet": tiny_unet, "dit": tiny_dit}


def adapted(base: Path, kind: str = "unet", optimizer: Any = ADAM, **how: Any) -> DiffusionTraining:
    """Returns a training module with a LoRA of the tiny model in a folder."""
    backbone: Backbone = NETWORKS[kind](seed=9).train()  # type: ignore[operator]
    adapter = LoRA(rank=2, **how)
    start = start_from(backbone, str(base / f"{kind}.safetensors"))
    adapter.adapt(backbone)
    parts: dict[str, Any] = {
        "first_stage": first_stage(str(base / "vae.safetensors")),
        "text_encoder": text_encoder(str(base / "text_tower.safetensors")),
    }
    return diffusion(backbone=backbone, base=start, adapter=adapter, optimizer=optimizer, **parts)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the base models."""
    folder = tmp_path_factory.mktemp("base")
    save_tiny_model(folder)
    about = tiny_about(folder) | {"kind": "dit", "config": tiny_dit().config}
    save_model(folder / "dit.safetensors", tiny_dit().state_dict(), about)
    return folder


@pytest.fixture(scope="module", params=[*((kind, "unet") for kind in KINDS), ("LoRA", "dit")], ids="-".join)
def trained(
    base: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, DiffusionTraining, dict[str, Tensor]]:
    """The folder of a LoRA run, its module and the trained weights."""
    folder, module = tmp_path_factory.mktemp("run"), adapted(base, request.param[1], **KINDS[request.param[0]])
    fit(folder, module, 3, callbacks=[Checkpoint(folder), Export(folder)], enable_checkpointing=True)
    return folder, module, {name: weight.detach().clone() for name, weight in module.trainable().items()}


Trained = tuple[Path, DiffusionTraining, dict[str, Tensor]]


def merged(module: DiffusionTraining) -> dict[str, Tensor]:
    """Returns the weights of a trained module after merging its adapter."""
    kind = module.backbone.kind
    network = NETWORKS[kind]()
    adapter = from_config(module.adapter.config)  # type: ignore[union-attr]
    adapter.adapt(network)
    network.load_state_dict(module.backbone.state_dict())
    adapter.merge(network)
    return network.state_dict()


def test_training_changes_every_trainable_weight_and_no_other(trained: Trained) -> None:
    _, module, weights = trained
    fresh = NETWORKS[module.backbone.kind]()
    module.adapter.adapt(fresh)  # type: ignore[union-attr]
    before, after = fresh.state_dict(), module.backbone.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {*weights}


def test_a_checkpoint_contains_only_the_trained_weights(trained: Trained) -> None:
    folder, _, weights = trained
    state = checkpoint_file.read(folder / "last.ckpt")["state_dict"]
    assert {*state} == {f"backbone.{name}" for name in weights}


def test_a_loaded_adapter_is_bit_identical_to_the_merged_network(trained: Trained) -> None:
    folder, module, _ = trained
    expected = merged(module)
    for file in ("adapter.safetensors", "last.ckpt"):
        state = read_model(folder / file).backbone.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], weight) for name, weight in expected.items())
    assert model_fingerprint(folder / "adapter.safetensors") == model_fingerprint(folder / "last.ckpt")


def test_the_adapter_file_has_the_kohya_layout_and_an_alpha_for_each_layer(trained: Trained) -> None:
    folder, module, weights = trained
    tensors = load_file(folder / "adapter.safetensors")
    labels = {name.partition(".")[0] for name in tensors}
    assert len(labels) == sum(name.endswith(".down") for name in weights)
    assert all(label.startswith("lora_unet_") and f"{label}.alpha" in tensors for label in labels)
    pipeline = Pipeline.load(str(folder / "adapter.safetensors"), "cpu")
    found = open_adapter(folder).changes(networks_of(pipeline.backbone, pipeline.text_encoder))["unet"]
    plain, expected = NETWORKS[module.backbone.kind]().state_dict(), merged(module)
    for name, change in found.items():
        torch.testing.assert_close(
            change.changed(plain[f"{name}.weight"]), expected[f"{name}.weight"], rtol=1e-6, atol=1e-6
        )


def test_the_metadata_contain_base_rank_and_steps(trained: Trained) -> None:
    folder, module, _ = trained
    with safe_open(folder / "adapter.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_steps"] == "3" and metadata["ss_network_dim"] == "2"
    assert metadata["ss_learning_rate"] == "0.01" and metadata["ss_optimizer"] == "AdamW"
    assert metadata["ss_sd_model_name"] == f"{module.backbone.kind}.safetensors"
    assert metadata["modelspec.resolution"] == "8x8" and metadata["modelspec.prediction_type"] == "flow"
    assert "modelspec.license" not in metadata


def test_the_licence_of_the_base_is_copied_to_the_adapter(base: Path, tmp_path: Path) -> None:
    state, licence = tiny_unet().state_dict(), {"modelspec.license": "CC0"}
    save_network(tmp_path / "unet.safetensors", state=state, metadata=licence, **tiny_about(base))
    for part in ("vae", "text_tower"):
        (tmp_path / f"{part}.safetensors").write_bytes((base / f"{part}.safetensors").read_bytes())
    fit(tmp_path, adapted(tmp_path), 1, callbacks=[Export(tmp_path)])
    with safe_open(tmp_path / "adapter.safetensors", "pt") as file:
        assert file.metadata()["modelspec.license"] == "CC0"


def test_a_loaded_adapter_samples_the_same_images_as_the_trained_network(trained: Trained) -> None:
    folder, module, _ = trained
    pipeline = Pipeline.load(str(folder / "adapter.safetensors"), "cpu")
    images = pipeline("a red circle").images
    plain = assembled(pipeline, backbone=NETWORKS[module.backbone.kind]())("a red circle").images
    unmerged = assembled(pipeline, backbone=module.backbone.eval())("a red circle").images
    assert not torch.equal(images, plain)
    assert (images.int() - unmerged.int()).abs().max() <= 1


@pytest.mark.parametrize("how", [{}, {"dropout": 0.3, "decomposed": True}], ids=["LoRA", "DoRA with dropout"])
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(
    base: Path, tmp_path: Path, how: dict[str, Any]
) -> None:
    def train(folder: Path, steps: int, resume: Path | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        torch.manual_seed(steps)  # the global seed must have no effect
        module, ema = adapted(base, **how), EMA(decay=0.5)
        fit(folder, module, steps, resume, callbacks=[ema, Checkpoint(folder)], enable_checkpointing=True)
        return module.backbone.state_dict(), ema.averages

    straight = train(tmp_path / "a", 5)
    train(tmp_path / "b", 3)
    resumed = train(tmp_path / "b", 5, tmp_path / "b" / "last.ckpt")
    for ours, theirs in zip(resumed, straight, strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_bfloat16_base_is_trained_with_float32_changes(base: Path, tmp_path: Path) -> None:
    module = adapted(base, base_dtype="bfloat16")
    fit(tmp_path, module, 2, callbacks=[Export(tmp_path)], precision="bf16-mixed")
    assert module.backbone.conv_in.weight.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert {weight.dtype for weight in trainable(module.backbone).values()} == {torch.float32}
    loaded = read_model(tmp_path / "adapter.safetensors").backbone
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}


def test_a_sharded_run_trains_and_resumes_like_a_single_process_run(base: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"decomposed": True, "optimizer": STEADY}
    plain = adapted(base, **how)
    fit(tmp_path, plain, 4, gradient_clip_val=1.0)
    try:
        for steps, resume in ((2, None), (4, tmp_path / "2.ckpt")):
            sharded: dict[str, Any] = {"strategy": ShardedModelParallel(), "callbacks": [Export(tmp_path)]}
            trainer = fit(tmp_path, adapted(base, **how), steps, resume, gradient_clip_val=1.0, **sharded)
            trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
    finally:
        dist.destroy_process_group()
    state = checkpoint_file.read(tmp_path / "4.ckpt")["state_dict"]
    assert {*state} == {f"backbone.{name}" for name in plain.trainable()}
    for name, weight in plain.trainable().items():
        torch.testing.assert_close(state[f"backbone.{name}"], weight.detach(), rtol=1e-4, atol=1e-5)
    exported = read_model(tmp_path / "adapter.safetensors").backbone.state_dict()
    for name, weight in merged(plain).items():
        torch.testing.assert_close(exported[name], weight, rtol=1e-4, atol=1e-5)
