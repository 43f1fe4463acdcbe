"""Formats the numbers and rows of a plan."""

UNITS = (("s", 1, 100), ("min", 60, 100), ("h", 3600, 72), ("days", 86400, float("inf")))  # each up to so many


def row(name: str, value: str, note: str = "") -> str:
    return f"  {name:<24}{value:>12}  {note}".rstrip()


def amount(value: float, base: int = 1000, unit: str = "") -> str:
    """Formats four digits and a prefix, as in 859.5 M, or 13.94 GiB with base 1024 and unit B."""
    exponent = 0
    while value >= base and exponent < 6:
        value, exponent = value / base, exponent + 1
    prefix = ("", *"kMGTPE")[exponent] if base == 1000 else ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")[exponent]
    return f"{value:.4g} {prefix}{unit}".rstrip()


def duration(seconds: float) -> str:
    """Formats three digits in seconds, minutes, hours or days, as in 45.2 s or 11.3 h."""
    if seconds < 0.1:
        return "< 0.1 s"
    unit, length = next((unit, length) for unit, length, end in UNITS if seconds < end * length)
    return f"{seconds / length:.3g} {unit}"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")
