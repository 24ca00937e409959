"""Writes the numbers of the documentation: every table and plot from the JSON files in benchmarks/results/.

    python -m tools.results_doc            rewrite the documents, and the pictures of results in docs/images
    python -m tools.results_doc --check    write nothing; exit status 1 and a list where they are out of date

In a document, what stands between two comments belongs to this script, and all else to people:

    <!-- results: NAME -->  …  <!-- end of results -->
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, ROOT
from benchmarks.end_to_end import figures, plots, sft
from benchmarks.kernels import align, step
from benchmarks.learning_rate import peft_table, profile, shares
from benchmarks.learning_rate import table as learning_rate
from benchmarks.peers import race
from benchmarks.stages import resampled, search_noise
from benchmarks.tables import Results
from tools.results_tables import comparison, files

DOCUMENTS = ("docs/results.md", "docs/learning-rate.md", "benchmarks/results/README.md", "README.md")
IMAGES = "docs/images"
BLOCK = re.compile(r"(<!-- results: (\S+) -->\n)(.*?)(<!-- end of results -->)", re.DOTALL)


def read_results(root: Path) -> dict[str, dict[str, Any]]:
    """Every committed result by its path below benchmarks/results/."""
    folder = root / RESULTS.relative_to(ROOT)
    return {
        path.relative_to(folder).as_posix(): json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.rglob("*.json"))
    }


def builders(results: Results) -> dict[str, Callable[[], str]]:
    """What may stand in a block, by its name.

    Raises:
        ValueError: when two results would draw the same picture.
    """
    shown = {
        name: [(file, words) for file, (words, _) in plots.pictures(name, data).items()]
        for name, data in figures.end_to_end_files(results).items()
    }
    drawn = [file for shows in shown.values() for file, _ in shows]
    if twice := sorted({file for file in drawn if drawn.count(file) > 1}):
        raise ValueError(f"two results draw {', '.join(twice)}: of one kind keep the newer, or rename one")
    made: dict[str, Callable[[Results], str]] = {
        "files": files,
        "peers": race.table,
        "search-noise": search_noise.table,
        "sft": sft.table,
        "step": step.table,
        "align": align.table,
        "resampled-validation": resampled.table,
        "end-to-end": lambda results: figures.end_to_end(results, shown),
        "learning-rates": learning_rate.learning_rates,
        "learning-rates-by-workload": learning_rate.learning_rates_by_workload,
        "smollm2-rates": learning_rate.smollm2_rates,
        "rate-workloads": lambda results: shares.rate_workloads(results, profile.shown),
        "rate-workloads-short": shares.rate_workloads_short,
        "rate-workloads-each": shares.rate_workloads_each,
        "peft-methods": peft_table.peft_methods,
    }
    found = {name: partial(build, results) for name, build in made.items()}
    found |= {
        name: partial(comparison, data) for name, data in results.items() if name.startswith("compare_")
    }
    return found


def filled(text: str, build: dict[str, Callable[[], str]]) -> str:
    """The document with every block made anew.

    Raises:
        ValueError: for a block of a name that is not known, and for one that is not closed.
    """
    opened, closed = (len(re.findall(mark, text)) for mark in ("<!-- results: ", "<!-- end of results -->"))
    blocks = BLOCK.findall(text)
    if not opened == closed == len(blocks):
        raise ValueError(f"{opened} blocks of results begin and {closed} end: each needs both comments")
    for _, name, *_ in blocks:
        if name not in build:
            raise ValueError(f"there is no block {name!r}; there are {', '.join(sorted(build))}")
    return BLOCK.sub(lambda found: f"{found[1]}{build[found[2]]()}\n{found[4]}", text)


def outdated(root: Path, write: bool) -> list[str]:
    """The files that do not say what the results say; with ``write`` they do afterwards."""
    results = read_results(root)
    build = builders(results)
    found = []
    for name in DOCUMENTS:
        path = root / name
        before = path.read_text(encoding="utf-8")
        after = filled(before, build)
        if before != after:
            found.append(name)
            if write:
                path.write_text(after, encoding="utf-8")
    wanted = {}
    for name, data in figures.end_to_end_files(results).items():
        wanted |= {file: (draw, data) for file, (_, draw) in plots.pictures(name, data).items()}
    wanted |= profile.pictures(results)
    for file, (draw, data) in wanted.items():
        path = root / IMAGES / file
        if plots.shown_digest(path) != plots.digest(data):
            found.append(f"{IMAGES}/{file}")
            if write:
                plots.write(path, draw, data)
    for path in sorted([*(root / IMAGES).glob("end_to_end_*.png"), *(root / IMAGES).glob(profile.FILE)]):
        if path.name not in wanted:
            found.append(f"{IMAGES}/{path.name}")
            if write:
                path.unlink()
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where something is out of date"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout")
    options = parser.parse_args(argv)
    try:
        found = outdated(options.root, write=not options.check)
    except ValueError as error:
        print(f"results_doc: {error}", file=sys.stderr)
        return 2
    if not found:
        print("The documentation says what the results say.")
    elif options.check:
        print(f"out of date: {', '.join(found)}; python -m tools.results_doc makes them anew")
    else:
        print(f"written: {', '.join(found)}")
    return 1 if found and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
