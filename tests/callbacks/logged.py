"""A logger that stores the values that it receives."""

from argparse import Namespace
from typing import Any

from lightning.pytorch.loggers import Logger


class Logged(Logger):
    """Stores the logged values by step."""

    name, version = "logged", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.rows.setdefault(step, {}).update(metrics)

    def curve(self, name: str) -> dict[int, float]:
        return {step: row[name] for step, row in self.rows.items() if name in row}
