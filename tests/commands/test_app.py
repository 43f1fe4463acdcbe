import socket
import sys
from pathlib import Path

import pytest

from ldm.__main__ import main
from ldm.commands import app


def test_without_gradio_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(app, "find_spec", lambda name: None)
    assert main(["app"]) == 2
    assert "pip install -e '.[app]'" in capsys.readouterr().err


def test_a_models_folder_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("gradio")
    assert main(["app", "--models", str(tmp_path / "nowhere")]) == 1
    assert "is no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "code", "told"),
    [
        (["--port", "70000"], 2, "--port 70000: expected 1 to 65535"),
        (["--device", "gpu"], 1, "device is 'gpu', but must be auto, cpu, cuda or cuda:N"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(
    wrong: list[str], code: int, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("gradio")
    assert main(["app", "--out", str(tmp_path), *wrong]) == code
    assert told in capsys.readouterr().err


def test_a_port_that_is_taken_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["app", "--port", port, "--out", str(tmp_path)]) == 1
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith(f"error: 127.0.0.1 port {port} cannot be served, most likely as it is taken; give another --port")
    )


def test_its_help_needs_no_gradio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match="0"):
        main(["app", "--help"])
    told = capsys.readouterr().out
    assert "--models" in told and "127.0.0.1" in told
