"""Formats the metrics of a run as a table for the terminal."""

from collections.abc import Mapping

from ldm.progress import clock


def table(metrics: dict[str, float], generated: int, real: int, files: str, warnings: Mapping[str, str]) -> str:
    """Returns the last lines that a run prints: one measurement per line, in aligned columns.

    `warnings` are those of single metrics, and are printed beside their values.
    """
    notes = {name: f" (warning: {text})" for name, text in warnings.items() if not name.startswith("accuracy_")}
    rows = [
        (name.replace("accuracy_", "  "), f"{value:.1%}{notes.get(name, '')}")
        for name, value in metrics.items()
        if name.startswith("acc")
    ]
    if "fid" in metrics:
        rows.append(("FID", f"{metrics['fid']:.4g} ({generated} generated, {real} real images){notes.get('fid', '')}"))
    if "training_seconds" in metrics:
        speed = f"{metrics['images_per_second']:.4g} images/s"
        rows.append(("training", f"{clock(metrics['training_seconds'])} at {speed}"))
    rows.append(("sampling", f"{clock(metrics['sampling_seconds'])} for {generated} images"))
    rows.append(("files", files))
    return "\n".join(f"{name:<14}{value}" for name, value in rows)
