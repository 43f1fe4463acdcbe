"""Defines which Arrow types the standard metadata columns can have in a file."""

import pyarrow as pa

from ldm.metadata.columns import TYPES

DECIMAL_DIGITS = 38  # DuckDB below 2.0 misreads wider decimals


def plain(kind: pa.DataType) -> pa.DataType:
    """Returns the value type of a dictionary-encoded column, and other types unchanged."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_text(kind: pa.DataType) -> bool:
    """Returns whether the type is text or bytes, which are read as UTF-8, in any of Arrow's layouts."""
    kind = plain(kind)
    tests = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_binary_view,
    )
    return any(test(kind) for test in tests)


def is_readable(name: str, kind: pa.DataType) -> bool:
    """Returns whether the standard column `name` can have this type."""
    kind = plain(kind)
    if is_text(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind):
        return True
    narrow = pa.types.is_decimal(kind) and kind.precision <= DECIMAL_DIGITS and kind.bit_width <= 128
    return TYPES.get(name) != "VARCHAR" and (pa.types.is_floating(kind) or narrow)
