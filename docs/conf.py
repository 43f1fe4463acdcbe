"""Sphinx configuration: `sphinx-build -W docs OUT` builds the documentation without network access."""

import re
import shutil
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

HERE = Path(__file__).parent
CONF = HERE.parent / "conf"
GENERATED = HERE / "generated"

project = "ldm"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]
exclude_patterns = ["build"]
html_theme = "furo"
html_title = "ldm"
html_static_path = ["static"]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
html_show_copyright = False
smartquotes = False
html_css_files = ["wide.css"]
add_module_names = False

# The modules of the Python API, by topic.
API = {
    "Generating images": ["ldm.pipeline.pipeline", "ldm.pipeline.result", "ldm.pipeline.settings", "ldm.image"],
    "Diffusion": [
        *("ldm.diffusion.schedule", "ldm.diffusion.prediction", "ldm.diffusion.weighting"),
        *("ldm.diffusion.time_sampling", "ldm.diffusion.denoiser", "ldm.diffusion.loss", "ldm.diffusion.guidance"),
    ],
    "Sampling": [f"ldm.sampling.{path.stem}" for path in sorted((HERE.parent / "ldm/sampling").glob("[a-z]*.py"))],
    "Networks": ["ldm.nn.unet", "ldm.nn.dit", "ldm.nn.vae", "ldm.nn.clip", "ldm.nn.text_encoder", "ldm.nn.tokenizer"],
    "Adapters": [f"ldm.adapters.{path.stem}" for path in sorted((HERE.parent / "ldm/adapters").glob("[a-z]*.py"))],
    "Weights": [f"ldm.weights.{name}" for name in ("model", "recognise", "convert", "formats", "native")],
    "Metrics": [f"ldm.metrics.{path.stem}" for path in sorted((HERE.parent / "ldm/metrics").glob("[a-z]*.py"))],
    "Looking inside": [f"ldm.inside.{path.stem}" for path in sorted((HERE.parent / "ldm/inside").glob("[a-z]*.py"))],
}


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", lambda app: generate())
    app.connect("autodoc-process-docstring", plain_text)


def generate() -> None:
    """Writes the pages of the configuration and of the Python API."""
    shutil.rmtree(GENERATED, ignore_errors=True)
    GENERATED.mkdir()
    groups = [folder for folder in sorted(CONF.iterdir()) if folder.is_dir()]
    for group in groups:
        (GENERATED / f"{group.name}.md").write_text(group_page(group))
    names = "\n".join(group.name for group in groups)
    table = "\n".join(
        f"| [`{group.name}`]({group.name}.md) | {', '.join(map(code, options_of(group)))} |" for group in groups
    )
    root = "```{literalinclude} ../../conf/train.yaml\n:language: yaml\n```"
    (GENERATED / "configuration.md").write_text(
        "# Configuration\n\nEvery file of `conf/`. A run is composed of one option of each group; "
        "`python train.py GROUP=OPTION KEY=VALUE` changes them, and `python train.py --help` explains how.\n\n"
        f"| group | options |\n|---|---|\n{table}\n\n## train.yaml\n\n{root}\n\n"
        f"```{{toctree}}\n:hidden:\n\n{names}\n```\n"
    )
    for topic, modules in API.items():
        parts = [f"{topic}\n{'=' * len(topic)}"]
        for module in modules:
            members = "   :members:\n   :special-members: __call__"
            parts.append(f"{module}\n{'-' * len(module)}\n\n.. automodule:: {module}\n{members}")
        (GENERATED / f"api_{slug(topic)}.rst").write_text("\n\n".join(parts) + "\n")


def options_of(group: Path) -> list[str]:
    return [path.stem for path in sorted(group.glob("[!_]*.yaml"))]


def group_page(group: Path) -> str:
    parts = [f"# {group.name}"]
    for name in options_of(group):
        comment, settings = divided((group / f"{name}.yaml").read_text())
        parts.append(f"## {group.name}={name}\n\n{comment}")
        if settings:
            parts.append(f"```yaml\n{settings}\n```")
    return "\n\n".join(parts) + "\n"


def divided(config: str) -> tuple[str, str]:
    """Divides a config file into the comment at its top, as text with its own line breaks, and its settings."""
    lines = [line for line in config.splitlines() if line != "# @package _global_"]
    length = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    comment = "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:length])
    comment = re.sub(r"\n(?=[A-Z]\w+: )", "  \n", comment)  # a line break before "Command:", "Time:" and so on
    return comment, "\n".join(lines[length:]).strip()


def plain_text(_app: Sphinx, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Converts a docstring of plain text with `code` to reStructuredText."""
    for number, line in enumerate(lines):
        parts = re.split(r"(`[^`]+`)", line)
        lines[number] = "".join(f"`{part}`" if part.startswith("`") else escaped(part) for part in parts)


def escaped(text: str) -> str:
    return re.sub(r"([*|\\]|\w_\b)", lambda found: f"{found[0][:-1]}\\{found[0][-1]}", text)


def code(name: str) -> str:
    return f"`{name}`"


def slug(title: str) -> str:
    return title.lower().replace(" ", "_")
