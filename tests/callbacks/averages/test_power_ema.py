from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.__main__ import main
from ldm.callbacks.averages.power_ema import PowerEMA
from ldm.callbacks.checkpointing.checkpoint import Checkpoint
from ldm.weights.native import load_network
from tests.tiny import save_part, tiny_vae
from tests.training.tiny import diffusion, fit

LENGTHS = [0.05, 0.10]
WANTED = [0.04, 0.07, 0.13, 0.2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PowerEMA]:
    """A run with snapshots of two lengths, and averages of other lengths tracked directly."""
    folder = tmp_path_factory.mktemp("run")
    direct = PowerEMA(folder / "direct", WANTED, 1000, "float32")
    callbacks = [PowerEMA(folder / "ema", LENGTHS, 3), Both(direct)]
    fit(folder, diffusion(), 120, callbacks=callbacks, limit_val_batches=0)  # validation could swap in only one of them
    return folder, direct


class Both(PowerEMA):
    """A second PowerEMA with its own state key, which Lightning requires."""

    def __init__(self, ema: PowerEMA) -> None:
        self.__dict__ = ema.__dict__

    @property
    def state_key(self) -> str:
        return "another"


def flat(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([state[name].flatten().double() for name in sorted(state)])


@pytest.mark.slow
def test_reconstructed_averages_equal_those_tracked_during_training(
    run: tuple[Path, PowerEMA], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, direct = run
    assert main(["ema", str(folder), "--length", ",".join(map(str, WANTED))]) == 0
    assert capsys.readouterr().out.count("error of the average") == len(WANTED)
    for length, track in zip(WANTED, direct.tracks, strict=True):
        reconstructed = flat(load_network(folder / f"ema_{length:.3f}.safetensors", "unet").state_dict())
        assert (reconstructed - flat(track)).norm() / flat(track).norm() < 1e-3, length


@pytest.mark.slow
def test_averages_of_an_earlier_step_use_the_snapshots_up_to_it(run: tuple[Path, PowerEMA]) -> None:
    folder = run[0]
    assert main(["ema", str(folder), "--length", "0.05", "--step", "60", "--out", str(folder / "out")]) == 0
    reconstructed = load_network(folder / "out" / "ema_0.050.safetensors", "unet").state_dict()
    snapshot = load_network(folder / "ema" / "step_00000060_length_0.050.safetensors", "unet").state_dict()
    torch.testing.assert_close(reconstructed, snapshot)


def test_ldm_ema_overwrites_only_files_that_it_wrote(
    run: tuple[Path, PowerEMA], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["ema", str(run[0]), "--length", "0.06,0.07", "--out", str(tmp_path)]
    assert main(command) == 0 and main([*command, "--step", "90"]) == 0
    save_part(tmp_path / "vae.safetensors", "vae", tiny_vae())
    for data in (b"theirs", (tmp_path / "vae.safetensors").read_bytes()):
        (tmp_path / "ema_0.070.safetensors").write_bytes(data)
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        assert main(command) == 1
        assert "ema_0.070.safetensors was not written by ldm ema" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--length", "0.3"], 2, "is 0.3, but must be a fraction of training between 0 and 0.288"),
        (["--length", "a"], 2, "--length a"),
        (["--length", "0.1", "--step", "500"], 2, "to 120, where"),
        (["--length", "0.1", "--step", "2"], 2, "--step 2 has no average: give a step from "),
    ],
)
def test_averages_that_cannot_be_reconstructed_are_refused(
    run: tuple[Path, PowerEMA], arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ema", str(run[0]), *arguments]) == code
    assert message in capsys.readouterr().err


def test_a_run_without_snapshots_is_refused_with_the_setting_that_saves_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ema", str(tmp_path), "--length", "0.1"]) == 1
    assert "train with ema=power" in capsys.readouterr().err


@pytest.mark.slow
def test_resuming_restores_averages_and_snapshots_bit_for_bit(tmp_path: Path) -> None:
    def train(folder: Path, steps: int, resume: Path | None = None) -> PowerEMA:
        ema = PowerEMA(folder / "ema", LENGTHS, 4)
        fit(folder, diffusion(), steps, resume, callbacks=[ema, Checkpoint(folder)], enable_checkpointing=True)
        return ema

    straight = train(tmp_path / "a", 8)
    train(tmp_path / "b", 6)
    resumed = train(tmp_path / "b", 8, tmp_path / "b" / "last.ckpt")
    for expected, track in zip(straight.tracks, resumed.tracks, strict=True):
        assert torch.equal(flat(track), flat(expected))
    for file in (tmp_path / "a" / "ema").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / "ema" / file.name).read_bytes()


def test_averages_of_other_lengths_than_in_the_checkpoint_are_refused(tmp_path: Path) -> None:
    trainer = fit(tmp_path, diffusion(), 1, callbacks=[PowerEMA(tmp_path, LENGTHS)], limit_val_batches=0)
    trainer.save_checkpoint(tmp_path / "1.ckpt")
    message = r"ema\.lengths is \[0\.1, 0\.05\], but the checkpoint's averages have the lengths \[0\.05, 0\.1\]"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, diffusion(), 2, tmp_path / "1.ckpt", callbacks=[PowerEMA(tmp_path, LENGTHS[::-1])])
