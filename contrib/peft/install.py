#!/usr/bin/env python3
"""Put Fast Forward into a PEFT checkout or an installed PEFT, or take it out again.

    python install.py                     into the PEFT that this Python imports
    python install.py PATH                into a checkout (has src/peft) or a folder that holds the package peft
    python install.py PATH --check        is it in, is it this version? exit status 1 if not
    python install.py PATH --uninstall    out again; the touched files are as they were before

A git checkout gets all that a pull request would hold (with peft.patch for docs and benchmark), an installed package
the module and its registration. Running it twice changes nothing. It writes nothing unless all of it can be done.
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


HERE = Path(__file__).resolve().parent
PATCH = HERE / "peft.patch"
NAME = '"create_fast_forward_optimizer"'
IMPORT = "from .fast_forward import create_fast_forward_optimizer\n"
MODULE = "optimizers/fast_forward.py"
FOLDERS = ("src", "tests", "examples", "method_comparison")


class InstallError(Exception):
    """What cannot be done, why, and what to do about it."""


class Target(NamedTuple):
    package: Path  # the folder of the package peft
    checkout: Path | None  # the root of the checkout it is in

    def registration(self, *, remove: bool = False) -> tuple[Path, str]:
        """The file that exports the optimizers, and its text with Fast Forward in it, or without it."""
        path = self.package / "optimizers/__init__.py"
        text = path.read_text(encoding="utf-8")
        if (IMPORT in text) != remove:
            return path, text
        found = re.search(r"^__all__ = \[(.*?)\]\n", text, re.DOTALL | re.MULTILINE)
        if found is None or "from .lorafa import" not in text:
            raise InstallError(f"{path} does not look like PEFT's: it has no __all__ list or does not import .lorafa")
        names = {NAME, *re.findall(r'"\w+"', found.group(1))} - ({NAME} if remove else set())
        line = f"__all__ = [{', '.join(sorted(names))}]\n"
        if len(line) > 120:  # as ruff formats it at PEFT's line length of 119
            line = "__all__ = [\n" + "".join(f"    {name},\n" for name in sorted(names)) + "]\n"
        text = text.replace(found.group(), line).replace(IMPORT, "")
        return path, text if remove else text.replace("from .lorafa", IMPORT + "from .lorafa", 1)

    def files(self) -> dict[Path, Path]:
        """What to copy: {destination: source}."""
        if self.checkout is None:
            return {self.package / MODULE: HERE / "src/peft" / MODULE}
        found = [path for folder in FOLDERS for path in sorted((HERE / folder).rglob("*")) if path.is_file()]
        return {self.checkout / path.relative_to(HERE): path for path in found if path.suffix != ".pyc"}

    def patch(self, *options: str) -> str | None:
        """Runs `git apply` with peft.patch; returns its complaint, if any."""
        if self.checkout is None or not (self.checkout / ".git").exists():
            return None  # a source distribution has neither docs nor benchmarks
        # a checkout inside of another repository must not be taken for a folder of that one
        environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(self.checkout.parent)}
        command = ["git", "-C", str(self.checkout), "apply", *options, str(PATCH)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done.stderr.strip() if done.returncode else None


def find_target(path: Path | None) -> Target:
    """The PEFT at `path`, or the one that this interpreter imports."""
    if path is None:
        spec = importlib.util.find_spec("peft")
        if spec is None or spec.origin is None:
            raise InstallError(f"{sys.executable} has no peft: install it (pip install peft) or give a path")
        path = Path(spec.origin).parent
        path = path.parent.parent if path.parent.name == "src" else path  # an editable install of a checkout
    path = path.expanduser().resolve()
    for target in (Target(path / "src/peft", path), Target(path / "peft", None), Target(path, None)):
        if (target.package / "peft_model.py").is_file():
            return target
    raise InstallError(f"{path} is neither a PEFT checkout (no src/peft) nor a folder with the package peft")


def differences(target: Target) -> list[str]:
    """What is missing or not as this version has it; raises if it cannot be put in."""
    # The module imports DoraCaching, and peft imports the module: in an older one, `import peft` would fail.
    helpers = target.package / "helpers.py"
    if not helpers.is_file() or "\nclass DoraCaching" not in helpers.read_text(encoding="utf-8"):
        raise InstallError(f"the PEFT in {target.package} has no helpers.DoraCaching: install peft 0.19 or newer")
    files = target.files().items()
    found = [f"missing: {path}" for path, _ in files if not path.is_file()]
    found += [f"another version: {p}" for p, own in files if p.is_file() and p.read_bytes() != own.read_bytes()]
    init, text = target.registration()
    if init.read_text(encoding="utf-8") != text:
        found.append(f"not registered: {init}")
    if target.patch("--reverse", "--check"):
        if complaint := target.patch("--check"):
            raise InstallError(f"{target.checkout} has changed upstream, adapt {PATCH.name} to it: {complaint}")
        found.append(f"not patched: {target.checkout}")
    return found


def install(target: Target) -> None:
    differences(target)  # raises before anything is written
    for path, source in target.files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.read_bytes())
    init, text = target.registration()
    init.write_text(text, encoding="utf-8")
    target.patch()  # all or nothing: nothing, if it is in


def uninstall(target: Target) -> None:
    init, text = target.registration(remove=True)
    init.write_text(text, encoding="utf-8")
    target.patch("--reverse")  # all or nothing: nothing, if it is not in
    for path in target.files():
        path.unlink(missing_ok=True)
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
            compiled.unlink()
        for folder in (path.parent / "__pycache__", path.parent):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--uninstall", action="store_true")
    args = parser.parse_args(argv)
    try:
        target = find_target(args.path)
        found = differences(target) if args.check else (uninstall if args.uninstall else install)(target)
    except (InstallError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    done = "is in" if args.check else "was taken out of" if args.uninstall else "was put into"
    print("\n".join(found) if found else f"Fast Forward {done} {target.checkout or target.package}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
