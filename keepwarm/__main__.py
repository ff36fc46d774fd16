"""The entry point of `keepwarm` and `python -m keepwarm`."""

import sys

from keepwarm.cli.root import run


def main() -> None:
    """Run the command line and end the process with its status."""
    if not __debug__:
        sys.exit("keepwarm: run it without python -O or PYTHONOPTIMIZE: its assertions guard what is stored")
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
