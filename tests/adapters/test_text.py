"""Tests training of text encoders: trained weights, exported files and refused settings."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm.adapters.lora import LoRA
from ldm.adapters.text import TextualInversion, train_all
from ldm.callbacks.averages.ema import EMA
from ldm.callbacks.checkpointing import checkpoint_file
from ldm.callbacks.checkpointing.checkpoint import Checkpoint
from ldm.callbacks.export import Export
from ldm.nn.clip import TextTower
from ldm.nn.text_encoder import TextEncoder
from ldm.nn.tokenizer import Tokenizer
from ldm.pipeline.pipeline import Pipeline
from ldm.training.diffusion import DiffusionTraining
from ldm.training.muon import Muon
from ldm.training.start import start_from
from ldm.weights.adapters.reader import open_adapter
from ldm.weights.adapters.textual_inversion import read_embedding
from ldm.weights.model import model_fingerprint, read_model
from ldm.weights.parts import first_stage, text_encoder
from tests.tiny import save_tiny_model, tiny_text_encoder, tiny_unet
from tests.training.tiny import CAPTIONS, Images, batch, diffusion, fit


class Captioned(Images):
    """Images whose captions contain the new token."""

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        return {**super().__getitem__(key), "caption": "a <new> circle"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_tiny_model(folder)
    return folder


def training(base: Path, adapter: Any = None, lr: float | None = 1e-2, **how: Any) -> DiffusionTraining:
    backbone = tiny_unet(seed=9).train()
    start = start_from(backbone, str(base / "unet.safetensors"))
    text = text_encoder(str(base / "text_tower.safetensors"))
    if adapter is not None:
        adapter.adapt(backbone)
    if lr is not None or isinstance(adapter, TextualInversion):
        (train_all if adapter is None else adapter.adapt_text)(text.network)
    stage = first_stage(str(base / "vae.safetensors"))
    parts: dict[str, Any] = {"first_stage": stage, "text_encoder": text, "base": start, "adapter": adapter}
    return diffusion(backbone=backbone, text_encoder_lr=lr, **parts, **how)


def inversion(vectors: int = 2) -> TextualInversion:
    return TextualInversion("<new>", "red circle", vectors)


def states(module: DiffusionTraining) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return {k: v.clone() for k, v in module.backbone.state_dict().items()}, {
        k: v.clone() for k, v in module.text_encoder.state_dict().items()
    }


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


@pytest.fixture
def captions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.training.tiny.Images", Captioned)


def test_all_weights_of_the_text_encoder_train_with_the_network(base: Path, tmp_path: Path) -> None:
    module = training(base)
    before = states(module)
    fit(tmp_path, module, 2)
    after = states(module)
    assert changed(before[0], after[0]) == {name for name, _ in module.backbone.named_parameters()}
    assert changed(before[1], after[1]) == {name for name, _ in module.text_encoder.named_parameters()}


def test_a_frozen_text_encoder_does_not_change(base: Path, tmp_path: Path) -> None:
    module = training(base, lr=None)
    before = states(module)[1]
    fit(tmp_path, module, 2)
    assert not changed(before, states(module)[1]) and not module.trainable_text()


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, Muon])
def test_the_text_encoder_has_its_own_learning_rate(optimizer: Any, base: Path, tmp_path: Path) -> None:
    def make(weights: Any) -> torch.optim.Optimizer:
        return optimizer(weights, lr=1e-2)  # type: ignore[no-any-return]

    module = training(base, lr=1e-3, optimizer=make)
    trainer = fit(tmp_path, module, 1)
    rates = {weight: group["lr"] for group in trainer.optimizers[0].param_groups for weight in group["params"]}
    names = module.trainable()
    assert {rates[weight] for name, weight in names.items() if name.startswith("trained_text.")} == {1e-3}
    assert {rates[weight] for name, weight in names.items() if not name.startswith("trained_text.")} == {1e-2}


def test_unused_layers_of_the_text_encoder_are_not_trained() -> None:
    tower = TextTower(width=16, layers=3, heads=2, context=16, skip=1)
    encoder = TextEncoder([tower], [Tokenizer(context=16)])
    train_all(encoder)
    assert not any(weight.requires_grad for weight in tower.blocks[2].parameters())
    LoRA(rank=1).adapt_text(encoder)
    adapted = {name for name, weight in tower.named_parameters() if weight.requires_grad}
    assert {name.split(".")[1] for name in adapted} == {"0", "1"}


def test_the_exported_folder_contains_the_trained_model(base: Path, tmp_path: Path) -> None:
    module = training(base)
    fit(tmp_path, module, 2, callbacks=[Export(tmp_path)])
    model = read_model(tmp_path / "unet.safetensors")
    (tower,) = model.text_encoder.network.towers
    assert not changed(dict(module.text_encoder.towers[0].state_dict()), tower.state_dict())
    assert Pipeline.load(str(tmp_path / "unet.safetensors"), "cpu")("a red circle").images.shape[0] == 1


def test_a_lora_of_both_networks_is_exported_to_one_file_and_loaded(base: Path, tmp_path: Path) -> None:
    module = training(base, LoRA(rank=2))
    fit(tmp_path, module, 3, callbacks=[Export(tmp_path)])
    file = tmp_path / "adapter.safetensors"
    names = {name.partition(".")[0] for name in load_file(file)}
    assert {name for name in names if name.startswith("lora_te_")} == {
        f"lora_te_text_model_encoder_layers_0_self_attn_{part}_proj" for part in ("q", "k", "v", "out")
    }
    assert open_adapter(file).metadata["ss_text_encoder_lr"] == "0.01"
    prompts = ["a red circle", "blue"]
    expected = module.text_encoder.encode(prompts).get("text")
    for pipeline in (
        Pipeline.load(str(file), "cpu"),
        Pipeline.load(str(base / "unet.safetensors"), "cpu", adapters=[str(file)]),
    ):
        torch.testing.assert_close(pipeline.text_encoder.encode(prompts).get("text"), expected, rtol=1e-4, atol=1e-5)
    plain = tiny_text_encoder().encode(prompts).get("text")
    assert (plain - expected).abs().max() > 1e-3


def test_the_fingerprint_of_an_adapter_includes_its_text_encoder(base: Path, tmp_path: Path) -> None:
    prints = []
    for k, lr in enumerate((1e-2, 2e-2)):
        folder = tmp_path / str(k)
        module = training(base, LoRA(rank=2), lr)
        fit(folder, module, 1, callbacks=[Export(folder)])
        prints.append(model_fingerprint(folder / "adapter.safetensors"))
    assert prints[0] != prints[1]


def test_only_the_vectors_of_the_new_token_are_trained(base: Path, tmp_path: Path, captions: None) -> None:
    module = training(base, inversion(), lr=None)
    before = states(module)
    fit(tmp_path, module, 2, callbacks=[Checkpoint(tmp_path), Export(tmp_path)], enable_checkpointing=True)
    after = states(module)
    assert not changed(before[0], after[0])
    assert changed(before[1], after[1]) == {"towers.0.token_embedding.vectors"}
    saved = checkpoint_file.read(tmp_path / "last.ckpt")["state_dict"]
    assert {*saved} == {"trained_text.towers.0.token_embedding.vectors"}
    embedding = read_embedding(tmp_path)
    assert embedding.token == "<new>"
    assert torch.equal(embedding.vectors["text_encoder"], after[1]["towers.0.token_embedding.vectors"])


def test_a_loaded_embedding_reproduces_the_text_states_of_training(base: Path, tmp_path: Path, captions: None) -> None:
    module = training(base, inversion(), lr=None)
    fit(tmp_path, module, 2, callbacks=[Export(tmp_path)])
    pipeline = Pipeline.load(str(base / "unet.safetensors"), "cpu", embeddings=[str(tmp_path)])
    prompts = ["a <new> circle", "a red circle", "something unknown"]
    ours, theirs = (encoder.encode(prompts).get("text") for encoder in (module.text_encoder, pipeline.text_encoder))
    assert torch.equal(ours, theirs)


def test_new_vectors_start_from_initial_words_without_changing_other_captions() -> None:
    plain, encoder = tiny_text_encoder(), tiny_text_encoder()
    inversion(3).adapt_text(encoder)
    assert torch.equal(encoder.encode(CAPTIONS).get("text"), plain.encode(CAPTIONS).get("text"))
    same = encoder.encode(["a <new>"]).get("text")
    assert torch.equal(same, plain.encode(["a red circle red"]).get("text"))


@pytest.mark.slow
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(base: Path, tmp_path: Path, captions: None) -> None:
    for name, make, lr in (("both", lambda: LoRA(rank=2), 1e-2), ("inversion", inversion, None)):

        def train(folder: Path, steps: int, resume: Path | None = None, make: Any = make, lr: Any = lr) -> Any:
            module, ema = training(base, make(), lr), EMA(decay=0.5)
            fit(folder, module, steps, resume, callbacks=[ema, Checkpoint(folder)], enable_checkpointing=True)
            return {name: weight.detach() for name, weight in module.trainable().items()}, ema.averages

        straight = train(tmp_path / name / "a", 5)
        train(tmp_path / name / "b", 3)
        resumed = train(tmp_path / name / "b", 5, tmp_path / name / "b" / "last.ckpt")
        for ours, theirs in zip(resumed, straight, strict=True):
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_checkpoint_without_the_trained_text_encoder_is_not_loaded_as_a_model(base: Path, tmp_path: Path) -> None:
    module = training(base)
    fit(tmp_path, module, 1, callbacks=[Checkpoint(tmp_path / "checkpoints")], enable_checkpointing=True)
    with pytest.raises(ValueError, match="is a checkpoint of a run that also trains the text encoder"):
        read_model(tmp_path)
    fit(tmp_path, module, 2, callbacks=[Export(tmp_path)])
    assert read_model(tmp_path).source == str(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("red", "circle", 1), "adapter.token='red': .* is a token already"),
        (("<new>", "", 1), "adapter.initial='' is empty"),
        (("<new>", "zebra", 1), "adapter.initial='zebra' has words that the text encoder does not know"),
        (("<new>", "red", 0), "adapter.vectors=0: expected at least 1"),
        (("<new>", "red", 15), "adapter.vectors=15: the text encoder reads at most 14 tokens"),
    ],
)
def test_invalid_settings_of_textual_inversion_are_refused(settings: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextualInversion(*settings).adapt_text(tiny_text_encoder())


def test_captions_without_the_token_are_refused(base: Path) -> None:
    with pytest.raises(ValueError, match=r"does not contain adapter\.token='<new>'"):
        training(base, inversion(), lr=None).check_sample(Images()[0])


def test_precomputed_states_are_refused_if_the_text_encoder_is_trained(base: Path) -> None:
    with pytest.raises(ValueError, match="the data set contains the text encoder's states, but the text encoder is"):
        training(base).check_sample({**Images()[0], "states": torch.zeros(16, 16)})


@pytest.mark.parametrize(("adapter", "lr"), [(None, 0.0), (inversion(), 1e-3)])
def test_a_text_encoder_learning_rate_without_effect_is_refused(adapter: Any, lr: float) -> None:
    with pytest.raises(ValueError, match=r"training\.text_encoder_lr is "):
        diffusion(adapter=adapter, text_encoder_lr=lr, base={"weights": "x", "fingerprint": "y"})


def test_gradients_reach_every_trainable_weight_of_the_text_encoder(base: Path) -> None:
    module = training(base)
    module.losses(batch(0, 1))[1].mean().backward()
    missing = [name for name, weight in module.trainable_text().items() if weight.grad is None]
    assert missing == []
