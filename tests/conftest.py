"""What every test may rely on."""

from __future__ import annotations

import os
import signal

import pytest


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_arrives():
    """A job that a shell put into the background starts with SIGINT ignored; tests of Ctrl-C need it back."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def same_environment():
    """Libraries set variables for good (PEFT's BOFT chooses a compiler); the next test shall not see them."""
    before = dict(os.environ)
    yield
    added = os.environ.keys() - before.keys() - {"PYTEST_CURRENT_TEST"}
    for name in added:
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value and name != "PYTEST_CURRENT_TEST":
            os.environ[name] = value
