import socket
import sys
from pathlib import Path

import pytest

from ldm.__main__ import main
from ldm.commands.app import command


def test_without_gradio_the_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert main(["app"]) == 2
    assert "pip install -e '.[app]'" in capsys.readouterr().err


def test_a_missing_models_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("gradio")
    assert main(["app", "--models", str(tmp_path / "nowhere")]) == 1
    assert "is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--port", "70000"], 2, "--port 70000: expected 1 to 65535"),
        (["--device", "gpu"], 2, "device is 'gpu', but must be auto, cpu, cuda or cuda:N"),
    ],
)
def test_invalid_arguments_are_refused_before_serving(
    arguments: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("gradio")
    assert main(["app", "--out", str(tmp_path), *arguments]) == code
    assert message in capsys.readouterr().err


def test_a_port_in_use_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("gradio")
    with socket.socket() as occupied:
        occupied.bind(("127.0.0.1", 0))
        occupied.listen()
        port = str(occupied.getsockname()[1])
        assert main(["app", "--port", port, "--out", str(tmp_path)]) == 1
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith(f"error: cannot serve on 127.0.0.1 port {port}, which is probably in use; give another --port")
    )


def test_help_works_without_gradio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match="0"):
        main(["app", "--help"])
    help_text = capsys.readouterr().out
    assert "--models" in help_text and "127.0.0.1" in help_text
