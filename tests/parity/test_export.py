"""Files that we export, loaded by diffusers and transformers; and the names of the full-size models in theirs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from ldm.conditioning import Conditioning
from ldm.nn.clip import ImageTower, TextTower
from ldm.nn.unet import UNet
from ldm.nn.vae import VAE
from ldm.weights.arrange import to_theirs
from ldm.weights.convert import part, write
from ldm.weights.keymaps import entries
from tests.weights.diffusers.test_networks import SD15, SD21
from tests.weights.foreign import ODD, ODD2, full_model

FIRST = ODD
SECOND = ODD2 | {"unet": ODD2["unet"] | {"depth": (1, 0, 1), "middle_depth": 1}}
TOKENS = torch.tensor([[7, 3, 5, 9, 1]])
ONES = {"a": torch.linspace(-1, 1, 4 * 8 * 8).view(1, 4, 8, 8), "text": torch.linspace(-1, 1, 36).view(1, 3, 12)}


def close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@torch.no_grad()
def agree(contents: Any, unet: nn.Module, vae: nn.Module, text: nn.Module) -> None:
    """The three networks of diffusers compute what ours do."""
    own = {kind: contents.network(kind).load() for kind in ("unet", "vae", "text_tower")}
    x, text_states, time = ONES["a"], ONES["text"], torch.tensor([500.0])
    close(own["unet"](x, time, Conditioning(text=text_states)), unet(x, time, text_states).sample)
    close(own["vae"].decode(x * own["vae"].scale), vae.decode(x).sample)
    close(own["text_tower"](TOKENS), text(TOKENS).last_hidden_state)


@pytest.mark.parametrize("configs", [FIRST, SECOND])
@pytest.mark.parametrize("shard", [None, 50_000])
def test_an_exported_folder_loads_in_diffusers(tmp_path: Path, configs: dict[str, Any], shard: int | None) -> None:
    contents = full_model(configs, prediction="v", pad=0)
    write(contents, tmp_path / "m", "diffusers", shard)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "m", local_files_only=True)
    agree(contents, pipe.unet, pipe.vae, pipe.text_encoder)
    assert pipe.scheduler.config.prediction_type == "v_prediction" and pipe.scheduler.config.steps_offset == 1
    assert pipe.vae.config.scaling_factor == configs["vae"].get("scale", 0.18215)
    assert pipe.tokenizer("a", padding="max_length").input_ids == [49406, 320, 49407] + [0] * 6


@pytest.mark.parametrize("configs", [FIRST, SECOND])
def test_an_exported_single_file_loads_in_diffusers_with_a_local_configuration(
    tmp_path: Path, configs: dict[str, Any]
) -> None:
    contents = full_model(configs)
    write(contents, tmp_path / "config", "diffusers")
    write(contents, tmp_path / "m.safetensors", "single")
    pipe = StableDiffusionPipeline.from_single_file(
        str(tmp_path / "m.safetensors"), config=str(tmp_path / "config"), local_files_only=True
    )
    agree(contents, pipe.unet, pipe.vae, pipe.text_encoder)  # the text encoder's packed attention too


def test_an_exported_image_tower_loads_in_transformers(tmp_path: Path) -> None:
    config = {"size": 8, "patch": 4, "width": 8, "layers": 2, "heads": 2, "projection": 5}
    contents = full_model({"image_tower": config})
    write(part(contents, "image_tower"), tmp_path / "clip", "diffusers")
    theirs = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "clip").eval()
    pictures = torch.linspace(-1, 1, 192).view(1, 3, 8, 8)
    with torch.no_grad():
        close(contents.network("image_tower").load().embed(pictures), theirs(pictures).image_embeds)  # type: ignore[operator]


def shapes(kind: str, layout: str, network: nn.Module) -> dict[str, list[int]]:
    state = network.state_dict()
    theirs = to_theirs(entries(kind, layout, network.config, list(state)), state)  # type: ignore[arg-type]
    return {name: list(tensor.shape) for name, tensor in theirs.items()}


def names_of(network: nn.Module, prefix: str = "") -> dict[str, list[int]]:
    return {prefix + name: list(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize(
    "config, ours", [(SD15, {}), (SD21, {"head_width": 64, "context_width": 1024, "linear_projection": True})]
)
def test_every_tensor_of_the_full_size_unet_has_diffusers_name_and_shape(
    config: dict[str, Any], ours: dict[str, Any]
) -> None:
    with torch.device("meta"):
        assert shapes("unet", "diffusers", UNet(**ours)) == names_of(UNet2DConditionModel.from_config(config))


def test_every_tensor_of_the_full_size_autoencoder_has_diffusers_name_and_shape() -> None:
    config = {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
    }
    with torch.device("meta"):
        assert shapes("vae", "diffusers", VAE()) == names_of(AutoencoderKL.from_config(config))


def test_every_tensor_of_full_size_clip_has_transformers_name_and_shape() -> None:
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    image = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14,
        projection_dim=768,
    )  # fmt: skip
    with torch.device("meta"):
        assert shapes("text_tower", "transformers", TextTower()) == names_of(CLIPTextModel(text), "text_model.")
        tower = shapes("image_tower", "transformers", ImageTower(224, 14, 1024, 24, 16, 768))
        theirs = names_of(CLIPVisionModelWithProjection(image))
    assert tower == {name: shape for name, shape in theirs.items() if not name.endswith("position_ids")}
