"""Defines the option --captions, which several commands share."""

import argparse

PLACES = (
    "where to find captions, all of which are stored: extensions such as txt or alt.txt, txt:lines (one caption per "
    "line), or json:FIELD"
)


def add_captions_argument(parser: argparse.ArgumentParser, text: str) -> None:
    """Adds the option with a help text; without it the list is empty."""
    parser.add_argument("--captions", nargs="+", default=[], metavar="PLACE", help=text)
