"""How benchmark.py, quota.py and faults.py print what they have measured."""

from __future__ import annotations

import os
import platform
import time


def machine() -> str:
    """Where and when it was measured."""
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    return f"Python {platform.python_version()}, {system}, {time.strftime('%Y-%m-%d')}"


def line(*cells: str) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"
