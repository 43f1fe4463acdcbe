import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.commands import sample, sample_job
from ldm.image import read_metadata, save_png, to_pil
from ldm.pipeline import Pipeline
from tests.tiny import save_tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"model={save_tiny_model(tmp_path_factory.mktemp('model'))}"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "pictures"


def error(capsys: pytest.CaptureFixture[str], code: int, *argv: str) -> str:
    assert sample.main(list(argv)) == code
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("error: ") and not any(line.startswith("error") for line in told[:-1])
    return told[-1]


def test_pictures_come_in_prompt_order_each_with_its_seed(
    model: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["a red circle", "steps=2", "a blue square", "n=2", "seed=5", "batch_size=3", model, f"out={out}"]
    assert sample.main(argv) == 0
    names = ["0000.png", "0001.png", "0002.png", "0003.png", "grid.png"]
    assert capsys.readouterr().out.split() == [str(out / name) for name in names]
    assert sorted(file.name for file in out.iterdir()) == names
    told = [read_metadata(out / name) for name in names[:-1]]
    assert [(one["prompt"], one["seed"]) for one in told] == [
        ("a red circle", 5), ("a red circle", 6), ("a blue square", 5), ("a blue square", 6),
    ]  # fmt: skip
    assert Image.open(out / "0003.png").size == (16, 16)


def test_a_picture_says_all_that_made_it(model: str, out: Path) -> None:
    argv = [
        "red",
        "blue",
        "negative=white",
        "sampler=ddpm",
        "guidance=3",
        "size=8x16",
        "steps=2",
        model,
        f"out={out}",
    ]
    assert sample.main(argv) == 0
    told = read_metadata(out / "0001.png")
    assert len(told.pop("fingerprint")) == 64 and told.pop("torch") and told.pop("ldm") and told.pop("threads")
    assert told == {
        "prompt": "blue",
        "negative": "white",
        "seed": 0,
        "sampler": "ddpm",
        "spacing": "trailing",
        "steps": 2,
        "sampler_options": {},
        "spacing_options": {},
        "guidance": 3.0,
        "guidance_interval": None,
        "guidance_rescale": 0.0,
        "size": [8, 16],
        "fixed_steps": False,
        "thresholding": "none",
        "thresholding_options": {},
        "clip_skip": 0,
        "chunks": 1,
        "tile": 0,
        "noise": "ldm",
        "batch": {"prompts": ["red", "blue"], "seeds": [0, 0], "position": 1},
        "model": model.removeprefix("model="),
        "device": "cpu",
        "precision": "32",
    }


def test_a_picture_is_made_again_bit_for_bit_and_again_from_that(model: str, out: Path, tmp_path: Path) -> None:
    prompts = ["a red circle", 'commas, "quotes", it\'s [x=1]', "blue"]
    assert sample.main([*prompts, "sampler=ddpm", "steps=2", "seed=9", "device=cpu", model, f"out={out}"]) == 0
    first, second = tmp_path / "first", tmp_path / "second"
    assert sample.main([f"from={out / '0001.png'}", f"out={first}"]) == 0
    assert sample.main([f"from={first / '0000.png'}", f"out={second}"]) == 0
    assert sorted(file.name for file in first.iterdir()) == ["0000.png", "grid.png"]
    for folder in (first, second):
        assert (folder / "0000.png").read_bytes() == (out / "0001.png").read_bytes()


def test_a_changed_picture_names_those_that_it_is_made_of_and_is_made_again(
    model: str, out: Path, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    init, mask = to_pil(torch.randint(0, 256, (2, 3, 16, 16), generator=generator, dtype=torch.uint8))
    init.save(tmp_path / "init.png")
    mask.save(tmp_path / "mask.png")
    sources = [f"init={tmp_path / 'init.png'}", f"mask={tmp_path / 'mask.png'}", "strength=0.5"]
    guided = [
        "guidance_interval=0.3,5",
        "guidance_rescale=0.5",
        "fixed_steps=true",
        f"weak={tmp_path / 'weak.safetensors'}",
    ]
    guided += ["thresholding=dynamic", "thresholding_options=share=0.9,limit=2"]
    (tmp_path / "weak.safetensors").symlink_to(Path(model.removeprefix("model=")))
    assert sample.main(["red", "blue", "steps=4", "device=cpu", model, *sources, *guided, f"out={out}"]) == 0
    told = read_metadata(out / "0001.png")
    assert told["strength"] == 0.5 and told["init"]["path"] == str(tmp_path / "init.png")
    assert told["guidance_interval"] == [0.3, 5.0] and told["guidance_rescale"] == 0.5
    assert sample.main([f"from={out / '0001.png'}", f"out={tmp_path / 'again'}"]) == 0
    assert (tmp_path / "again" / "0000.png").read_bytes() == (out / "0001.png").read_bytes()


def test_a_picture_from_before_there_were_such_settings_is_made_again(model: str, out: Path, tmp_path: Path) -> None:
    assert sample.main(["red", "steps=2", "device=cpu", model, f"out={out}"]) == 0
    old = {name: value for name, value in read_metadata(out / "0000.png").items() if name not in sample_job.UNRECORDED}
    save_png(Image.open(out / "0000.png"), tmp_path / "old.png", old)
    assert sample.main([f"from={tmp_path / 'old.png'}", f"out={tmp_path / 'again'}"]) == 0
    assert (tmp_path / "again" / "0000.png").read_bytes() == (out / "0000.png").read_bytes()


def test_other_keys_and_a_prompt_override_what_a_picture_says(model: str, out: Path, tmp_path: Path) -> None:
    assert sample.main(["red", "blue", "steps=2", "seed=9", model, f"out={out}"]) == 0
    again = tmp_path / "again"
    assert sample.main([f"from={out / '0001.png'}", "white", "seed=3", "guidance=1", f"out={again}"]) == 0
    told = read_metadata(again / "0000.png")
    assert (told["prompt"], told["seed"], told["guidance"], told["steps"]) == ("white", 3, 1.0, 2)
    assert told["batch"] == {"prompts": ["red", "white"], "seeds": [9, 3], "position": 1}


def test_a_picture_of_a_model_that_has_changed_is_refused_unless_a_model_is_given(
    model: str, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample.main(["red", "steps=1", model, f"out={out}"]) == 0
    changed = tmp_path / "changed.png"
    save_png(Image.open(out / "0000.png"), changed, read_metadata(out / "0000.png") | {"fingerprint": "0" * 64})
    told = error(capsys, 1, f"from={changed}", f"out={tmp_path / 'again'}")
    assert "is no longer the one that drew this picture" in told
    assert sample.main([f"from={changed}", model, f"out={tmp_path / 'again'}"]) == 0


def test_prompts_come_from_a_file_after_those_of_the_command_line(model: str, out: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a blue square", "seed": 7, "n": 2, "guidance": 1, "negative": "red"}, {"prompt": "steps=3"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["red", f"prompts_file={tmp_path / 'p.jsonl'}", "steps=1", "negative=white", "seed=2", model, f"out={out}"]
    assert sample.main(argv) == 0
    told = [read_metadata(out / f"000{k}.png") for k in range(4)]
    assert [tuple(one[name] for name in ("prompt", "seed", "negative", "guidance")) for one in told] == [
        ("red", 2, "white", 2.0), ("a blue square", 7, "red", 1.0), ("a blue square", 8, "red", 1.0),
        ("steps=3", 2, "white", 2.0),
    ]  # fmt: skip
    again = [f"from={out / '0001.png'}", f"out={tmp_path / 'again'}", "device=cpu"]
    assert sample.main(again) == 0
    assert (tmp_path / "again" / "0000.png").read_bytes() == (out / "0001.png").read_bytes()


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_job_goes_on_where_it_was_killed_and_ends_in_the_same_files(
    model: str, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["red", "blue", "n=3", "batch_size=2", "steps=3", "guidance_interval=0.1,9", "device=cpu", model]
    assert sample.main([*argv, f"out={tmp_path / 'whole'}"]) == 0
    shutil.copytree(tmp_path / "whole", out)
    for name in ("0003.png", "0004.png", "0005.png", "grid.png"):  # of the second batch one picture is there
        (out / name).unlink()
    (out / ".0004.png.0a1b2c3d.tmp").write_bytes(b"half")
    drawn, draw = [], Pipeline.__call__

    def noted(self: Pipeline, prompts: list[str], **call: object) -> object:
        drawn.append(prompts)
        return draw(self, prompts, **call)

    monkeypatch.setattr(Pipeline, "__call__", noted)
    capsys.readouterr()
    assert sample.main([*argv, f"out={out}"]) == 0
    assert files(out) == files(tmp_path / "whole") and drawn == [["red", "blue"], ["blue", "blue"]]
    assert "1 of 3 batches are in" in capsys.readouterr().err
    assert sample.main([*argv, f"out={out}"]) == 0 and len(drawn) == 2


@pytest.mark.parametrize("change", ["steps=2", "seed=1", "negative=blue", "guidance=3", "precision=bf16"])
def test_pictures_of_another_job_are_not_taken_for_this_ones(
    change: str, model: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["red", model, f"out={out}"]
    assert sample.main(argv) == 0
    assert "which is not of this job" in error(capsys, 1, *argv, change)


def test_processes_share_a_job_and_draw_what_one_would(model: str, tmp_path: Path) -> None:
    argv = ["red", "blue", "white", "n=2", "batch_size=2", "steps=1", "device=cpu", model]
    assert sample.main([*argv, f"out={tmp_path / 'one'}"]) == 0
    command = [sys.executable, "sample.py", *argv, f"out={tmp_path / 'two'}"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    places = [{"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank} for rank in "01"]  # as torchrun sets them
    started = [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | threads | place, stdout=subprocess.PIPE, text=True)
        for place in places
    ]
    printed = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert [text.count(f"{tmp_path / 'two'}{os.sep}0") for text in printed] == [4, 2]
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_processes_need_a_folder_that_is_named(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "give out=" in error(capsys, 2, "red", model)


def test_estimates_by_step_are_kept_as_a_film(model: str, out: Path) -> None:
    assert sample.main(["red", "blue", "steps=3", "preview=gif", model, f"out={out}"]) == 0
    assert sorted(file.name for file in out.iterdir()) == ["0000.gif", "0000.png", "0001.gif", "0001.png", "grid.png"]
    with Image.open(out / "0001.gif") as film:
        assert film.size == (16, 16) and 2 <= film.n_frames <= 4


def test_text_that_is_not_read_is_warned_of_once_a_prompt(
    model: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample.main(["a purple circle", "n=3", "batch_size=1", "steps=1", model, f"out={out}"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert told == [
        "warning: the text encoder does not know 'purple' in 'a purple circle'; the model was not trained on such words"
    ]


def test_without_out_the_folder_is_new_and_named_by_the_time(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample.time, "strftime", lambda form: "2030-01-02_03-04-05")
    for _ in range(2):
        assert sample.main(["red", "steps=1", model]) == 0
    folders = sorted(folder.name for folder in (tmp_path / "samples").iterdir())
    assert folders == ["2030-01-02_03-04-05", "2030-01-02_03-04-05_1"]


def test_pictures_are_never_overwritten(model: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out.mkdir()
    (out / "0001.png").write_bytes(b"mine")
    told = error(capsys, 1, "red", "blue", model, f"out={out}")
    assert "already holds 0001.png, which is not of this job: give another folder" in told
    assert (out / "0001.png").read_bytes() == b"mine"


def test_of_many_pictures_the_grid_shows_the_first(model: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_job, "GRID_MOST", 2)
    assert sample.main(["red", "n=3", "steps=1", model, f"out={out}"]) == 0
    assert read_metadata(out / "grid.png") == {"grid": 2}


def test_ctrl_c_keeps_the_pictures_that_are_finished(
    model: str, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = Pipeline.__call__

    def interrupted(self: Pipeline, prompts: list[str], **call: object) -> object:
        if prompts == ["blue"]:
            raise KeyboardInterrupt
        return draw(self, prompts, **call)

    monkeypatch.setattr(Pipeline, "__call__", interrupted)
    assert sample.main(["red", "blue", "white", "batch_size=1", "steps=1", model, f"out={out}"]) == 130
    assert [file.name for file in out.iterdir()] == ["0000.png"]
    assert f"stopped: 1 of 3 pictures are in {out}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "there is no prompt"),
        (["seed=3"], "there is no prompt"),
        (["red", "stpes=20"], "looks like steps=20"),
        (["red", "sampler=magic"], "sampler=magic was given, but sampler must be one of ddpm, ddim"),
        (["red", "spacing=even"], "spacing must be one of trailing"),
        (["from=x.png", "n=2"], "leave out n="),
        (["red", "strength=0.5"], "strength= needs a picture to start from: give init="),
        (["red", "init=x.png", "strength=0"], "strength must be a number above 0 and at most 1"),
        (["from=x.png", "prompts_file=x.txt"], "leave out prompts_file="),
        (["from=x.png", "red", "blue"], "give at most one prompt"),
        (["red", "preview=terminal"], "which is no terminal here"),
    ],
)
def test_a_wrong_command_line_exits_with_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error(capsys, 2, *argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["red", "model=nowhere"], "there is no model nowhere"),
        (["red", "size=5x16"], "multiples of 2"),
        (["red", "steps=1001"], "steps is 1001, but must lie between 1 and 1000"),
        (["red", "device=gpu"], "device is 'gpu', but must be auto"),
        (["red", "spacing=leading"], "use spacing=trailing"),
        (["prompts_file=x.xlsx"], "is none of the kinds that can be read: .txt, .csv, .jsonl"),
        (["prompts_file=nowhere.txt"], "there is no prompts_file nowhere.txt"),
        (["red", "init=nowhere.png"], "nowhere.png: No such file or directory"),
        (["red", "init=README.md"], "README.md cannot be read as a picture"),
        (["from=nowhere.png"], "nowhere.png: No such file or directory"),
    ],
)
def test_work_that_cannot_be_done_exits_with_1(
    argv: list[str], message: str, model: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {arg.partition("=")[0] for arg in argv}
    assert message in error(capsys, 1, *argv, *[model] * ("model" not in given), f"out={out}")
    assert not out.exists()


@pytest.mark.parametrize(
    "metadata",
    [{"grid": 2}, {"batch": {"prompts": ["a"], "seeds": [0], "position": 3}}, {"batch": {"position": None}}],
)
def test_a_picture_without_all_settings_is_refused(
    metadata: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_png(Image.new("RGB", (4, 4)), tmp_path / "x.png", metadata)
    assert "does not hold all settings" in error(capsys, 1, f"from={tmp_path / 'x.png'}")


def test_the_script_runs_and_brings_in_no_training_libraries(model: str, out: Path) -> None:
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
