"""Samples images from prompts: `python sample.py --help`."""

import sys

if __name__ == "__main__":
    try:
        from ldm.commands.sample.command import main
    except KeyboardInterrupt:  # which takes seconds
        sys.exit(130)
    sys.exit(main(sys.argv[1:]))
