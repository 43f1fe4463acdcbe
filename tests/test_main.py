from pathlib import Path

import pytest

from ldm.__main__ import COMMANDS, main
from tests.tiny import save_tiny_model


def test_a_command_runs_and_exits_with_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(save_tiny_model(tmp_path))]) == 0
    assert "prediction" in capsys.readouterr().out


def test_a_failure_prints_one_sentence_and_exits_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "nowhere"]) == 1
    output = capsys.readouterr().err
    assert output.startswith("error: there is no model nowhere") and output.count("\n") == 1


def test_debug_prints_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "nowhere", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["info"], ["info", "a", "b"]])
def test_an_invalid_command_line_exits_with_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0 and f"usage: ldm {name}" in capsys.readouterr().out


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    output = capsys.readouterr().out
    assert all(f"\n  {name} " in output for name in COMMANDS)


def test_a_misspelt_option_is_refused_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["info", "shapes", "--debgu"])
    assert "unrecognized argument --debgu; did you mean --debug?" in capsys.readouterr().err
