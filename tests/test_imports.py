import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import ldm
from ldm.pipeline import Pipeline

ROOT = Path(__file__).parents[1]
COMMANDS = "commands"

# What each part of ldm may import of the others; commands and the scripts at the root may import anything.
MAY_IMPORT = {
    "files": set(),
    "random": set(),
    "progress": set(),
    "profiles": set(),
    "processor": set(),
    "nn": {"processor"},
    "diffusion": set(),
    "image": {"files"},
    "sampling": {"diffusion", "random"},
    "lint": {"diffusion", "sampling"},
    "data": {"image", "files", "random", "progress"},
    "weights": {"nn", "files", "image"},
    "metrics": {"nn", "weights", "image", "data.shapes", "diffusion", "random", "files"},
    "items": {"image"},
    "remarks": {"items", "nn"},
    "editing": {"diffusion", "image", "items"},
    "settings": {"items"},
    "noise": {"items", "random", "sampling"},
    "memory": set(),
    "compiling": {"diffusion", "memory", "nn"},
    "packing": {"processor"},
    "conditioning": {"diffusion", "editing", "items", "nn", "sampling", "settings"},
    "preview": {"image", "files", "progress"},
    "pipeline": {
        "nn",
        "diffusion",
        "sampling",
        "lint",
        "weights",
        "image",
        "random",
        "items",
        "remarks",
        "editing",
        "settings",
        "memory",
        "noise",
        "compiling",
        "packing",
        "processor",
        "conditioning",
    },
    "sharding": {"nn"},
    "training": {"diffusion", "nn", "weights", "image", "random", "sharding"},
    "callbacks": {
        "pipeline",
        "sharding",
        "settings",
        "metrics",
        "weights",
        "nn",
        "diffusion",
        "data.shapes",
        "image",
        "files",
        "progress",
        "profiles",
    },
    "report": {"metrics.provenance", "image", "files"},
    "evaluation": {"metrics", "pipeline", "settings", "files"},
    "inside": {"pipeline", "nn", "diffusion", "sampling", "image", "items", "editing"},
    "cost": {"nn"},
    "plan": {"cost", "nn", "weights"},
    "config": {
        "files",
        "commands.edge",
        "report",
        "processor",
        "training.consistency",
        "training.trainer",
    },
    "overrides": {"training.reading", "training.trainer"},
    "app": {COMMANDS, "pipeline", "settings", "sampling", "weights", "image", "items", "editing"},
    "__main__": {COMMANDS},
}
# Who alone may import a library: files, or folders with a slash at the end.
ONLY_IN = {
    "hydra": ("ldm/config.py", "ldm/overrides.py", "ldm/commands/", "train.py", "sample.py", "tests/", "experiments/"),
    "omegaconf": ("ldm/config.py", "ldm/overrides.py", "ldm/commands/", "train.py", "sample.py", "tests/"),
    "diffusers": ("tests/parity/", "experiments/"),
    "gradio": ("ldm/app/", "tests/app/"),
}


def sources() -> list[Path]:
    folders = [ROOT / name for name in ("ldm", "tests", "experiments")]
    return sorted([*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))])


def imported(source: str) -> set[str]:
    """Every module that the source imports, anywhere in it, `from a import b` giving both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that they can be found"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def parts() -> list[str]:
    found = {path.relative_to(ROOT / "ldm").parts[0].removesuffix(".py") for path in (ROOT / "ldm").rglob("*.py")}
    return sorted(found - {"__init__", COMMANDS})


def files_of(part: str) -> list[Path]:
    return [path for path in (ROOT / "ldm" / part, ROOT / "ldm" / f"{part}.py") for path in (path, *path.rglob("*.py"))]


def refused(part: str, names: set[str]) -> set[str]:
    """The modules of ldm among `names` that a part may not import."""
    allowed = {part} | MAY_IMPORT[part]
    ours = {name.removeprefix("ldm.") for name in names if name.startswith("ldm.")}
    ours = {name for name in ours if "." in name or (ROOT / "ldm" / f"{name}.py").exists()}
    return {name for name in ours if not any(f"{name}.".startswith(f"{one}.") for one in allowed)}


@pytest.mark.parametrize("part", parts())
def test_a_part_imports_only_what_the_design_lets_it(part):
    files = [path for path in files_of(part) if path.is_file()]
    assert files
    for path in files:
        assert not refused(part, imported(path.read_text())), path


def test_what_the_design_allows_has_no_circles():
    below = {part: {name.split(".")[0] for name in names} for part, names in MAY_IMPORT.items()}
    assert set(TopologicalSorter(below).static_order()) >= below.keys()  # which raises CycleError


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_stays_where_it_belongs(library):
    for path in sources():
        name = path.relative_to(ROOT).as_posix()
        allowed = any(name == one or (one.endswith("/") and name.startswith(one)) for one in ONLY_IN[library])
        assert allowed or library not in {module.split(".")[0] for module in imported(path.read_text())}, name


@pytest.mark.parametrize(
    "part, source",
    [
        ("diffusion", "from ldm.nn.unet import UNet"),
        ("nn", "def f():\n    import ldm.weights.native"),
        ("metrics", "from ldm.data import order"),
        ("files", "from ldm import image"),
        ("weights", "from ldm.pipeline import Pipeline"),
    ],
)
def test_an_import_against_the_design_is_seen(part, source):
    assert refused(part, imported(source))


def test_the_pipeline_is_at_the_top_and_nothing_else() -> None:
    assert ldm.Pipeline is Pipeline
    with pytest.raises(AttributeError, match="'ldm' has no attribute 'Pipelin'"):
        ldm.Pipelin  # noqa: B018
