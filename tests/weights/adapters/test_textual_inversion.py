"""Tests textual inversions: the file formats of every tool, and the effect of their tokens in prompts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.nn.clip import TextTower
from ldm.nn.text_encoder import TextEncoder
from ldm.nn.tokenizer import Tokenizer
from ldm.weights.adapters.recognise import has_embedding
from ldm.weights.adapters.textual_inversion import (
    Embedding,
    add_embedding,
    read_embedding,
    write_embedding,
)
from tests.tiny import tiny_text_encoder, tiny_text_tower, tiny_unet

ONE, TWO = (torch.randn(n, 16, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
A1111 = {
    "string_to_token": {"*": 265},
    "string_to_param": {"*": TWO},
    "name": "zorp",
    "step": 500,
    "sd_checkpoint": "cc6cb27103",
    "sd_checkpoint_name": "v1-5-pruned",
}
TOOL: dict[str, str] = {"string_to_token": json.dumps({"*": 265}), "string_to_param": json.dumps({"*": "emb_params"})}
# File name, tensors, metadata, and the expected token.
FILES: dict[str, tuple[str, dict[str, Any], dict[str, str] | None, str]] = {
    "A1111": ("other.pt", A1111, None, "zorp"),
    "kohya": ("zorp.safetensors", {"emb_params": TWO}, None, "zorp"),
    "kohya, pickled": ("zorp.pt", {"emb_params": TWO}, None, "zorp"),
    "ai-toolkit": ("other.safetensors", {"emb_params": TWO}, TOOL | {"name": "zorp"}, "zorp"),
    "diffusers": ("learned_embeds.safetensors", {"<zorp>": TWO}, None, "<zorp>"),
    "diffusers, pickled": ("learned_embeds.bin", {"<zorp>": TWO}, None, "<zorp>"),
}


def saved(path: Path, state: dict[str, Any], metadata: dict[str, str] | None = None) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path, metadata)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("tool", FILES)
def test_the_token_and_vectors_of_every_tool_are_read(tool: str, tmp_path: Path) -> None:
    name, state, metadata, token = FILES[tool]
    path = saved(tmp_path / name, state, metadata)
    found = read_embedding(path)
    assert has_embedding(path)
    assert found.token == token and [*found.vectors] == ["text_encoder"]
    assert torch.equal(found.vectors["text_encoder"], TWO)


def test_a_single_vector_of_one_axis_is_read(tmp_path: Path) -> None:
    found = read_embedding(saved(tmp_path / "learned_embeds.bin", {"<zorp>": ONE[0]}))
    assert torch.equal(found.vectors["text_encoder"], ONE)


def test_sdxl_embeddings_are_read_from_one_kohya_file_or_two_diffusers_files(tmp_path: Path) -> None:
    wide = torch.randn(2, 24)
    found = read_embedding(saved(tmp_path / "zorp.safetensors", {"clip_l": TWO, "clip_g": wide}))
    assert found.token == "zorp" and torch.equal(found.vectors["text_encoder_2"], wide)
    (tmp_path / "folder").mkdir()
    for name, tensor in (("learned_embeds", TWO), ("learned_embeds_2", wide)):
        saved(tmp_path / "folder" / f"{name}.safetensors", {"<zorp>": tensor})
    both = read_embedding(tmp_path / "folder")
    assert both.token == "<zorp>" and torch.equal(both.vectors["text_encoder_2"], wide)


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("count", [1, 2])
def test_written_embeddings_are_read_back_bit_identical(layout: str, count: int, tmp_path: Path) -> None:
    vectors = {
        name: torch.randn(2, 8 * k).half() for k, name in enumerate(("text_encoder", "text_encoder_2")[:count], 1)
    }
    path = tmp_path / ("zorp.safetensors" if layout == "kohya" else "learned_embeds.safetensors")
    write_embedding(path, Embedding("zorp", vectors, path, "", {}), layout, {"modelspec.license": "CC0"})
    again = read_embedding(path)
    assert again.token == "zorp" and again.metadata["modelspec.license"] == "CC0"
    assert again.vectors.keys() == vectors.keys()
    assert all(torch.equal(again.vectors[name], vectors[name]) for name in vectors)
    if count == 1:
        assert [*load_file(path)] == ["emb_params" if layout == "kohya" else "zorp"]


def test_tokens_that_a_layout_cannot_store_are_refused(tmp_path: Path) -> None:
    embedding = Embedding("<zorp>", {"text_encoder": ONE}, tmp_path, "", {})
    with pytest.raises(
        ValueError, match=r"the file's name is the token: write to <zorp>\.safetensors, not to a\.safet"
    ):
        write_embedding(tmp_path / "a.safetensors", embedding, "kohya", {})
    with pytest.raises(ValueError, match="the token emb_params is no token in a file of diffusers"):
        write_embedding(tmp_path / "a.safetensors", Embedding("emb_params", {}, tmp_path, "", {}), "diffusers", {})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"<a>": ONE, "<b>": TWO}, "no textual inversion of one token .it holds 2 tensors: <a>, <b>"),
        ({"<a>": torch.ones(1, 2, 3)}, r"holds \[1, 2, 3\] numbers for <a>, but needs vectors"),
        ({"<a>": torch.full((1, 4), torch.inf)}, "4 of the 4 values of <a> are NaN or infinite"),
        ({"emb_params": torch.ones(0, 4)}, r"holds \[0, 4\] numbers for a, but needs vectors"),
    ],
)
def test_invalid_textual_inversions_are_refused(state: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_embedding(saved(tmp_path / "a.safetensors", state))


def test_a_token_table_without_tensors_or_with_another_name_is_refused(tmp_path: Path) -> None:
    torch.save({"string_to_param": {"*": [1.0, 2.0]}, "name": "a"}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="it holds 0 tensors: none"):
        read_embedding(tmp_path / "a.pt")
    table = {"string_to_param": '{"*": "other"}'}
    save_file({"emb_params": torch.ones(1, 4)}, tmp_path / "a.safetensors", table)
    with pytest.raises(ValueError, match="says that its vectors are 'other', but holds emb_params"):
        read_embedding(tmp_path / "a.safetensors")


def test_network_weights_are_not_recognised_as_a_textual_inversion(tmp_path: Path) -> None:
    save_file(tiny_unet().state_dict(), tmp_path / "unet.safetensors")
    assert not has_embedding(tmp_path / "unet.safetensors")


def states(encoder: TextEncoder, caption: str) -> Tensor:
    with torch.no_grad():
        return encoder.encode([caption]).get("text")


def whole_tower() -> TextEncoder:
    """Returns a text encoder that embeds every token of the vocabulary."""
    torch.manual_seed(0)
    return TextEncoder([TextTower(width=16, layers=1, heads=2, context=16)], [Tokenizer(context=16)])


@pytest.mark.parametrize("make", [tiny_text_encoder, whole_tower])
def test_a_token_is_replaced_by_its_sequence_of_vectors(make: Any, tmp_path: Path) -> None:
    """Vectors copied from known words produce the same states as these words."""
    encoder, plain = make(), make()
    ids = encoder.tokenizers[0](["red circle"])[:, 1:3]
    table = encoder.towers[0].token_embedding.weight.detach()
    vectors = table[encoder.towers[0].rows(ids)[0]]
    path = saved(tmp_path / "<zorp>.safetensors", {"emb_params": vectors.contiguous()})
    assert add_embedding(encoder, path) == "<zorp>"
    for given, meant in (("a <zorp> on white", "a red circle on white"), ("<ZORP>, a square", "red circle, a square")):
        assert torch.equal(states(encoder, given), states(plain, meant))
    assert torch.equal(states(encoder, "a red square"), states(plain, "a red square"))
    assert encoder.unknown_tokens("a <zorp>") == [] and encoder.cut("a <zorp>") == ""


def test_several_tokens_can_be_added_and_renamed(tmp_path: Path) -> None:
    encoder = tiny_text_encoder()
    one, two = (
        saved(tmp_path / f"{name}.safetensors", {"emb_params": v}) for name, v in (("zorp", ONE), ("dull", TWO))
    )
    assert [add_embedding(encoder, one), add_embedding(encoder, (two, "glimk"))] == ["zorp", "glimk"]
    tokens = encoder.tokenizers[0](["zorp glimk glimkish"])[0].tolist()
    assert tokens[1:4] == [49408, 49409, 49410] and not {49409, 49410} & {*tokens[4:]}
    table = encoder.towers[0].token_embedding.weight
    assert torch.equal(table[encoder.towers[0].rows(torch.tensor([49408, 49409, 49410]))], torch.cat([ONE, TWO]))
    assert encoder.tokenizers[0].words([49408, 49410, 320]) == ["zorp", "glimk", "a"]


def test_a_long_caption_can_be_cut_within_the_vectors_of_a_token(tmp_path: Path) -> None:
    encoder = tiny_text_encoder()
    add_embedding(encoder, (saved(tmp_path / "a.safetensors", {"emb_params": torch.randn(8, 16)}), "zorp"))
    caption = "a red zorp zorp circle"
    assert encoder.cut(caption) == "zorp circle"
    assert encoder.tokenizers[0]([caption])[0].tolist()[3:15] == [*range(49408, 49416), *range(49408, 49412)]


@pytest.mark.parametrize("token", ["circle", "Circle", "a", "<|endoftext|>", " x", "zorp", "ZORP"])
def test_existing_and_invalid_tokens_are_refused(token: str, tmp_path: Path) -> None:
    encoder, path = tiny_text_encoder(), saved(tmp_path / "a.safetensors", {"emb_params": ONE})
    add_embedding(encoder, (path, "zorp"))
    before = encoder.towers[0].token_embedding.weight.shape
    with pytest.raises(ValueError, match=r"is a token already|must be a word without spaces"):
        add_embedding(encoder, (path, token))
    assert encoder.towers[0].token_embedding.weight.shape == before


def test_the_error_for_vectors_of_another_width_contains_both_widths(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", {"emb_params": torch.ones(1, 768)})
    with pytest.raises(ValueError, match=r"holds vectors \[1, 768\], but the text encoder's are 16 wide"):
        add_embedding(tiny_text_encoder(), path)


def test_vectors_for_two_text_encoders_are_refused_for_a_model_with_one(tmp_path: Path) -> None:
    path = saved(tmp_path / "zorp.safetensors", {"clip_l": ONE, "clip_g": ONE.clone()})
    with pytest.raises(
        ValueError, match="is for the text encoders text_encoder, text_encoder_2, but this model has text_"
    ):
        add_embedding(tiny_text_encoder(), path)
    both = TextEncoder([tiny_text_tower(), tiny_text_tower()], [Tokenizer(context=16), Tokenizer(context=16)])
    assert add_embedding(both, path) == "zorp"
    assert both.tokenize(["zorp"])[0, [1, 17]].tolist() == [49408, 49408]
