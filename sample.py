"""Draw pictures from prompts: `python sample.py --help`."""

import sys

if __name__ == "__main__":
    from ldm.commands.sample import main

    sys.exit(main(sys.argv[1:]))
