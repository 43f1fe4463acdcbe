"""Compares adapters with diffusers and peft: gradients, and latents from the same files to 60 dB."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.adapters.low_rank import LowRank
from ldm.pipeline.pipeline import Pipeline
from ldm.weights.adapters.reader import open_adapter
from ldm.weights.adapters.textual_inversion import Embedding, write_embedding
from ldm.weights.adapters.writer import write_adapter
from ldm.weights.contents import StoredNetwork
from ldm.weights.convert import write
from ldm.weights.storage.values import in_memory
from tests.parity.test_pipeline import EPS, WORDS, assert_60_db, latents
from tests.weights.adapters.made import changes
from tests.weights.foreign import full_model, networks

SETTINGS: dict[str, Any] = {"sampler": "ddim", "spacing": "leading", "steps": 5}
PROMPT, NEGATIVE = "a red circle", "blue"  # the prompts that `latents` uses
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "alpha": {"lora_alpha": 3},
    "rsLoRA": {"lora_alpha": 3, "use_rslora": True},
    "DoRA": {"lora_alpha": 3, "use_dora": True},
}
OURS = {"LoRA": {}, "alpha": {"alpha": 3}, "rsLoRA": {"alpha": 3, "stabilised": True}}
OURS["DoRA"] = {"alpha": 3, "decomposed": True}
LAYERS: dict[str, Any] = {
    "linear": (lambda: nn.Linear(6, 10), (3, 5, 6)),
    "no bias": (lambda: nn.Linear(6, 10, bias=False), (3, 5, 6)),
    "3x3": (lambda: nn.Conv2d(6, 10, 3, padding=1, stride=2), (3, 6, 7, 8)),
    "1x1": (lambda: nn.Conv2d(6, 10, 1), (3, 6, 7, 8)),
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Asserts that the difference is at most `tolerance` times the largest absolute value."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_outputs_and_gradients_of_a_layer_match_peft(layer: str, kind: str) -> None:
    make, shape = LAYERS[layer]
    base = make()
    theirs = nn.Sequential(make())
    theirs[0].load_state_dict(base.state_dict())
    settings = {"r": 4, "lora_alpha": 4, "target_modules": ["0"]} | KINDS[kind]
    peft.inject_adapter_in_model(peft.LoraConfig(**settings), theirs)
    ours = LowRank(base, 4, **OURS[kind])
    nn.init.normal_(ours.up)
    own = {"lora_A": ours.down, "lora_B": ours.up}
    if ours.magnitude is not None:
        ours.magnitude.data *= 0.5 + torch.rand_like(ours.magnitude)
        own["lora_magnitude_vector"] = ours.magnitude
    named = dict(theirs.named_parameters())
    pairs = {part: next(p for name, p in named.items() if part in name) for part in own}
    for part, parameter in pairs.items():
        parameter.data = own[part].detach().reshape(parameter.shape).clone()
        parameter.requires_grad_(True)
    x, weights = torch.randn(shape), None
    one, two = ours(x), theirs(x)
    close(one, two)
    weights = torch.randn_like(one)
    (one * weights).sum().backward()
    (two * weights).sum().backward()
    for part, parameter in pairs.items():
        assert own[part].grad is not None and parameter.grad is not None
        close(own[part].grad.reshape(parameter.shape), parameter.grad)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, contents = tmp_path_factory.mktemp("models") / "model", full_model(WORDS)
    write(
        replace(contents, networks={kind: louder(network) for kind, network in contents.networks.items()}),
        path,
        "diffusers",
    )
    return path


def louder(network: StoredNetwork) -> StoredNetwork:
    """Scales the weights, except the autoencoder's, so that prompts and adapters have a measurable effect."""
    if network.kind == "vae":
        return network
    state = {name: 4 * tensor for name, tensor in network.tensors.read(network.tensors).items()}
    return replace(network, tensors=in_memory(network.tensors.source, state))


@pytest.fixture
def pipe(model: Path) -> Iterator[Any]:
    pipe = StableDiffusionPipeline.from_pretrained(model, local_files_only=True)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, set_alpha_to_one=True, clip_sample=False, timestep_spacing="leading"
    )
    yield pipe


def sampled(model: Path, *adapters: Any, **how: Any) -> Tensor:
    return latents(Pipeline.load(str(model), "cpu", adapters=adapters, **how), **SETTINGS)


def expected(pipe: Any, prompt: str = PROMPT) -> Tensor:
    """Returns the latents that diffusers samples with its own text encoder."""
    tokens = pipe.tokenizer([prompt, NEGATIVE], padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        text = pipe.text_encoder(tokens)[0]
    pipe.scheduler.set_timesteps(5)
    sigma = (1 - pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps[0]]) ** 0.5
    images: Tensor = pipe(
        latents=sigma * EPS,
        prompt_embeds=text[:1],
        negative_prompt_embeds=text[1:],
        guidance_scale=3.0,
        num_inference_steps=5,
        output_type="latent",
    ).images
    return images


def made(targets: str = "all", **how: Any) -> dict[str, Any]:
    """Returns changes of the UNet and of the text encoder."""
    own = networks(WORDS)
    kinds = {"unet": "unet", "text_encoder": "text_tower"}
    return {network: changes(own[kind], targets, size=0.3, **how) for network, kind in kinds.items()}


@pytest.fixture(scope="module")
def plain(model: Path) -> Tensor:
    """The latents without an adapter."""
    return sampled(model)


def agree(theirs: Tensor, ours: Tensor, plain: Tensor) -> None:
    """Asserts that the latents agree to 60 dB, and that the adapters change them by more than five times that error."""
    assert_60_db(ours, theirs)
    assert (theirs - plain).square().mean().sqrt() > 5e-3 * (plain.max() - plain.min())


def test_latents_without_an_adapter_match_diffusers(plain: Tensor, pipe: Any) -> None:
    assert_60_db(plain, expected(pipe))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "how"),
    [("diffusers", {}), ("diffusers", {"magnitude": 0}), ("kohya", {"alpha": 1.5})],
    ids=["diffusers", "diffusers DoRA", "kohya"],
)
def test_diffusers_reads_written_adapters_with_the_same_result(
    layout: str, how: dict[str, Any], model: Path, plain: Tensor, pipe: Any, tmp_path: Path
) -> None:
    """Covers every layer, including convolutions and the text encoder, with two ranks and four alphas.

    In kohya's layout diffusers ignores DoRA and may mix up alphas between layers, so that case has a single alpha.
    """
    path = tmp_path / "pytorch_lora_weights.safetensors"
    write_adapter(path, made(**how), layout, {})
    pipe.load_lora_weights(tmp_path, weight_name=path.name)
    agree(expected(pipe), sampled(model, path), plain)


def respelt(state: dict[str, Tensor], spelling: str) -> dict[str, Tensor]:
    """Renames tensors with peft's names to an older spelling of diffusers."""
    parts = {"lora_A": "down", "lora_B": "up"}
    found = {}
    for name, tensor in state.items():
        layer, _, part = name.removesuffix(".weight").rpartition(".")
        if spelling == "processors" and layer.startswith("unet"):
            attention, _, projection = layer.removesuffix(".0").rpartition(".")
            found[f"{attention}.processor.{projection}_lora.{parts[part]}.weight"] = tensor
        elif spelling == "processors":
            attention, _, projection = layer.removesuffix("_proj").rpartition(".")
            found[f"{attention}.to_{projection}_lora.{parts[part]}.weight"] = tensor
        elif spelling == "linear layers" and layer.startswith("text"):
            found[f"{layer}.lora_linear_layer.{parts[part]}.weight"] = tensor
        else:
            found[f"{layer}.lora.{parts[part]}.weight"] = tensor
    return found


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["dots", "processors", "linear layers"])
def test_adapters_in_older_spellings_of_diffusers_match_diffusers(
    spelling: str, model: Path, plain: Tensor, pipe: Any, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    write_adapter(path, made("attention"), "diffusers", {})
    state = respelt(load_file(path), spelling)
    if spelling == "dots":  # diffusers reads no text encoder in this spelling
        state = {name: tensor for name, tensor in state.items() if name.startswith("unet")}
    save_file(state, path)
    pipe.load_lora_weights(tmp_path, weight_name=path.name)
    agree(expected(pipe), sampled(model, path), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_saved_with_peft_settings_match_diffusers(
    kind: str, model: Path, plain: Tensor, pipe: Any, tmp_path: Path
) -> None:
    settings = {"r": 3, "lora_alpha": 3} | KINDS[kind]
    layers = ["to_q", "to_k", "to_out.0", "ff.net.2", "conv1", "conv2", "proj_in"]
    patterns = {} if kind == "LoRA" else {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"attn1.to_k": 5}}
    unet = peft.LoraConfig(target_modules=layers, **settings, **patterns)
    text = peft.LoraConfig(target_modules=["q_proj", "fc1"], **settings)
    for network, config in ((pipe.unet, unet), (pipe.text_encoder, text)):
        peft.inject_adapter_in_model(config, network)
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=3)
            if "magnitude" in name:
                parameter.data *= 0.5 + torch.rand_like(parameter)
    pipe.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder),
        unet_lora_adapter_metadata=unet.to_dict(),
        text_encoder_lora_adapter_metadata=text.to_dict(),
    )
    theirs = expected(pipe)
    agree(theirs, sampled(model, tmp_path), plain)
    write_adapter(tmp_path / "kohya.safetensors", open_adapter(tmp_path).by_public_name(), "kohya", {})
    agree(theirs, sampled(model, tmp_path / "kohya.safetensors"), plain)


def test_several_weighted_adapters_match_diffusers(model: Path, plain: Tensor, pipe: Any, tmp_path: Path) -> None:
    weighted = []
    for name, targets, weight in (("a", "all", 0.7), ("b", "attention", -0.4)):
        write_adapter(tmp_path / f"{name}.safetensors", {"unet": made(targets)["unet"]}, "diffusers", {})
        pipe.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors", adapter_name=name)
        weighted.append((tmp_path / f"{name}.safetensors", weight))
    pipe.set_adapters(["a", "b"], [0.7, -0.4])
    agree(expected(pipe), sampled(model, *weighted), plain)


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_text_states_with_a_textual_inversion_match_diffusers(
    layout: str, model: Path, pipe: Any, tmp_path: Path
) -> None:
    token, vectors = "zorp", torch.randn(2, 12)
    path = tmp_path / "zorp.safetensors"
    write_embedding(path, Embedding(token, {"text_encoder": vectors}, path, "", {}), layout, {})
    own = Pipeline.load(str(model), "cpu", embeddings=[path])
    pipe.load_textual_inversion(path, **({} if layout == "diffusers" else {"token": token}))
    prompt = pipe.maybe_convert_prompt(f"a {token}, red", pipe.tokenizer)
    tokens = pipe.tokenizer([prompt], padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        text = own.text_encoder.encode([f"a {token}, red"]).get("text")
        close(text, pipe.text_encoder(tokens)[0])
        plain = Pipeline.load(str(model), "cpu").text_encoder.encode([f"a {token}, red"]).get("text")
    assert (text - plain).abs().max() > 1e-2
