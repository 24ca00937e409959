"""Where this checkout is. Importing this puts it first on the path: a benchmark needs no installed ffkernels.

Every script imports it, so that each can be started by itself from a plain exported tree.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

sys.path.insert(0, str(ROOT))
