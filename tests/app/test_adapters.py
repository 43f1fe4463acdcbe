"""Tests the adapters and textual inversions of the page: which are offered, their effect, records and restoring."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.app.adapters import AdapterFiles
from ldm.app.restoring import restore
from ldm.app.service import Finished, Request, Service
from ldm.commands.sample import command as sample
from ldm.image import read_metadata
from ldm.nn.unet import UNet
from ldm.weights.adapters.writer import write_adapter
from ldm.weights.model import save_model
from tests.tiny import randomised, save_tiny_model, tiny_about, tiny_text_tower, tiny_unet
from tests.weights.adapters.made import changes

PROMPT = "a red zorp"


def wider_unet() -> UNet:
    return randomised(UNet(**tiny_unet().config | {"width": 16}), 0, std=0.3)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models of other widths, and loras with files for the first and one for the second."""
    path = tmp_path_factory.mktemp("app")
    save_tiny_model(path)
    wide = wider_unet()
    save_model(path / "wide.safetensors", wide.state_dict(), tiny_about(path) | {"config": wide.config})
    (path / "loras" / "more").mkdir(parents=True)
    both = {"unet": changes(tiny_unet(), "all"), "text_encoder": changes(tiny_text_tower(), "attention")}
    write_adapter(path / "loras" / "ink.safetensors", both, "kohya", {})
    write_adapter(path / "loras" / "more" / "wide.safetensors", {"unet": changes(wide)}, "kohya", {})
    vectors = 5 * torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    save_file({"emb_params": vectors}, path / "loras" / "zorp.safetensors")
    (path / "loras" / "notes.bin").write_bytes(b"no tensors")
    return path


@pytest.fixture
def service(folder: Path, tmp_path: Path) -> Service:
    models = {"tiny": str(folder / "unet.safetensors"), "wide": str(folder / "wide.safetensors")}
    return Service(models, tmp_path / "out" / "now", device="cpu", lora_dir=str(folder / "loras"))


def sampled(
    service: Service, *loras: tuple[str, float], model: str = "tiny", embeddings: tuple[str, ...] = (), **call: object
) -> Path:
    request = Request(model, str(call.pop("prompt", PROMPT)), [1], {"steps": 1, **call}, {}, [*loras], [*embeddings])
    *_, finished = service.sample(request)
    assert isinstance(finished, Finished)
    return finished.paths[0]


def pixels(path: Path) -> bytes:
    return Image.open(path).tobytes()


def test_the_files_of_the_folder_are_offered_by_kind(service: Service) -> None:
    offered = service.adapters.offered()
    assert [*offered["lora"]] == ["ink.safetensors", "more/wide.safetensors"]
    assert [*offered["embedding"]] == ["zorp.safetensors"]


def test_adapters_leave_no_trace_in_images_without_them(service: Service) -> None:
    plain = pixels(sampled(service))
    half, inverse = (pixels(sampled(service, ("ink.safetensors", weight))) for weight in (0.5, -0.5))
    word = pixels(sampled(service, embeddings=("zorp.safetensors",)))
    assert len({plain, half, inverse, word}) == 4
    assert pixels(sampled(service)) == plain


def test_sample_py_reproduces_an_image_with_adapters(service: Service, tmp_path: Path) -> None:
    path = sampled(service, ("ink.safetensors", 0.5), embeddings=("zorp.safetensors",))
    record = read_metadata(path)
    assert record["lora"][0]["weight"] == 0.5 and record["embedding"][0]["token"] == "zorp"
    assert sample.main([f"from={path}", f"out={tmp_path / 'again'}"]) == 0
    assert pixels(tmp_path / "again" / "0000.png") == pixels(path)


@pytest.mark.slow
def test_an_adapter_of_another_architecture_is_refused_and_changes_nothing(service: Service) -> None:
    plain = pixels(sampled(service))
    for model, name in (("tiny", "more/wide.safetensors"), ("wide", "ink.safetensors")):
        with pytest.raises(ValueError, match="is one of another model"):
            sampled(service, (name, 1.0), model=model)
    assert pixels(sampled(service)) == plain
    assert pixels(sampled(service, ("more/wide.safetensors", 1.0), model="wide")) != pixels(
        sampled(service, model="wide")
    )


def test_tags_in_prompts_name_files_of_the_folder(service: Service) -> None:
    tagged = sampled(service, prompt=f"{PROMPT}<lora:ink:0.5>", prompt_syntax="a1111")
    assert pixels(tagged) == pixels(sampled(service, ("ink.safetensors", 0.5)))
    with pytest.raises(FileNotFoundError, match="the nearest names are ink"):
        sampled(service, prompt="<lora:inc>", prompt_syntax="a1111")


def test_dropped_files_are_kept_beside_the_images(folder: Path, service: Service, tmp_path: Path) -> None:
    alone = Service(service.models, tmp_path / "out" / "other", device="cpu")
    assert alone.adapters.add(str(folder / "loras" / "zorp.safetensors"))[0] == "embedding"
    kind, name = alone.adapters.add(str(folder / "loras" / "ink.safetensors"))
    assert kind == "lora" and alone.adapters.offered() == {"lora": {}, "embedding": {}}
    path = sampled(alone, (name, 0.5))
    assert Path(read_metadata(path)["lora"][0]["path"]).is_relative_to(alone.out)
    assert pixels(path) == pixels(sampled(service, ("ink.safetensors", 0.5)))


def test_only_files_of_the_page_can_be_chosen(service: Service, folder: Path) -> None:
    with pytest.raises(ValueError, match="is not among the files of this page"):
        sampled(service, (str(folder / "loras" / "ink.safetensors"), 1.0))
    with pytest.raises(ValueError, match=r"notes\.bin is neither a LoRA nor a textual inversion"):
        service.adapters.add(str(folder / "loras" / "notes.bin"))


def test_a_restored_image_chooses_its_files_by_name_and_contents(
    service: Service, folder: Path, tmp_path: Path
) -> None:
    path = sampled(service, ("ink.safetensors", 0.5), embeddings=("zorp.safetensors",))
    found = restore(path, service.models, tmp_path, service.adapters)
    assert found.controls["loras"] == [["ink.safetensors", 0.5], ["more/wide.safetensors", 0.0]]
    assert found.controls["embeddings"] == ["zorp.safetensors"] and found.warnings == []
    save_file({"emb_params": torch.ones(1, 16)}, tmp_path / "zorp.safetensors")
    found = restore(path, service.models, tmp_path, AdapterFiles(str(tmp_path), tmp_path / "dropped"))
    assert [warning.split(" ", 3)[3] for warning in found.warnings] == [
        "is not among the files here: drop it on the page.",
        "has changed since.",
    ]


def test_a_restored_image_with_a_missing_tag_causes_a_warning(service: Service, tmp_path: Path) -> None:
    path = sampled(service, prompt=f"{PROMPT}<lora:ink:0.5>", prompt_syntax="a1111")
    assert restore(path, service.models, tmp_path, service.adapters).controls["prompt_syntax"] == "a1111"
    (warning,) = restore(path, service.models, tmp_path, AdapterFiles(None, tmp_path)).warnings
    assert "the LoRA 'ink' of this image" in warning
