"""Tests tags in prompts that name LoRA files: how names are found, and the images that they give."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm.pipeline.inputs import Between
from ldm.pipeline.loras import LoraFolder
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.result import Result
from ldm.weights.adapters.writer import write_adapter
from tests.tiny import save_tiny_model, tiny_text_tower, tiny_unet
from tests.weights.adapters.made import changes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and with adapters in the folder loras."""
    path = tmp_path_factory.mktemp("model")
    save_tiny_model(path)
    unet = {"unet": changes(tiny_unet(), "attention")}
    both = {"unet": changes(tiny_unet(), "all", magnitude=0), "text_encoder": changes(tiny_text_tower(), "attention")}
    for name, made, facts in (
        ("ink.safetensors", unet, {}),
        ("style/both.safetensors", both, {"ss_output_name": "first name"}),
        ("a/twin.safetensors", unet, {}),
        ("b/twin.safetensors", unet, {}),
    ):
        file = path / "loras" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        write_adapter(file, made, "kohya", facts)
    return path


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Pipeline:
    return Pipeline.load(str(folder / "unet.safetensors"), "cpu", lora_dir=folder / "loras")


def sampled(pipeline: Pipeline, *prompts: str | Between[str], **call: object) -> Result:
    return pipeline(list(prompts), prompt_syntax="a1111", **call)  # type: ignore[arg-type]


def weights(pipeline: Pipeline) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in [*pipeline.backbone.parameters(), *pipeline.text_encoder.parameters()]]


@pytest.mark.parametrize("name", ["ink", "ink.safetensors", "both", "style/both", "first name", "a/twin"])
def test_a_name_is_a_stem_a_path_or_the_name_in_the_metadata(name: str, folder: Path) -> None:
    files = {"ink": "ink", "both": "style/both", "first name": "style/both"}
    expected = files.get(name.removesuffix(".safetensors"), name)
    assert LoraFolder(folder / "loras").find(name) == folder / "loras" / f"{expected}.safetensors"


def test_an_ambiguous_name_is_refused_with_all_paths(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"'twin': write one of a/twin.safetensors, b/twin.safetensors"):
        LoraFolder(folder / "loras").find("twin")


@pytest.mark.parametrize(
    ("name", "expected"), [("Bith", "the nearest names are both"), ("zzz", "it holds twin, ink, both")]
)
def test_the_error_for_a_missing_name_lists_the_nearest_names(name: str, expected: str, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"no LoRA '{name}' in .*: {expected}"):
        LoraFolder(folder / "loras").find(name)


def test_a_link_to_a_parent_folder_does_not_repeat_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "ink.safetensors").symlink_to(folder / "loras" / "ink.safetensors")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert list(LoraFolder(tmp_path).files()) == ["ink.safetensors"]


def test_tags_give_the_images_of_the_same_files_as_adapters(folder: Path, loaded: Pipeline) -> None:
    files = [(folder / "loras" / "ink.safetensors", 0.5), (folder / "loras" / "style" / "both.safetensors", -1.0)]
    expected = Pipeline.load(str(folder / "unet.safetensors"), "cpu", adapters=files)("a  red circle")
    result = sampled(loaded, "a <lora:ink:0.5> red<lora:both:-1> circle")
    assert torch.equal(result.images, expected.images)


def test_two_weights_of_a_tag_are_those_of_the_text_encoder_and_the_unet(folder: Path, loaded: Pipeline) -> None:
    both, plain = (Pipeline.load(str(folder / "unet.safetensors"), "cpu") for _ in range(2))
    both.use([(folder / "loras" / "style" / "both.safetensors", 0.5)])
    result = sampled(loaded, "red <lora:both:0:0.5>", steps=1)
    assert torch.equal(result.images, sampled(loaded, "red <lora:both:te=0:unet=0.5>", steps=1).images)
    assert all(map(torch.equal, loaded.text_encoder.parameters(), plain.text_encoder.parameters()))
    assert all(map(torch.equal, loaded.backbone.parameters(), both.backbone.parameters()))
    (tag,) = result.settings[0]["lora_tags"]
    assert tag["weight"] == 0.5 and tag["text_weight"] == 0


def test_a_tag_is_added_to_the_adapters_of_the_pipeline(folder: Path) -> None:
    model, ink = str(folder / "unet.safetensors"), folder / "loras" / "ink.safetensors"
    pipeline = Pipeline.load(model, "cpu", adapters=[(ink, 0.25)], lora_dir=folder / "loras")
    twice = Pipeline.load(model, "cpu", adapters=[(ink, 0.25), (ink, 1.0)])("red")
    assert torch.equal(sampled(pipeline, "red<lora:ink>").images, twice.images)


def test_without_its_tag_a_lora_leaves_no_trace(loaded: Pipeline) -> None:
    sampled(loaded, "red")
    before = weights(loaded)
    sampled(loaded, "red <lora:both>")
    assert not all(map(torch.equal, before, weights(loaded)))
    loaded("red")
    assert all(map(torch.equal, before, weights(loaded)))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_tags_work_with_packed_weights(dtype: torch.dtype, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.execution.cpu_packing.MIN_SIZE", 1)
    model, ink = str(folder / "unet.safetensors"), folder / "loras" / "ink.safetensors"
    expected = [Pipeline.load(model, "cpu", dtype, adapters=files)("red", steps=1) for files in ([], [(ink, 0.3)])]
    pipeline = Pipeline.load(model, "cpu", dtype, lora_dir=folder / "loras")
    for prompt, result in zip(("red", "red<lora:ink:0.3>", "red"), (*expected, expected[0]), strict=True):
        assert torch.equal(sampled(pipeline, prompt, steps=1).images, result.images)


def test_files_that_change_while_they_are_loaded_are_never_mixed(folder: Path, tmp_path: Path) -> None:
    model, ink = save_tiny_model(tmp_path), tmp_path / "ink.safetensors"
    ink.write_bytes((folder / "loras" / "ink.safetensors").read_bytes())
    pipeline = Pipeline.load(str(model), "cpu", adapters=[ink], lora_dir=folder / "loras")
    before = sampled(pipeline, "red", steps=1).images
    write_adapter(ink, {"unet": changes(tiny_unet(), "all")}, "kohya", {})
    assert torch.equal(sampled(pipeline, "red", steps=1).images, before)
    with pytest.raises(ValueError, match="has changed since: load it again"):
        sampled(pipeline, "red <lora:both>")
    pipeline.use()
    os.utime(model, ns=(0, 0))  # as if it had been written again
    assert pipeline.outdated
    with pytest.raises(ValueError, match="has changed since: load it again"):
        sampled(pipeline, "red <lora:both>")


@pytest.mark.slow
def test_each_prompt_of_a_call_has_its_own_tags_and_place(loaded: Pipeline) -> None:
    prompts = ["red <lora:ink>", "blue <lora:ink>", "red", "red <lora:ink:0.5>", "blue"]
    steps, firsts = [], []
    result = sampled(
        loaded,
        *prompts,
        seeds=[1, 2, 3, 4, 5],
        batch_size=2,
        steps=1,
        on_step=lambda *step: steps.append(step),
        on_estimate=lambda first, _, x0: firsts.append((first, len(x0))),
    )
    for k, prompt in enumerate(prompts):
        alone = sampled(loaded, prompt, seeds=[k + 1], steps=1)
        assert (alone.images[0].int() - result.images[k].int()).abs().max() <= 1
    assert steps == [(k, 4) for k in (1, 2, 3, 4)] and firsts == [(0, 2), (2, 1), (3, 1), (4, 1)]
    assert [settings["prompt"] for settings in result.settings] == prompts
    assert result.settings[1]["batch"] == {"prompts": prompts[:2], "seeds": [1, 2], "position": 1}
    assert result.batch_size == 2 and "lora_tags" not in result.settings[2]
    (tag,) = result.settings[3]["lora_tags"]
    assert tag["name"] == "ink" and tag["weight"] == 0.5 and len(tag["sha256"]) == 64


def test_a_tag_in_the_negative_prompt_is_refused(loaded: Pipeline) -> None:
    with pytest.raises(ValueError, match=r"the negative prompt names the LoRA 'ink'.* such as <lora:ink:-1>"):
        sampled(loaded, "red", negative="<lora:ink>")


def test_two_prompts_of_one_image_need_the_same_tags(loaded: Pipeline) -> None:
    both = sampled(loaded, Between("red <lora:ink>", "blue <lora:ink>", 0.5), steps=1)
    assert both.settings[0]["lora_tags"][0]["name"] == "ink"
    with pytest.raises(ValueError, match="name different LoRAs"):
        sampled(loaded, Between("red <lora:ink>", "blue", 0.5))


def test_a_tag_without_a_folder_is_refused(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match=r"names the LoRA 'ink', but there is no folder.*: give lora_dir"):
        sampled(pipeline, "red <lora:ink>")


def test_a_folder_that_does_not_exist_is_refused(folder: Path) -> None:
    with pytest.raises(NotADirectoryError, match=r"lora_dir=.*nowhere is not a folder"):
        Pipeline.load(str(folder / "unet.safetensors"), "cpu", lora_dir=folder / "nowhere")


def test_adapters_and_embeddings_of_a_loaded_pipeline_can_be_replaced(folder: Path, tmp_path: Path) -> None:
    model, file = str(folder / "unet.safetensors"), folder / "loras" / "style" / "both.safetensors"
    save_file(
        {"emb_params": torch.randn(2, 16, generator=torch.Generator().manual_seed(0))}, tmp_path / "zorp.safetensors"
    )
    added = {"adapters": [(file, 0.5)], "embeddings": [tmp_path / "zorp.safetensors"]}
    pipeline, plain = (Pipeline.load(model, "cpu") for _ in range(2))
    before = weights(pipeline)
    pipeline.use(**added)
    assert torch.equal(pipeline("a zorp").images, Pipeline.load(model, "cpu", **added)("a zorp").images)
    with pytest.raises(FileNotFoundError, match="there is no adapter"):
        pipeline.use([tmp_path / "missing.safetensors"])
    assert not all(map(torch.equal, before, weights(pipeline)))
    pipeline.use()
    assert all(map(torch.equal, before, weights(pipeline)))
    assert pipeline.text_encoder.tokenize(["zorp"]).equal(plain.text_encoder.tokenize(["zorp"]))
