"""Tests `lora_dir=`: tags in prompts, their records in image metadata, and sampling again from a record."""

import hashlib
import shutil
from pathlib import Path

import pytest
from PIL import Image

from ldm.commands.sample import command as sample
from ldm.image import read_metadata
from ldm.weights.adapters.writer import write_adapter
from tests.commands.sample.running import error, files
from tests.tiny import tiny_unet
from tests.weights.adapters.made import changes

A1111 = "prompt_syntax=a1111"
STEPS = "steps=1"
PROMPT = "a red circle <lora:ink:0.5>"


@pytest.fixture
def loras(tmp_path: Path) -> Path:
    (tmp_path / "loras").mkdir()
    write_adapter(tmp_path / "loras" / "ink.safetensors", {"unet": changes(tiny_unet(), "attention")}, "kohya", {})
    return tmp_path / "loras"


def sampled(out: Path, *argv: str) -> bytes:
    """Samples images and returns the pixels of the first."""
    assert sample.main([*argv, f"out={out}"]) == 0
    return Image.open(out / "0000.png").tobytes()


def test_a_tag_is_recorded_by_name_and_hash_and_sampled_again(model: str, loras: Path, tmp_path: Path) -> None:
    out, lora_dir = tmp_path / "a", f"lora_dir={loras}"
    prompt = "a red circle <lora:ink:0.25:0.5>"
    sampled(out, prompt, "a blue square", model, STEPS, A1111, lora_dir, "n=2")
    file = loras / "ink.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    record = read_metadata(out / "0001.png")
    (tag,) = record["lora_tags"]
    assert tag == {"name": "ink", "path": str(file), "sha256": digest, "weight": 0.5, "text_weight": 0.25}
    assert record["prompt"] == prompt and record["lora_dir"] == str(loras)
    assert "lora_tags" not in read_metadata(out / "0002.png")
    for name in ("0001.png", "0002.png"):
        sampled(tmp_path / f"again_{name}", f"from={out / name}")
        assert (tmp_path / f"again_{name}" / "0000.png").read_bytes() == (out / name).read_bytes()


def test_a_tag_gives_the_image_of_the_same_lora_key(model: str, loras: Path, tmp_path: Path) -> None:
    expected = sampled(tmp_path / "a", "a red circle", model, STEPS, f"lora={loras / 'ink.safetensors'}:0.5")
    assert sampled(tmp_path / "b", PROMPT, model, STEPS, A1111, f"lora_dir={loras}") == expected


@pytest.mark.slow
def test_recorded_files_may_move_but_not_change(
    model: str, loras: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, again = tmp_path / "a" / "0000.png", f"out={tmp_path / 'again'}"
    sampled(image.parent, PROMPT, model, STEPS, A1111, f"lora_dir={loras}")
    moved = Path(shutil.move(loras, tmp_path / "moved"))
    assert "the LoRA 'ink' of this image (SHA-256 " in (message := error(capsys, 1, f"from={image}", again))
    assert "is not there" in message and "lora_dir=" in message
    assert sampled(tmp_path / "b", f"from={image}", f"lora_dir={moved}") == Image.open(image).tobytes()
    (moved / "ink.safetensors").rename(moved / "inc.safetensors")
    assert "the nearest names are inc" in error(capsys, 1, f"from={image}", f"lora_dir={moved}", again)
    write_adapter(moved / "ink.safetensors", {"unet": changes(tiny_unet(), "all")}, "kohya", {})
    assert "has changed since: put it back" in error(capsys, 1, f"from={image}", f"lora_dir={moved}", again)


@pytest.mark.slow
def test_a_job_with_tags_and_long_prompts_resumes(
    model: str, loras: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = PROMPT, "red " * 40, model, STEPS, A1111, f"lora_dir={loras}", "batch_size=1"
    sampled(tmp_path / "a", *job)
    before = files(tmp_path / "a")
    (tmp_path / "a" / "0001.png").unlink()
    sampled(tmp_path / "a", *job)
    assert files(tmp_path / "a") == before
    write_adapter(loras / "ink.safetensors", {"unet": changes(tiny_unet(), "all")}, "kohya", {})
    assert "0000.png, which is not an image of this job" in error(capsys, 1, *job, f"out={tmp_path / 'a'}")


def test_all_tags_of_a_file_of_prompts_are_checked_before_sampling(
    model: str, loras: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\na red circle <lora:inc>\n")
    job = f"prompts_file={tmp_path / 'prompts.txt'}", model, STEPS, A1111, f"lora_dir={loras}", "batch_size=1"
    assert "the nearest names are ink" in error(capsys, 1, *job, f"out={tmp_path / 'a'}")
    assert not (tmp_path / "a").exists()


def test_a_folder_of_loras_needs_the_syntax_that_names_them(
    model: str, loras: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "add prompt_syntax=a1111" in error(capsys, 2, PROMPT, model, f"lora_dir={loras}")


def test_tags_and_weights_in_a_file_of_plain_prompts_are_warned_about(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("red\nred <lora:ink:0.5>\nred (circle:1.2)\n")
    sampled(tmp_path / "a", f"prompts_file={tmp_path / 'prompts.txt'}", "batch_size=1", model, STEPS)
    warned = capsys.readouterr().err
    assert all(f"{part!r} in " in warned for part in ("<lora:ink:0.5>", "(circle:1.2)"))
