"""Benchmarks import each other as scripts do, also where pytest collects them (`make bench`)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
