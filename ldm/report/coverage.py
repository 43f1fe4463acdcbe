"""Describes which randomness the intervals of a comparison cover: training seeds or evaluation noise."""

from collections.abc import Sequence

from ldm.report.groups import Group

TRAINING = (
    "± is half the 95 % interval over the seeds of training. They are evaluated with the same prompts, noise and "
    "reference images, so it does not cover what others of these would change."
)
NOISE = (
    "± is half the 95 % interval over the noise seeds of the evaluation of one trained model. It does not cover the "
    "seeds of training, which may change more."
)
BOTH = "± is half the 95 % interval over seeds of training that were evaluated with different noise: it covers both."


def coverage(groups: Sequence[Group]) -> str:
    """Returns a sentence on what the intervals cover, or "" if no group has an interval, which takes several runs."""
    repeated = [group for group in groups if len(group.runs) > 1]
    if not repeated:
        return ""
    noise = any(_differ(group, "prompts.seeds") for group in repeated)
    training = any(_differ(group, "seed") for group in repeated) or not noise
    return BOTH if noise and training else NOISE if noise else TRAINING


def _differ(group: Group, key: str) -> bool:
    """Returns whether the runs of a group differ in an entry of their provenance, where it is recorded."""
    values = []
    for run in group.runs:
        value = run.provenance
        for part in key.split("."):
            value = (value or {}).get(part)  # type: ignore[assignment]
        values += [] if value is None else [value]
    return any(value != values[0] for value in values)
