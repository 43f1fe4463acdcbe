"""Formats the metrics of a run as a table for the terminal."""

from ldm.progress import clock


def table(metrics: dict[str, float], generated: int, real: int, files: str) -> str:
    """Returns the last lines that a run prints: one measurement per line, in aligned columns."""
    rows = [
        (name.replace("accuracy_", "  "), f"{value:.1%}") for name, value in metrics.items() if name.startswith("acc")
    ]
    if "fid" in metrics:
        rows.append(("FID", f"{metrics['fid']:.4g} ({generated} generated, {real} real images)"))
    if "training_seconds" in metrics:
        speed = f"{metrics['images_per_second']:.4g} images/s"
        rows.append(("training", f"{clock(metrics['training_seconds'])} at {speed}"))
    rows.append(("sampling", f"{clock(metrics['sampling_seconds'])} for {generated} images"))
    rows.append(("files", files))
    return "\n".join(f"{name:<14}{value}" for name, value in rows)
