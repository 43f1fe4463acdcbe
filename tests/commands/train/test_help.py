import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ldm.commands.train.help import asks_for_help, help_text
from ldm.commands.train.options import first_sentence, list_options
from ldm.commands.train.overrides import check_overrides

CONF = Path(__file__).parents[3] / "conf"
KEYS = re.findall(r"^  ([\w.]+)= +(.*)$", help_text([]), re.MULTILINE)


def test_the_help_describes_fifteen_keys_with_the_values_of_the_default_run() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train")
    assert len(KEYS) == 15
    for key, text in KEYS:
        known = {"experiment": "shapes", "run_dir": "runs/EXPERIMENT/DATE_TIME", "precision": "auto"}
        if (value := re.search(r"\(([^()]*)\)$", text)) and key not in known:
            shown = OmegaConf.select(config, key)
            expected = "null" if shown is None else str(shown).replace(" ", "")
            assert value[1] == expected, key


@pytest.mark.slow
def test_the_examples_of_the_help_are_valid_command_lines() -> None:
    examples = re.findall(r"^  python train\.py (.*?)(?: {3,}.*)?$", help_text([]), re.MULTILINE)
    assert len(examples) > 6
    for example in examples:
        if not example.endswith("=?"):
            check_overrides(shlex.split(example), CONF)


def test_help_is_asked_for_by_itself_or_among_other_arguments() -> None:
    assert asks_for_help(["--help"]) and asks_for_help(["-m", "seed=1", "-h"])
    assert not asks_for_help(["--help-all"]) and not asks_for_help(["seed=1"])


def test_the_help_is_printed_without_importing_hydra_or_torch() -> None:
    code = (
        "import sys, runpy; sys.argv = ['train.py', '--help']\ntry: runpy.run_path('train.py', run_name='__main__')\n"
    )
    code += "finally: print(sorted({'hydra', 'torch', 'lightning', 'omegaconf'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=CONF.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("usage: python train.py")
    assert done.stdout.endswith("[]\n")


def test_every_option_of_every_group_has_a_line_of_its_own() -> None:
    groups = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())
    lines = list(list_options([f"{group}=?" for group in groups], CONF))
    assert [line for line in lines if line[0] != " "] == [f"{group}:" for group in groups]
    options = [path.stem for group in groups for path in sorted((CONF / group).glob("*.yaml")) if path.stem[0] != "_"]
    listed = [line.split() for line in lines if line[0] == " "]
    assert [words[0] for words in listed] == options and all(len(words) > 2 for words in listed)


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "code", "text"), [("sampler=?", 0, "\n  ddim "), ("smapler=?", 2, "")])
def test_asking_for_the_options_of_a_group_exits_with_0(asked: str, code: int, text: str) -> None:
    command = [sys.executable, "train.py", "--learning_rate", "1e-3", asked]
    done = subprocess.run(command, cwd=CONF.parent, capture_output=True, text=True, check=False)
    assert done.returncode == code and text in done.stdout


@pytest.mark.slow
def test_the_full_help_has_the_options_of_all_groups_and_the_keys_of_these_arguments() -> None:
    command = [sys.executable, "train.py", "--help-all", "--learning_rate", "1e-3", "schedule=cosine"]
    done = subprocess.run(command, cwd=CONF.parent, capture_output=True, text=True, check=True)
    options, keys = done.stdout.split("\n\nkeys, with their values:\n\n")
    assert "\n  ddim " in options and "_shapes" not in options
    config = OmegaConf.create(keys)
    assert (config.optimizer.lr, config.schedule._target_) == (1e-3, "ldm.diffusion.schedule.cosine")


def test_options_of_a_folder_of_the_user_are_listed(tmp_path: Path) -> None:
    (tmp_path / "schedule").mkdir()
    (tmp_path / "schedule" / "mine.yaml").write_text("# Mine (Me et al. 2026). More.\n_target_: x\n")
    lines = list(list_options(["schedule=?", "--config-dir", str(tmp_path)], CONF))
    assert any(line.split() == ["mine", "Mine", "(Me", "et", "al.", "2026)"] for line in lines)


def test_a_key_that_is_not_a_group_has_no_options() -> None:
    with pytest.raises(ValueError, match=r"trainer.max_steps is not a group of options: the groups are adapter, "):
        list(list_options(["trainer.max_steps=?"], CONF))


def test_the_first_sentence_ends_before_details() -> None:
    assert (
        first_sentence("# @package _global_\n# Trains it at 2.1 px\n# twice. And more.") == "Trains it at 2.1 px twice"
    )
