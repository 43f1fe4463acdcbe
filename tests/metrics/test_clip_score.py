from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel

from ldm.metrics.clip_score import ClipScore, ClipSimilarity, clip_similarity
from ldm.metrics.features import ClipFeatures
from ldm.nn.clip import CLIP, ImageTower, TextTower
from ldm.nn.text_encoder import TextEncoder
from ldm.nn.tokenizer import Tokenizer
from ldm.weights.info import OPENAI
from ldm.weights.native import save_network

CAPTIONS = ["a red circle", "a blue star"]


def towers() -> tuple[TextTower, ImageTower]:
    torch.manual_seed(0)
    return TextTower(49408, 16, 1, 2, context=16, projection=8), ImageTower(16, 8, 16, 1, 2, projection=8)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_similarities_are_the_diagonal_of_the_clip_similarity_matrix(images: torch.Tensor) -> None:
    text, image = towers()
    encoder = TextEncoder([text], [Tokenizer(context=16)])
    found = ClipSimilarity(encoder, ClipFeatures(image))(images, CAPTIONS)
    model = CLIP(text, image)
    tokens = Tokenizer(context=16)(CAPTIONS)
    expected = model(tokens, images / 127.5 - 1).diagonal() / model.logit_scale.exp()
    torch.testing.assert_close(found, expected)


def test_a_saved_transformers_clip_gives_the_same_similarities_as_in_transformers(
    images: torch.Tensor, tmp_path: Path
) -> None:
    tower = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {"max_position_embeddings": 16, "eos_token_id": 49407}
    image = tower | {"image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=image, projection_dim=8)
    theirs = CLIPModel(config).eval()
    theirs.save_pretrained(tmp_path)
    found = clip_similarity(str(tmp_path))(images, CAPTIONS)
    pixels = (images / 255 - torch.tensor(OPENAI.mean).view(3, 1, 1)) / torch.tensor(OPENAI.std).view(3, 1, 1)
    with torch.no_grad():
        expected = theirs(Tokenizer(context=16)(CAPTIONS), pixels).logits_per_image.diagonal()
        torch.testing.assert_close(found, expected / theirs.logit_scale.exp(), rtol=1e-5, atol=1e-6)


def test_negative_similarities_count_as_zero() -> None:
    metric = ClipScore(sync=False)
    metric.update(torch.tensor([0.5, -0.5]))
    metric.update(torch.tensor([0.25]))
    assert float(metric.compute()) == pytest.approx(25)


def test_a_full_clip_file_and_one_file_per_tower_give_equal_similarities(images: torch.Tensor, tmp_path: Path) -> None:
    text, image = towers()
    both = CLIP(text, image)
    for kind, network in (("text_tower", text), ("image_tower", image), ("clip", both)):
        save_network(tmp_path / f"{kind}.safetensors", kind, network.config, network.state_dict())
    joint = clip_similarity(str(tmp_path / "clip.safetensors"))
    split = clip_similarity(*(str(tmp_path / f"{kind}.safetensors") for kind in ("image_tower", "text_tower")))
    assert torch.equal(joint(images, CAPTIONS), split(images, CAPTIONS))
    assert joint.fingerprint == split.fingerprint
    assert normalize(joint.image.embed(images), dim=1).shape == (2, 8)


def test_an_image_tower_without_a_text_tower_is_refused(tmp_path: Path) -> None:
    image = towers()[1]
    save_network(tmp_path / "image.safetensors", "image_tower", image.config, image.state_dict())
    with pytest.raises(ValueError, match="holds no text_tower"):
        clip_similarity(str(tmp_path / "image.safetensors"))
