import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from ldm.__main__ import COMMANDS, main
from tests.tiny import save_tiny_model

HEAVY = {"torch", "lightning", "transformers", "torchmetrics", "matplotlib", "gradio"}  # libraries that take seconds
IMPORTED = f"""
import sys
from ldm.__main__ import main
try:
    main(sys.argv[1:])
finally:
    print(sorted({HEAVY} & set(sys.modules)))
"""


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


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("--no-such-option", 2)])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_usage_errors_do_not_import_heavy_libraries(name: str, argument: str, code: int) -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTED, name, argument], capture_output=True, text=True, check=False)
    assert done.returncode == code and f"usage: ldm {name}" in done.stdout + done.stderr
    assert done.stdout.endswith("[]\n")


def test_ctrl_c_while_a_command_is_imported_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(module: str) -> ModuleType:
        if module == "ldm.commands.info.command":
            raise KeyboardInterrupt
        return import_module(module)

    monkeypatch.setattr("ldm.__main__.import_module", interrupted)
    assert main(["info", "nowhere"]) == 130


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    output = capsys.readouterr().out
    assert all(f"\n  {name} " in output for name in COMMANDS)


def test_a_misspelt_command_is_refused_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evalute"])
    assert "there is no command evalute; did you mean evaluate?" in capsys.readouterr().err


def test_an_option_of_diffusers_is_refused_with_ours(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "shapes", "--data", "shapes", "--out", "x.json", "--num_inference_steps", "3"])
    assert "unrecognized argument --num_inference_steps; did you mean --steps?" in capsys.readouterr().err


def test_a_misspelt_option_is_refused_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["info", "shapes", "--debgu"])
    assert "unrecognized argument --debgu; did you mean --debug?" in capsys.readouterr().err
