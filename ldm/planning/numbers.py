"""Formats the numbers and rows of a plan."""


def row(name: str, value: str, note: str = "") -> str:
    return f"  {name:<24}{value:>12}  {note}".rstrip()


def amount(value: float, base: int = 1000, unit: str = "") -> str:
    """Formats four digits and a prefix, as in 859.5 M, or 13.94 GiB with base 1024 and unit B."""
    exponent = 0
    while value >= base and exponent < 6:
        value, exponent = value / base, exponent + 1
    prefix = ("", *"kMGTPE")[exponent] if base == 1000 else ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")[exponent]
    return f"{value:.4g} {prefix}{unit}".rstrip()


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")
