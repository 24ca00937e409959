from __future__ import annotations

import pytest

from ffkernels.training.rules import check, whole


@pytest.mark.parametrize("value", [1, 0, 2.0, True, None, "3"])
def test_what_is_no_integer_of_at_least(value):
    with pytest.raises(ValueError, match=f"of={value!r}: must be an integer of at least 2"):
        check("of", value, whole(2))
    check("of", 2, whole(2))
