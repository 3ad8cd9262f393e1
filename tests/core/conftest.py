"""Puts ``core_models`` on the path: pytest's importlib mode leaves this folder off it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
