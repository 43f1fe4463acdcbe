"""Numbers and rows as a plan prints them."""


def row(name: str, value: str, note: str = "") -> str:
    return f"  {name:<24}{value:>12}  {note}".rstrip()


def amount(value: float, base: int = 1000, unit: str = "") -> str:
    """Four digits and a prefix: 859.5 M, or with base 1024 and unit B 13.94 GiB."""
    exponent = 0
    while value >= base and exponent < 6:
        value, exponent = value / base, exponent + 1
    prefix = ("", *"kMGTPE")[exponent] if base == 1000 else ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")[exponent]
    return f"{value:.4g} {prefix}{unit}".rstrip()


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")
