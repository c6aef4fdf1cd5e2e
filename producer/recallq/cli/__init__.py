"""The ``recallq`` command."""

from recallq.cli.app import main

__all__ = ["main"]
