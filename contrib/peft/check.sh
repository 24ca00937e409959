#!/usr/bin/env bash
# Puts Fast Forward into copies of the pinned PEFT, its source and its wheel, and runs there: its tests, PEFT's own
# tests of optimizers, and the example. The environment itself is not touched.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON="$PWD/${VENV:-.venv}/bin/python"
CONTRIB="$PWD/contrib/peft"
COPY="$PWD/build/peft-contrib"
VERSION=$("$PYTHON" -c "from importlib.metadata import version; print(version('peft'))")

rm -rf "$COPY"
mkdir -p "$COPY/source" "$COPY/site"
"$PYTHON" -m pip download --disable-pip-version-check --quiet --no-deps --no-binary peft --dest "$COPY" "peft==$VERSION"
tar -xzf "$COPY/peft-$VERSION.tar.gz" -C "$COPY/source" --strip-components 1
touch "$COPY/source/tests/__init__.py" # in the repository, but not in the source distribution

"$PYTHON" "$CONTRIB/install.py" "$COPY/source"
"$PYTHON" "$CONTRIB/install.py" "$COPY/source" --check
cd "$COPY/source"
export PYTHONPATH="$COPY/source/src" HF_HUB_OFFLINE=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # for models this small, a second thread only waits for the first
"$PYTHON" -c "import peft; assert peft.__file__.startswith('$COPY'), peft.__file__"
# Without PEFT's pytest settings: they want pytest-cov, and make an error of every deprecation in transformers.
"$PYTHON" -m pytest -q -c /dev/null --rootdir . -p no:cacheprovider \
  tests/test_fast_forward.py tests/test_loraplus.py tests/test_lorafa.py tests/test_riemannian_lora.py
"$PYTHON" examples/fast_forward_finetuning/fast_forward_finetuning.py \
  --smoke_test --max_steps 12 --lr 1e-3 --fast_forward --output_dir "$COPY/example" >"$COPY/example.log"
grep "the update was repeated" "$COPY/example.log"
"$PYTHON" "$CONTRIB/install.py" "$COPY/source" --uninstall >/dev/null
if "$PYTHON" "$CONTRIB/install.py" "$COPY/source" --check >/dev/null; then
  echo "install.py --check finds Fast Forward after --uninstall" >&2
  exit 1
fi

"$PYTHON" -m pip install --disable-pip-version-check --quiet --no-deps --target "$COPY/site" "peft==$VERSION"
"$PYTHON" "$CONTRIB/install.py" "$COPY/site"
cd "$COPY/site"
PYTHONPATH="$COPY/site" "$PYTHON" -c "
import peft.optimizers
assert peft.__file__.startswith('$COPY'), peft.__file__
assert peft.optimizers.create_fast_forward_optimizer.__module__ == 'peft.optimizers.fast_forward'"
"$PYTHON" "$CONTRIB/install.py" "$COPY/site" --uninstall >/dev/null
