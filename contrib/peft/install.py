#!/usr/bin/env python3
"""Put Fast Forward into a PEFT checkout or an installed PEFT, or take it out again.

    python install.py                     into the PEFT that this Python imports
    python install.py PATH                into a checkout (has src/peft) or a folder that holds the package peft
    python install.py PATH --check        is it in, is it this version? exit status 1 if not
    python install.py PATH --uninstall    out again; the touched files are as they were before

A checkout gets everything a pull request would hold (module, tests, docs, example, experiment); an installed
package gets the module and its registration. Running it twice changes nothing. It writes nothing unless all
of it can be done.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from pathlib import Path
from typing import NamedTuple


HERE = Path(__file__).resolve().parent
NAME = "create_fast_forward_optimizer"
IMPORT = f"from .fast_forward import {NAME}\n"
NEW_FILES = ("src/peft", "tests", "examples", "method_comparison")


class Edit(NamedTuple):
    """In a file of a checkout: `old` (must be there exactly once) becomes `new`."""

    path: str
    old: str
    new: str


def _edits() -> list[Edit]:
    section = (HERE / "docs/lora_fast_forward.md").read_text(encoding="utf-8")
    docs, utils, run = (
        "docs/source/package_reference/lora.md",
        "method_comparison/MetaMathQA/utils.py",
        "method_comparison/MetaMathQA/run.py",
    )
    return [
        Edit(
            docs,
            "Currently PEFT supports LoRA-FA and LoRA+.",
            "Currently PEFT supports LoRA-FA, LoRA+ and Fast Forward.",
        ),
        Edit(docs, "\n\n## Post-Training\n", f"\n{section}\n## Post-Training\n"),
        Edit(
            utils,
            "from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, "
            "create_riemannian_optimizer\n",
            "from peft.optimizers import (\n    create_fast_forward_optimizer,\n    create_lorafa_optimizer,\n"
            "    create_loraplus_optimizer,\n    create_riemannian_optimizer,\n)\n",
        ),
        Edit(
            utils,
            'not in ["lora+", "lora-fa", "riemannian"]',
            'not in ["fast-forward", "lora+", "lora-fa", "riemannian"]',
        ),
        Edit(
            utils,
            "def get_optimizer_and_scheduler(\n",
            "def get_fast_forward_batches(*, ds, tokenizer, batch_size: int, device) -> list[dict[str, Any]]:\n"
            "    # same labels as for training\n"
            "    batches = []\n"
            "    for j in range(0, len(ds), batch_size):\n"
            "        sliced = ds[j : j + batch_size]\n"
            '        sliced.pop("response")\n'
            '        tokens_per_sample = [len(i) for i in sliced["input_ids"]]\n'
            '        batch = tokenizer.pad(sliced, return_tensors="pt").to(device)\n'
            '        labels = batch["input_ids"].clone()\n'
            "        for i, num_tokens in enumerate(tokens_per_sample):\n"
            "            labels[i, num_tokens + 1 :] = -100\n"
            '        batch["labels"] = labels\n'
            "        batches.append(batch)\n"
            "    return batches\n\n\n"
            "def get_fast_forward_loss(model, *, batches: list[dict[str, Any]]) -> torch.Tensor:\n"
            '    num_items = sum(batch["labels"][:, 1:].ne(-100).sum().item() for batch in batches)\n'
            "    # no KV cache, it would only cost memory\n"
            "    return sum(model(**batch, num_items_in_batch=num_items, use_cache=False).loss "
            "for batch in batches)\n\n\n"
            "def get_optimizer_and_scheduler(\n",
        ),
        Edit(
            utils,
            '    elif optimizer_type == "lora-fa":\n',
            '    elif optimizer_type == "fast-forward":\n'
            "        optimizer = create_fast_forward_optimizer("
            "model, optimizer_cls=torch.optim.AdamW, **optimizer_kwargs)\n"
            '    elif optimizer_type == "lora-fa":\n',
        ),
        Edit(
            run,
            "    get_dataset_info,\n",
            "    get_dataset_info,\n    get_fast_forward_batches,\n    get_fast_forward_loss,\n",
        ),
        Edit(
            run,
            "    optimizer, lr_scheduler = get_optimizer_and_scheduler(\n",
            "    fast_forward_batches: list[dict[str, Any]] = []  # filled when the data is loaded\n"
            '    if optimizer_type == "fast-forward":\n'
            "        validation = partial(get_fast_forward_loss, batches=fast_forward_batches)\n"
            '        optimizer_kwargs = {**optimizer_kwargs, "validation": validation}\n\n'
            "    optimizer, lr_scheduler = get_optimizer_and_scheduler(\n",
        ),
        Edit(
            run,
            "    # note: bucketing by length is only really worth it for the train dataset",
            '    if optimizer_type == "fast-forward":\n'
            "        # 32 examples that are neither trained on nor used for the valid or test accuracy\n"
            "        num_train = len(ds_train) - 32\n"
            "        ds_fast_forward = ds_train.select(range(num_train, len(ds_train)))\n"
            "        ds_train = ds_train.select(range(num_train))\n"
            "        fast_forward_batches += get_fast_forward_batches(\n"
            "            ds=ds_fast_forward, tokenizer=tokenizer, batch_size=batch_size, device=model.device\n"
            "        )\n"
            "    # note: bucketing by length is only really worth it for the train dataset",
        ),
    ]


def _registered(text: str) -> bool:
    return IMPORT in text and f'"{NAME}"' in text


def _exports(text: str, path: Path) -> tuple[re.Match, list[str]]:
    found = re.search(r"^__all__ = \[(.*?)\]\n", text, re.DOTALL | re.MULTILINE)
    if found is None or "from .lorafa import" not in text:
        raise InstallError(f"{path} does not look like PEFT's: it has no __all__ list or does not import .lorafa")
    return found, re.findall(r'"(\w+)"', found.group(1))


def _with_exports(text: str, found: re.Match, names: list[str]) -> str:
    line = "__all__ = [" + ", ".join(f'"{name}"' for name in names) + "]\n"
    if len(line) > 120:  # as ruff formats it at PEFT's line length of 119
        line = "__all__ = [\n" + "".join(f'    "{name}",\n' for name in names) + "]\n"
    return text[: found.start()] + line + text[found.end() :]


def register(text: str, path: Path) -> str:
    """The text of `optimizers/__init__.py` with Fast Forward in it."""
    if _registered(text):
        return text
    found, names = _exports(text, path)
    text = _with_exports(text, found, sorted({NAME, *names}))
    return text.replace("from .lorafa import", IMPORT + "from .lorafa import", 1)


def unregister(text: str, path: Path) -> str:
    """The inverse of `register`."""
    if not _registered(text):
        return text
    found, names = _exports(text, path)
    return _with_exports(text, found, [name for name in names if name != NAME]).replace(IMPORT, "", 1)


class InstallError(Exception):
    """What cannot be done, why, and what to do about it."""


class Target(NamedTuple):
    package: Path  # the folder of the package peft
    checkout: Path | None  # the root of the checkout it is in


def find_target(path: Path | None) -> Target:
    """The PEFT at `path`, or the one that this interpreter imports."""
    if path is None:
        spec = importlib.util.find_spec("peft")
        if spec is None or not spec.submodule_search_locations:
            raise InstallError(f"{sys.executable} has no peft: install it (pip install peft) or give a path")
        path = Path(spec.submodule_search_locations[0])
        if path.parent.name == "src" and (path.parent.parent / "pyproject.toml").is_file():
            path = path.parent.parent  # an editable install of a checkout
    path = path.expanduser().resolve()
    for package, checkout in (
        (path / "src/peft", path),
        (path / "peft", None),
        (path, None),
    ):
        if (package / "peft_model.py").is_file():
            if not (package / "optimizers/__init__.py").is_file():
                raise InstallError(f"the PEFT in {package} has no optimizers/: install peft 0.19 or newer")
            return Target(package, checkout)
    raise InstallError(f"{path} is neither a PEFT checkout (no src/peft) nor a folder with the package peft")


def _new_files(target: Target) -> dict[Path, Path]:
    """What to copy: {destination: source}."""
    files = {}
    for folder in NEW_FILES:
        for source in sorted((HERE / folder).rglob("*")):
            if not source.is_file() or "__pycache__" in source.parts:
                continue
            if target.checkout is not None:
                files[target.checkout / source.relative_to(HERE)] = source
            elif folder == "src/peft":
                files[target.package / source.relative_to(HERE / folder)] = source
    return files


def _plan(target: Target, *, uninstall: bool) -> dict[Path, str]:
    """The edited files with their new text; raises before anything is written if one of them does not fit."""
    # The module imports DoraCaching, and peft imports the module: in an older one, `import peft` would fail.
    helpers = target.package / "helpers.py"
    if not uninstall and "\nclass DoraCaching" not in (
        helpers.read_text(encoding="utf-8") if helpers.is_file() else ""
    ):
        raise InstallError(f"the PEFT in {target.package} has no helpers.DoraCaching: install peft 0.19 or newer")
    init = target.package / "optimizers/__init__.py"
    change = unregister if uninstall else register
    texts = {init: change(init.read_text(encoding="utf-8"), init)}
    for edit in _edits() if target.checkout is not None else []:
        path = target.checkout / edit.path
        if not path.is_file():
            if uninstall or not (target.checkout / ".git").exists():
                continue  # a source distribution has neither docs nor benchmarks
            raise InstallError(f"{path} is missing: is {target.checkout} a complete checkout of PEFT?")
        text = texts.get(path) or path.read_text(encoding="utf-8")
        before, after = (edit.new, edit.old) if uninstall else (edit.old, edit.new)
        if _applied(text, edit) != uninstall:
            texts[path] = text
            continue
        if text.count(before) != 1:
            raise InstallError(
                f"{path} has changed upstream: {text.count(before)} places instead of one read {before.strip()[:60]!r}; "
                "nothing was written. Adapt the edits in install.py to this version of PEFT"
            )
        texts[path] = text.replace(before, after)
    return {path: text for path, text in texts.items() if text != path.read_text(encoding="utf-8")}


def _applied(text: str, edit: Edit) -> bool:
    # `new` may contain `old`, as where something is inserted beside it
    return edit.new in text


def install(target: Target) -> list[Path]:
    """Returns the files that were written."""
    texts, written = _plan(target, uninstall=False), []
    for destination, source in _new_files(target).items():
        if not destination.is_file() or destination.read_bytes() != source.read_bytes():
            destination.parent.mkdir(parents=True, exist_ok=True)
            destination.write_bytes(source.read_bytes())
            written.append(destination)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def uninstall(target: Target) -> list[Path]:
    """Returns the files that were removed or put back."""
    texts, touched = _plan(target, uninstall=True), []
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
        touched.append(path)
    for destination in _new_files(target):
        if destination.is_file():
            destination.unlink()
            touched.append(destination)
            cache = destination.parent / "__pycache__"
            for compiled in cache.glob(f"{destination.stem}.*.pyc"):
                compiled.unlink()
            for folder in (cache, destination.parent):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
    return touched


def differences(target: Target) -> list[str]:
    """What --check finds: one line per file that is missing or not as this version has it."""
    found = []
    for destination, source in _new_files(target).items():
        if not destination.is_file():
            found.append(f"missing: {destination}")
        elif destination.read_bytes() != source.read_bytes():
            found.append(f"another version: {destination}")
    return found + [f"not registered or edited: {path}" for path in _plan(target, uninstall=False)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", type=Path, help="a checkout, or a folder with the package peft")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="only say whether it is in")
    action.add_argument("--uninstall", action="store_true", help="take it out again")
    args = parser.parse_args(argv)
    try:
        target = find_target(args.path)
        where = target.checkout or target.package
        if args.check:
            found = differences(target)
            print("\n".join(found) if found else f"Fast Forward is in {where}")
            return 1 if found else 0
        files = uninstall(target) if args.uninstall else install(target)
    except (InstallError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    verb = "taken out of" if args.uninstall else "put into"
    print(*(f"  {path}" for path in files), f"Fast Forward was {verb} {where} ({len(files)} files)", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
