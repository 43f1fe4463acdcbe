import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.weights.compvis.reader import UNSUPPORTED, ReadOptions
from ldm.weights.contents import open_contents
from ldm.weights.convert import part, write
from ldm.weights.model import read_model
from tests.weights.foreign import ODD, SD1, SD2, full_model, networks, same, without_metadata


def saved(path: Path, configs: dict[str, Any], **more: torch.Tensor) -> Path:
    """Writes a single file as another tool would, with the tensors `more`."""
    write(full_model(configs), path, "single")
    return without_metadata(path, **more)


@pytest.mark.parametrize("configs, generation, prediction, size", [(SD1, "1.x", "eps", 512), (SD2, "2.x", "v", 768)])
def test_architecture_and_settings_are_inferred_from_the_tensors(
    tmp_path: Path, configs: dict[str, Any], generation: str, prediction: str, size: int
) -> None:
    contents = open_contents(saved(tmp_path / "m.safetensors", configs))
    assert f"Stable Diffusion {generation}" in contents.description
    assert contents.pad == {"1.x": 49407, "2.x": 0}[generation]
    assert contents.model["prediction"] == prediction and contents.model["size"] == [size, size]
    for kind, expected in networks(configs).items():
        network = contents.network(kind)
        assert network.full_config == expected.config
        assert same(network.load().state_dict(), expected.state_dict())


@pytest.mark.parametrize("name", ["m.safetensors", "m.ckpt"])
def test_settings_that_tensors_do_not_determine_are_stored_as_metadata(tmp_path: Path, name: str) -> None:
    model = full_model(ODD, prediction="v", pad=5)
    write(model, tmp_path / name, "single")
    contents = open_contents(tmp_path / name)
    assert contents.model == model.model and contents.pad == 5
    assert {kind: n.full_config for kind, n in contents.networks.items()} == {
        kind: n.full_config for kind, n in model.networks.items()
    }


def averages(unet: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"model_ema.diffusion_model{name.replace('.', '')}": tensor + 1 for name, tensor in unet.items()}


def test_the_moving_average_is_read_unless_raw_weights_are_requested(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.safetensors", SD1)
    prefix = "model.diffusion_model."
    unet = {name.removeprefix(prefix): t for name, t in load_file(path).items() if name.startswith(prefix)}
    without_metadata(path, **averages(unet), **{"model_ema.decay": torch.tensor(0.9999)})
    raw, average = (open_contents(path, ReadOptions(ema=ema)) for ema in (False, True))
    before, after = (contents.network("unet").load().state_dict() for contents in (raw, average))
    assert all(torch.equal(before[name] + 1, after[name]) for name in before)
    assert "moving average" in average.notes[0] and "not their moving average" in raw.notes[0]


def test_an_incomplete_moving_average_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.safetensors", SD1)
    without_metadata(path, **{"model_ema.diffusion_modelout2bias": torch.ones(4)})
    with pytest.raises(ValueError, match=r"expected moving average \(\d+ missing: model_ema\.diffusion_model"):
        open_contents(path)


def test_tensors_that_only_training_used_are_ignored(tmp_path: Path) -> None:
    extra = {
        "betas": torch.ones(9),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(7)[None],
        "first_stage_model.loss.logvar": torch.ones(1),
    }
    contents = open_contents(saved(tmp_path / "m.safetensors", SD1, **extra))
    for network in contents.networks.values():
        network.check()


def test_a_tensor_of_no_known_network_is_refused_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.safetensors", SD1, **{"mystery.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"1 unexpected: mystery\.weight"):
        open_contents(path)


def test_missing_unexpected_and_misshapen_tensors_are_listed_together(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.safetensors", SD1)
    state = load_file(path)
    prefix = "model.diffusion_model."
    del state[f"{prefix}out.0.bias"], state[f"{prefix}middle_block.0.in_layers.0.weight"]
    state |= {f"{prefix}more": torch.ones(1), f"{prefix}time_embed.0.bias": torch.ones(3)}
    save_file(state, path)
    with pytest.raises(ValueError) as caught:
        open_contents(path).network("unet").load()
    for message in (
        "2 missing: middle_block.0.in_layers.0.weight, out.0.bias",
        "1 unexpected: more",
        "1 of the wrong shape: time_embed.0.bias [3] instead of [128]",
    ):
        assert message in str(caught.value)


def test_nan_is_refused_by_name_when_weights_are_loaded(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.safetensors", SD1)
    name = "model.diffusion_model.out.0.bias"
    without_metadata(path, **{name: load_file(path)[name] * torch.nan})
    with pytest.raises(ValueError, match=r"m\.safetensors: 32 of the 32 values of norm_out\.bias are NaN"):
        open_contents(path).network("unet").load()


def test_a_unet_with_nine_input_channels_is_an_inpainting_model(tmp_path: Path) -> None:
    inpainting = SD1 | {"unet": SD1["unet"] | {"in_channels": 9}}
    assert open_contents(saved(tmp_path / "m.safetensors", inpainting)).description.endswith("1.x, inpainting")


@pytest.mark.parametrize(
    "name, metadata, prediction, why",
    [
        ("v2-1_512-ema-pruned", {}, "eps", "512 pixels"),
        ("512-base-ema", {}, "eps", "512 pixels"),
        ("v2-1_768-ema-pruned", {}, "v", "tensors do not show it"),
        ("model", {"modelspec.prediction_type": "epsilon"}, "eps", "metadata"),
        ("model", {"modelspec.predict_key": "v"}, "v", "metadata"),
    ],
)
def test_the_prediction_of_sd2_follows_from_metadata_or_name_and_is_noted(
    tmp_path: Path, name: str, metadata: dict[str, str], prediction: str, why: str
) -> None:
    path = saved(tmp_path / f"{name}.safetensors", SD2)
    save_file(load_file(path), path, metadata)
    contents = open_contents(path)
    assert contents.model["prediction"] == prediction and why in contents.notes[-1]
    assert open_contents(path, ReadOptions(prediction="eps")).model["prediction"] == "eps"


@pytest.mark.parametrize("name", ["v2-1_512-ema-pruned", "v2-1_768-ema-pruned"])
def test_loading_a_file_whose_name_suggests_the_prediction_causes_a_warning(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path / f"{name}.safetensors", SD2)
    with pytest.warns(UserWarning, match="prediction=.*tensors do not show it: convert with --prediction"):
        read_model(without_metadata(path))


@pytest.mark.parametrize("configs", [SD1, SD2])
def test_a_prediction_in_the_metadata_causes_no_warning(tmp_path: Path, configs: dict[str, Any]) -> None:
    path = saved(tmp_path / "m.safetensors", configs)
    save_file(load_file(path), path, {"modelspec.prediction_type": "v"})
    assert open_contents(path).guesses == ()


@pytest.mark.parametrize("metadata", [{"modelspec.prediction_type": "sample"}, {"modelspec.resolution": "big"}])
def test_metadata_that_ldm_does_not_understand_is_refused(tmp_path: Path, metadata: dict[str, str]) -> None:
    path = saved(tmp_path / "m.safetensors", SD1)
    save_file(load_file(path), path, metadata)
    with pytest.raises(ValueError, match=next(iter(metadata.values()))):
        open_contents(path)


@pytest.mark.parametrize(
    ("configs", "metadata", "size"),
    [
        (SD1, {"modelspec.prediction_type": "v"}, [512, 512]),  # a v-prediction fine-tune of Stable Diffusion 1.x
        (SD2, {"modelspec.prediction_type": "v"}, [768, 768]),
        (SD2, {"modelspec.prediction_type": "v", "modelspec.resolution": "512x640"}, [640, 512]),
        (SD1, {"modelspec.resolution": "768"}, [768, 768]),
    ],
)
def test_the_size_comes_from_the_metadata_or_else_the_model_generation(
    tmp_path: Path, configs: dict[str, Any], metadata: dict[str, str], size: list[int]
) -> None:
    path = saved(tmp_path / "m.safetensors", configs)
    save_file(load_file(path), path, metadata)
    assert open_contents(path).model["size"] == size


def test_the_last_layer_of_the_sd2_text_tower_is_stored_although_unused(tmp_path: Path) -> None:
    contents = open_contents(saved(tmp_path / "m.safetensors", SD2))
    assert contents.network("text_tower").config["skip"] == 1
    assert len(contents.network("text_tower").load().blocks) == 2  # type: ignore[arg-type]


TYPICAL = {
    "a LoRA": "lora_unet_down_blocks_0.lora_up.weight",
    "a ControlNet": "control_model.input_blocks.0.0.weight",
    "a textual inversion": "emb_params",
    "Stable Diffusion XL": "conditioner.embedders.1.model.ln_final.bias",
    "Flux": "double_blocks.0.img_attn.norm.key_norm.scale",
    "Stable Diffusion 3": "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.bias",
}
ALTERNATIVE = {
    "a LoRA": "unet.down_blocks.0.attentions.0.to_q.lora_A.weight",
    "Stable Diffusion XL": "add_embedding.linear_1.weight",
    "Flux": "single_transformer_blocks.0.attn.norm_k.weight",
    "Stable Diffusion 3": "transformer_blocks.0.attn.add_q_proj.weight",
}


@pytest.mark.parametrize("model, name", [*TYPICAL.items(), *ALTERNATIVE.items()])
def test_unsupported_models_are_refused_by_their_name(tmp_path: Path, model: str, name: str) -> None:
    shared = "transformer_blocks.0.attn.add_q_proj.bias" if model == "Flux" else "model.diffusion_model.out.bias"
    save_file({name: torch.ones(1), shared: torch.ones(1)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=rf"m\.safetensors is {model}, which ldm does not read"):
        open_contents(tmp_path / "m.safetensors")


def test_every_unsupported_model_has_a_test_case() -> None:
    assert TYPICAL.keys() == UNSUPPORTED.keys()


def test_a_file_without_a_known_network_is_refused_with_its_tensor_names(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"holds no network that ldm knows \(its tensors are w\)"):
        open_contents(tmp_path / "m.safetensors")


@pytest.mark.parametrize("kind", ["unet", "vae", "text_tower"])
@pytest.mark.parametrize("configs", [SD1, SD2])
def test_a_standalone_network_is_recognised(tmp_path: Path, kind: str, configs: dict[str, Any]) -> None:
    write(part(full_model(configs), kind), tmp_path / "p.safetensors", "single")
    contents = open_contents(without_metadata(tmp_path / "p.safetensors"))
    assert list(contents.networks) == [kind] and contents.model == {}
    assert contents.network(kind).full_config == networks(configs)[kind].config
    assert same(contents.network(kind).load().state_dict(), networks(configs)[kind].state_dict())


@pytest.mark.parametrize("text", [{"projection": 8}, {}])
def test_both_towers_of_a_clip_are_read(tmp_path: Path, text: dict[str, Any]) -> None:
    configs: dict[str, Any] = {
        "text_tower": {"width": 64, "layers": 1, "heads": 1, "vocab_size": 20, "context": 5, **text},
        "image_tower": {"size": 8, "patch": 4, "width": 64, "layers": 2, "heads": 1, "projection": 8},
    }
    write(replace(full_model(configs), model={}), tmp_path / "clip.safetensors", "single")
    without_metadata(tmp_path / "clip.safetensors", logit_scale=torch.tensor(1.0))
    contents = open_contents(tmp_path / "clip.safetensors")
    for kind, network in networks(configs).items():
        assert contents.network(kind).full_config == network.config
        assert same(contents.network(kind).load().state_dict(), network.state_dict())


def test_a_missing_network_is_named(tmp_path: Path) -> None:
    write(part(full_model(SD1), "vae"), tmp_path / "p.safetensors", "single")
    with pytest.raises(ValueError, match=r"p\.safetensors is a standalone vae and holds no unet"):
        open_contents(tmp_path / "p.safetensors").network("unet")


def test_an_unknown_number_of_attention_heads_is_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not say how many attention heads .* context width of 12"):
        open_contents(saved(tmp_path / "m.safetensors", ODD))


def test_an_autoencoder_without_quant_convolution_is_refused(tmp_path: Path) -> None:
    write(part(full_model(SD1), "vae"), tmp_path / "p.safetensors", "single")
    state = {name: t for name, t in load_file(tmp_path / "p.safetensors").items() if "quant_conv" not in name}
    save_file(state, tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match="without a quant convolution, as in SD 3 or Flux"):
        open_contents(tmp_path / "p.safetensors")


def test_a_file_without_a_tensor_that_inference_needs_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.safetensors", SD1)
    state = load_file(path)
    del state["model.diffusion_model.out.2.weight"]
    save_file(state, path)
    with pytest.raises(ValueError, match=r"lacks the tensor 'out\.2\.weight' of a unet"):
        open_contents(path)


def test_the_prediction_is_written_as_metadata_for_other_tools(tmp_path: Path) -> None:
    from safetensors import safe_open

    write(full_model(ODD, prediction="v"), tmp_path / "m.safetensors", "single")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata()["modelspec.prediction_type"] == "v"
        assert json.loads(file.metadata()["ldm"])["kind"] == "stable_diffusion"


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae.", "module.model."])
def test_a_prefix_before_the_names_of_a_part_is_removed(tmp_path: Path, prefix: str) -> None:
    write(part(full_model(SD1), "vae"), tmp_path / "vae.safetensors", "single")
    state = load_file(tmp_path / "vae.safetensors")
    save_file({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "vae.safetensors")
    contents = open_contents(tmp_path / "vae.safetensors")
    assert same(contents.network("vae").load().state_dict(), networks(SD1)["vae"].state_dict())


def test_a_file_with_two_networks_of_a_kind_is_refused_with_their_prefixes(tmp_path: Path) -> None:
    write(part(full_model(SD1), "vae"), tmp_path / "vae.safetensors", "single")
    state = load_file(tmp_path / "vae.safetensors")
    save_file(
        {f"{prefix}.{name}": tensor.clone() for name, tensor in state.items() for prefix in "ab"},
        tmp_path / "two.safetensors",
    )
    with pytest.raises(ValueError, match=r"several networks of one kind, under a\., b\."):
        open_contents(tmp_path / "two.safetensors")
