import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ldm.commands.sample import command as sample
from ldm.image import read_metadata
from ldm.weights.convert import write
from tests.commands.sample.running import error
from tests.weights.foreign import SD2, full_model, without_metadata

ROOT = Path(__file__).parents[3]


def test_images_are_in_prompt_order_with_consecutive_seeds(
    model: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["a red circle", "steps=2", "a blue square", "n=2", "seed=5", "batch_size=3", model, f"out={out}"]
    assert sample.main(argv) == 0
    names = ["0000.png", "0001.png", "0002.png", "0003.png", "grid.png"]
    assert capsys.readouterr().out.split() == [str(out / name) for name in names]
    assert sorted(file.name for file in out.iterdir()) == names
    recorded = [read_metadata(out / name) for name in names[:-1]]
    assert [(settings["prompt"], settings["seed"]) for settings in recorded] == [
        ("a red circle", 5), ("a red circle", 6), ("a blue square", 5), ("a blue square", 6),
    ]  # fmt: skip
    assert Image.open(out / "0003.png").size == (16, 16)


def test_names_of_other_programs_are_recorded_as_settings_of_ldm(
    model: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["red", "--num_inference_steps", "2", "sampler=DPM++ 2M Karras", "height=8", "width=16", model, f"out={out}"]
    assert sample.main(argv) == 0
    recorded = read_metadata(out / "0000.png")
    names = ("steps", "sampler", "spacing", "size")
    assert [recorded[name] for name in names] == [2, "dpmpp_2m", "karras", [8, 16]]
    printed = capsys.readouterr().err
    assert "note: num_inference_steps=2 is taken as steps=2\n" in printed
    assert "note: sampler=DPM++ 2M Karras is taken as sampler=dpmpp_2m spacing=karras\n" in printed


def test_a_question_mark_lists_the_values_of_a_key_and_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert sample.main(["a red circle", "sampler=?"]) == 0
    assert "\n  dpmpp_2m " in capsys.readouterr().out


def test_an_image_records_all_its_settings(model: str, out: Path) -> None:
    argv = [
        "red",
        "blue",
        "negative=white",
        "sampler=ddpm",
        "guidance=3",
        "size=8x16",
        "steps=2",
        "precision=32",
        model,
        f"out={out}",
    ]
    assert sample.main(argv) == 0
    recorded = read_metadata(out / "0001.png")
    assert (
        len(recorded.pop("fingerprint")) == 64
        and recorded.pop("torch")
        and recorded.pop("ldm")
        and recorded.pop("threads")
    )
    assert recorded == {
        "prompt": "blue",
        "negative": "white",
        "seed": 0,
        "sampler": "ddpm",
        "spacing": "trailing",
        "steps": 2,
        "sampler_options": {},
        "spacing_options": {},
        "final_sigma": "zero",
        "guidance": 3.0,
        "guidance_interval": None,
        "guidance_rescale": 0.0,
        "size": [8, 16],
        "fixed_steps": False,
        "thresholding": "none",
        "thresholding_options": {},
        "clip_skip": 0,
        "chunks": 1,
        "prompt_syntax": "plain",
        "tile": 0,
        "noise": "ldm",
        "batch": {"prompts": ["red", "blue"], "seeds": [0, 0], "position": 1},
        "model": model.removeprefix("model="),
        "device": "cpu",
        "precision": "32",
    }


def test_prompts_of_a_file_follow_those_of_the_command_line(model: str, out: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a blue square", "seed": 7, "n": 2, "guidance": 1, "negative": "red"}, {"prompt": "steps=3"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["red", f"prompts_file={tmp_path / 'p.jsonl'}", "steps=1", "negative=white", "seed=2", model, f"out={out}"]
    assert sample.main(argv) == 0
    recorded = [read_metadata(out / f"000{k}.png") for k in range(4)]
    assert [tuple(settings[name] for name in ("prompt", "seed", "negative", "guidance")) for settings in recorded] == [
        ("red", 2, "white", 2.0), ("a blue square", 7, "red", 1.0), ("a blue square", 8, "red", 1.0),
        ("steps=3", 2, "white", 2.0),
    ]  # fmt: skip
    argv = [f"from={out / '0001.png'}", f"out={tmp_path / 'reproduced'}", "device=cpu"]
    assert sample.main(argv) == 0
    assert (tmp_path / "reproduced" / "0000.png").read_bytes() == (out / "0001.png").read_bytes()


def test_preview_gif_saves_the_estimates_of_each_step(model: str, out: Path) -> None:
    assert sample.main(["red", "blue", "steps=3", "preview=gif", model, f"out={out}"]) == 0
    assert sorted(file.name for file in out.iterdir()) == ["0000.gif", "0000.png", "0001.gif", "0001.png", "grid.png"]
    with Image.open(out / "0001.gif") as gif:
        assert gif.size == (16, 16) and 2 <= gif.n_frames <= 4


def test_unknown_words_cause_one_warning_per_prompt(model: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample.main(["a purple circle", "n=3", "batch_size=1", "steps=1", model, f"out={out}"]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert warnings == [
        "warning: the vocabulary of the text encoder lacks 'purple' in 'a purple circle'; "
        "it reads all such words as the same word"
    ]


def test_the_default_folder_is_new_and_named_after_the_time(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample.time, "strftime", lambda form: "2030-01-02_03-04-05")
    for _ in range(2):
        assert sample.main(["red", "steps=1", model]) == 0
    folders = sorted(folder.name for folder in (tmp_path / "samples").iterdir())
    assert folders == ["2030-01-02_03-04-05", "2030-01-02_03-04-05_1"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "there is no prompt"),
        (["seed=3"], "there is no prompt"),
        (["red", "stpes=20"], "looks like steps=20"),
        (["red", "sampler=magic"], "sampler=magic was given, but sampler must be one of ddpm, ddim"),
        (["red", "spacing=even"], "spacing must be one of trailing"),
        (["from=x.png", "n=2"], "leave out n="),
        (["red", "strength=0.5"], "strength= needs a source image: give init="),
        (["red", "init=x.png", "strength=0"], "strength must be a number above 0 and at most 1"),
        (["from=x.png", "prompts_file=x.txt"], "leave out prompts_file="),
        (["from=x.png", "red", "blue"], "give at most one prompt"),
        (["red", "preview=terminal"], "which is not a terminal"),
        (["red", "device=gpu"], "device is 'gpu', but must be auto"),
    ],
)
def test_wrong_arguments_exit_with_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error(capsys, 2, *argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["red", "model=nowhere"], "there is no model nowhere"),
        (["red", "size=5x16"], "multiples of 2"),
        (["red", "steps=1001"], "steps is 1001, but must be a whole number between 1 and 1000"),
        (["red", "spacing=leading"], "use spacing=trailing"),
        (["prompts_file=x.xlsx"], "has an unknown type; give a file of type .txt, .csv, .jsonl"),
        (["prompts_file=nowhere.txt"], "prompts_file=nowhere.txt does not exist"),
        (["red", "init=nowhere.png"], "nowhere.png: No such file or directory"),
        (["red", "init=README.md"], "README.md cannot be read as an image"),
        (["from=nowhere.png"], "nowhere.png: No such file or directory"),
        (["red", "out=README.md/images"], "cannot write into README.md/images"),
    ],
)
def test_a_failure_exits_with_1(
    argv: list[str], message: str, model: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {arg.partition("=")[0] for arg in argv}
    own = {"model": model, "out": f"out={out}"}
    assert message in error(capsys, 1, *argv, *(arg for name, arg in own.items() if name not in given))
    assert not out.exists()


@pytest.mark.slow
def test_the_script_runs_without_importing_training_libraries(model: str, out: Path) -> None:
    code = (
        "import runpy, sys, json\n"
        "sys.argv = ['sample.py', *sys.argv[1:]]\n"
        "try: runpy.run_path('sample.py', run_name='__main__')\n"
        "except SystemExit as end: print(json.dumps([end.code, sorted(sys.modules)]))"
    )
    argv = [sys.executable, "-c", code, "red", "steps=1", model, f"out={out}"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.startswith("1/1 steps, ") and done.stderr.endswith(" steps/s, 0:00 left\n")
    code, modules = json.loads(done.stdout.splitlines()[-1])
    heavy = {"lightning", "hydra", "omegaconf", "torchmetrics", "scipy", "pandas", "diffusers"}
    assert code == 0 and not heavy & set(modules)


@pytest.mark.slow
def test_a_guessed_prediction_causes_a_warning_and_is_recorded(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unet = SD2["unet"] | {"context_width": 768, "head_width": None}
    text = {"width": 768, "heads": 12, "layers": 2, "context": 7, "projection": 64, "skip": 1, "activation": "gelu"}
    write(full_model(SD2 | {"unet": unet, "text_tower": text}), tmp_path / "m.safetensors", "single")
    argv = [f"model={without_metadata(tmp_path / 'm.safetensors')}", f"out={out}", "steps=1", "size=8x8", "red"]
    assert sample.main(argv) == 0
    assert "prediction=v" in capsys.readouterr().err
    [guess] = read_metadata(out / "0000.png")["guesses"]
    assert "prediction=v" in guess and "convert with --prediction eps" in guess
