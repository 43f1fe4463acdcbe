"""Translates options of other training scripts, and `--key value`, to the `key=value` of train.py."""

from difflib import get_close_matches

from ldm.synonyms.sampling import as_words, sampler_settings
from ldm.synonyms.table import TRAINING, Instead

# Options of Hydra, which its parser also takes abbreviated, except the last one, because `experiment` is a group.
HYDRA = (
    *("help", "hydra-help", "version", "resolve", "run", "multirun", "shell-completion"),
    *("cfg", "package", "info", "config-path", "config-name", "config-dir"),
)
RERUN = "--experimental-rerun"


def translate(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Returns the arguments in the syntax of train.py, and a note for each that was translated.

    Raises ValueError for options of other scripts that have no counterpart of the same meaning.
    """
    translated, notes = [], []
    waiting = list(arguments)
    while waiting:
        given = waiting.pop(0)
        name, equals, value = given.partition("=")
        if given.startswith("--") and name != RERUN and not any(option.startswith(name[2:]) for option in HYDRA):
            name = name[2:].replace("-", "_")
            if name not in TRAINING and (close := get_close_matches(name, HYDRA, n=1, cutoff=0.75)):
                raise ValueError(f"there is no option {given}: did you mean --{close[0]}?")
            if not equals and waiting and not waiting[0].startswith("--"):
                value = waiting.pop(0)
                given = f"{given} {value}"
            elif not equals:
                value = "true"
            words = _words(name, value) or [f"{name}={value}"]
        else:
            words = (_words(name, value) if equals else None) or [given]
        translated += words
        if words != [given]:
            notes.append(f"{given} is taken as {' '.join(words)}")
    return translated, notes


def _words(name: str, value: str) -> list[str] | None:
    """Returns what to write for an option of another script, or for a sampler of another program; None for others."""
    if name == "sampler":
        return _sampler(value)
    found = TRAINING.get(name)
    if isinstance(found, Instead):
        raise ValueError(f"{name} is not a setting: give {found}")
    if isinstance(found, dict):
        if value not in found:
            raise ValueError(f"{name}={value} has no counterpart: give one of {', '.join(found.values())}")
        return found[value].split()
    if found is not None and found.count("{}") > 1 and not value.isdecimal():
        raise ValueError(f"{name}={value} is not an integer: give {found.format('NUMBER', 'NUMBER')}")
    return None if found is None else [word.format(value, value) for word in found.split()]


def _sampler(value: str) -> list[str] | None:
    settings = sampler_settings(value.strip("'\""))
    if "sampler" not in settings or settings["sampler"] == value:
        return None
    words = [f"sampler={settings['sampler']}"]
    words += [f"sampler.spacing={settings['spacing']}"] if "spacing" in settings else []
    options = settings.get("sampler_options", {})
    return words + [f"sampler.options.{as_words({name: option})}" for name, option in options.items()]
