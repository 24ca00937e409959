"""``python -m ffkernels`` and the ``ffkernels`` command."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from ffkernels.cli import run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(f"ffkernels: the command line needs {error.name}: pip install 'ffkernels[hf]'", file=sys.stderr)
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
