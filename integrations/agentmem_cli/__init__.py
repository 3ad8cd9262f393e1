"""The console command `agentmem`. Each command's module loads only when that command runs."""

from __future__ import annotations

from agentmem_cli.app import main

__all__ = ["main"]
