"""Tests pipelines with merged adapters and textual inversions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ldm.adapters.targets import layers
from ldm.pipeline.pipeline import Pipeline
from ldm.weights.adapters.names import own_names
from ldm.weights.adapters.writer import write_adapter
from tests.tiny import save_tiny_model, tiny_text_tower, tiny_unet
from tests.weights.adapters.made import changes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with a model and with adapters of its UNet and text encoder."""
    path = tmp_path_factory.mktemp("model")
    save_tiny_model(path)
    write_adapter(path / "unet_lora.safetensors", {"unet": changes(tiny_unet(), "attention")}, "kohya", {})
    both = {"unet": changes(tiny_unet(), "all", magnitude=0), "text_encoder": changes(tiny_text_tower(), "attention")}
    write_adapter(path / "both.safetensors", both, "kohya", {})
    return path


def load(folder: Path, *adapters: tuple[str, float], dtype: torch.dtype = torch.float32) -> Pipeline:
    files = [(folder / f"{name}.safetensors", weight) for name, weight in adapters]
    return Pipeline.load(str(folder / "unet.safetensors"), "cpu", dtype, adapters=files)


def test_layers_are_plain_and_contain_the_weighted_sum_of_all_adapters(folder: Path) -> None:
    network = load(folder, ("unet_lora", 0.5), ("both", -1.0)).backbone
    plain = tiny_unet()
    assert [*map(type, network.modules())] == [*map(type, plain.modules())]
    names = own_names("unet", plain.config, layers(plain))
    expected = {name: layer.weight.detach().clone() for name, layer in layers(plain).items()}
    for weight, magnitude, targets in ((0.5, None, "attention"), (-1.0, 0, "all")):
        for public, change in changes(tiny_unet(), targets, magnitude=magnitude).items():
            original = layers(plain)[names[public]].weight.detach()
            expected[names[public]] += weight * (change.changed(original) - original)
    for name, layer in layers(network).items():
        torch.testing.assert_close(layer.weight.detach(), expected[name], rtol=1e-5, atol=1e-5)


def test_adapters_are_merged_into_the_text_encoder(folder: Path) -> None:
    plain, changed = (load(folder, *how).text_encoder for how in ((), [("both", 1.0)]))
    with torch.no_grad():
        one, two = (encoder.encode(["a red circle"]).get("text") for encoder in (plain, changed))
    assert (one - two).abs().max() > 1e-2
    assert not any(weight.requires_grad for weight in changed.parameters())


def test_an_adapter_with_weight_zero_does_not_change_the_image(folder: Path) -> None:
    images = [load(folder, *how)("a red circle").images for how in ((), [("both", 0.0)], [("both", 1.0)])]
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a.pt", "adapters is 'a.pt', but must be a list"),
        ({"a.pt": 0.5}, "adapters is {'a.pt': 0.5}, but must be a list"),
        (
            [("a.pt", float("nan"))],
            "an adapter is given as .'a.pt', nan., but must be a file, or a file and a finite weight",
        ),
        (
            [("a.pt", "0.5")],
            "an adapter is given as .'a.pt', '0.5'., but must be a file, or a file and a finite weight",
        ),
        (("a.pt", 0.5), "an adapter is given as 0.5, but must be a file, or a file and a finite weight"),
    ],
)
def test_adapters_that_are_no_list_of_files_or_pairs_are_refused(given: Any, message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Pipeline.load(str(folder / "unet.safetensors"), adapters=given)


def test_a_pair_may_be_a_list(folder: Path) -> None:
    file, model = folder / "both.safetensors", str(folder / "unet.safetensors")
    one, two = (Pipeline.load(model, adapters=[pair]) for pair in ((file, 0.5), [file, 0.5]))  # type: ignore[list-item]
    assert torch.equal(one("a red circle").images, two("a red circle").images)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merged_weights_are_rounded_once(folder: Path, dtype: torch.dtype) -> None:
    exact, rounded = (
        load(folder, ("unet_lora", 0.7), dtype=one).backbone.state_dict() for one in (torch.float32, dtype)
    )
    assert all(torch.equal(rounded[name], weight.to(dtype)) for name, weight in exact.items())


def test_adapters_given_without_a_weight_have_weight_1(folder: Path) -> None:
    file = folder / "unet_lora.safetensors"
    one = Pipeline.load(str(folder / "unet.safetensors"), "cpu", adapters=[str(file)])
    two = load(folder, ("unet_lora", 1.0))
    assert all(torch.equal(a, b) for a, b in zip(one.backbone.parameters(), two.backbone.parameters(), strict=True))


def test_the_token_of_a_textual_inversion_can_be_used_in_prompts(folder: Path, tmp_path: Path) -> None:
    table = tiny_text_tower().token_embedding.weight.detach()
    plain = load(folder)
    tokens = plain.text_encoder.tokenizers[0](["red circle"])[:, 1:3]
    save_file({"emb_params": table[plain.text_encoder.towers[0].rows(tokens)[0]]}, tmp_path / "zorp.safetensors")
    model = str(folder / "unet.safetensors")
    taught = Pipeline.load(model, "cpu", embeddings=[tmp_path / "zorp.safetensors"])
    assert torch.equal(taught("a zorp").images, plain("a red circle").images)
    named = Pipeline.load(model, "cpu", embeddings=[(tmp_path / "zorp.safetensors", "<x>")])
    assert torch.equal(named("a <x>").images, plain("a red circle").images)
