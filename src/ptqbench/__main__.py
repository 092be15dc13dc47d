"""Entry point of ``python -m ptqbench`` and of the ``ptqbench`` command."""

import sys

from ptqbench.cli import main


def run() -> None:
    """Run the command line of this process and exit with its status."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
