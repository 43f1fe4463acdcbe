"""Generates images from prompts: see `python sample.py --help`."""

import sys

from ldm.errors import end_quietly_on_closed_pipes

if __name__ == "__main__":
    end_quietly_on_closed_pipes()
    try:
        from ldm.commands.sample.arguments import asks_for_help, help_text

        if asks_for_help(sys.argv[1:]):
            print(help_text())
            sys.exit()
        from ldm.commands.sample.command import main
    except KeyboardInterrupt:  # the import takes seconds
        sys.exit(130)
    sys.exit(main(sys.argv[1:]))
