import re

import pytest

from ffkernels.engine.config import FastForwardConfig


def test_defaults_are_the_papers_interval_and_the_bracketing_search():
    config = FastForwardConfig()
    assert (config.interval, config.warmup, config.search, config.patience) == (6, 0, "parabolic", "auto")


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("interval", 0, "at least 1"),
        ("interval", 2.5, "an integer"),
        ("interval", True, "an integer"),
        ("warmup", -1, "at least 0"),
        ("max_tau", 0, "from 1 to 65536"),
        ("max_tau", 65537, "from 1 to 65536"),
        ("patience", 0, "at least 1 or None or 'auto'"),
        ("patience", "never", "at least 1 or None or 'auto'"),
        ("search", "golden", "'parabolic', 'linear'"),
        ("executor", "warp", "'auto', 'eager', 'step_graph', 'stage_graph'"),
        ("impl", "fortran", "'auto', 'torch', 'cpp'"),
        ("learning_rate", "find", "one of 'keep', 'auto'"),
        ("interval", None, "at least 1, or None with learning_rate='auto'"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(field, value, allowed):
    with pytest.raises(ValueError, match=f"^{field}={re.escape(repr(value))}: .*{re.escape(allowed)}"):
        FastForwardConfig(**{field: value})


def test_to_dict_makes_the_same_config_again():
    config = FastForwardConfig(interval=3, search="linear", patience=None)
    assert FastForwardConfig(**config.to_dict()) == config
