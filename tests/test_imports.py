"""Checks which package of ldm may import which, that imports have no cycle, and where libraries are used."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import ldm
from ldm.pipeline.pipeline import Pipeline

ROOT = Path(__file__).parents[1]
EVERYWHERE = {"conditioning", "device", "errors", "files", "image", "ownership", "progress", "random"}
# The packages that each package may import; every one of them may also import the modules in EVERYWHERE.
MAY_IMPORT: dict[str, set[str]] = {
    "diffusion": set(),
    "kernels": set(),
    "nn": {"kernels"},
    "adapters": {"nn"},
    "sampling": {"diffusion"},
    "execution": {"nn", "diffusion", "kernels"},
    "weights": {"nn", "adapters"},
    "data": set(),
    "metadata": {"data"},
    "synonyms": {"weights"},
    "pipeline": {"nn", "diffusion", "sampling", "weights", "execution", "synonyms"},
    "metrics": {"nn", "diffusion", "weights", "data"},
    "ema": {"weights"},
    "training": {"nn", "diffusion", "adapters", "weights", "execution"},
    "callbacks": {"nn", "adapters", "diffusion", "weights", "execution", "ema", "data", "pipeline", "metrics"},
    "report": {"metrics"},
    "evaluation": {"weights", "data", "pipeline", "metrics", "ema", "report"},
    "drawing": {"pipeline", "weights"},
    "inside": {"nn", "diffusion", "sampling", "pipeline"},
    "planning": {"nn", "adapters", "weights"},
    "app": {"data", "drawing", "pipeline", "sampling", "synonyms", "weights"},
}
# The modules in EVERYWHERE that each of them may import.
MAY_IMPORT |= {name: set() for name in EVERYWHERE}
MAY_IMPORT |= {
    "random": {"kernels"},
    "image": {"files"},
    "ownership": {"files"},
    "errors": {"progress"},
    "device": {"errors"},
}
TOP = {"commands", "__main__", "__init__"}  # these may import anything
# The only files, and folders (ending in a slash), that may import a library.
ONLY_IN = {
    "hydra": ("ldm/commands/", "train.py", "tests/", "experiments/"),
    "omegaconf": ("ldm/commands/", "train.py", "tests/"),
    "diffusers": ("tests/parity/", "experiments/"),
    "peft": ("tests/parity/",),
    "triton": ("ldm/kernels/", "tests/kernels/"),
    "gradio": ("ldm/app/", "tests/app/"),
}

Graph = dict[str, set[str]]


def sources() -> list[Path]:
    folders = [ROOT / name for name in ("ldm", "tests", "experiments")]
    return sorted([*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))])


def imported(source: str) -> Iterator[str]:
    """Yields every module that the source imports, at any level; `from a import b` yields both a and a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not allowed, because this test cannot resolve them"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules() -> dict[str, Path]:
    """Returns the file of every module of the package, by dotted name."""
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "ldm").rglob("*.py")}


def graph() -> Graph:
    """Returns, for every module of the package (commands and app included), the modules that it imports."""
    known = modules()
    return {name: {other for other in imported(path.read_text()) if other in known} for name, path in known.items()}


def package(module: str) -> str:
    return module.split(".")[1]


def packages(graph: Graph) -> Graph:
    found: Graph = {}
    for name, others in graph.items():
        found.setdefault(package(name), set()).update(package(other) for other in others)
    return {name: others - {name} for name, others in found.items()}


def refused(importer: str, others: set[str]) -> set[str]:
    """Returns the packages among `others` that `importer` may not import."""
    if importer in TOP:
        return set()
    return others - MAY_IMPORT[importer] - (set() if importer in EVERYWHERE else EVERYWHERE)


def test_each_package_imports_only_what_the_design_allows() -> None:
    found = packages(graph())
    assert {name: refused(name, others) for name, others in found.items() if refused(name, others)} == {}


def test_the_design_covers_every_package_and_allows_no_unused_import() -> None:
    found = packages(graph())
    assert found.keys() - TOP == MAY_IMPORT.keys()
    assert {name: allowed - found[name] for name, allowed in MAY_IMPORT.items() if allowed - found[name]} == {}


@pytest.mark.parametrize("level", ["modules", "packages"])
def test_imports_have_no_cycle(level: str) -> None:
    found = graph() if level == "modules" else packages(graph())
    assert set(TopologicalSorter(found).static_order()) >= found.keys()  # raises CycleError


def test_a_cycle_would_be_detected() -> None:
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


def test_the_root_of_the_package_has_at_most_eight_modules() -> None:
    assert {path.stem for path in (ROOT / "ldm").glob("*.py")} - {"__init__", "__main__"} == EVERYWHERE
    assert len(EVERYWHERE) <= 8


def test_only_networks_and_their_tables_name_a_denoising_network_class() -> None:
    """Only the networks, the table of kinds and the inspection of one kind may import UNet or DiT."""
    allowed = ("ldm.nn", "ldm.weights.kinds", "ldm.inside")
    names = {
        name: set(imported(path.read_text())) & {"ldm.nn.unet.UNet", "ldm.nn.dit.DiT"}
        for name, path in modules().items()
        if not name.startswith(allowed)
    }
    assert {name: found for name, found in names.items() if found} == {}


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_imported_only_where_it_belongs(library: str) -> None:
    for path in sources():
        name = path.relative_to(ROOT).as_posix()
        allowed = any(name == place or (place.endswith("/") and name.startswith(place)) for place in ONLY_IN[library])
        assert allowed or library not in {module.split(".")[0] for module in imported(path.read_text())}, name


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("diffusion", "from ldm.nn.unet import UNet"),
        ("nn", "def f():\n    import ldm.weights.native"),
        ("metrics", "from ldm.pipeline import inputs"),
        ("files", "from ldm import image"),
        ("weights", "from ldm.pipeline.pipeline import Pipeline"),
    ],
)
def test_an_import_against_the_design_is_detected(importer: str, source: str) -> None:
    assert refused(importer, {package(name) for name in imported(source) if name.count(".")})


def test_only_the_pipeline_is_importable_from_the_top_level() -> None:
    assert ldm.Pipeline is Pipeline
    with pytest.raises(AttributeError, match="'ldm' has no attribute 'Pipelin'"):
        ldm.Pipelin  # noqa: B018
