"""How the command lines start: absl flags, and user errors in one line instead of a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from absl import app, flags


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Parses flags and calls ``main``; exits with a message on what the user can put right."""
    app.run(lambda argv: _guarded(main, argv), flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:  # a field that the configuration does not have
        sys.exit(f"error: unknown configuration field: {str(error).strip()}")
    except OSError as error:
        sys.exit(f"error: cannot read the configuration: {error}")


def _guarded(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> None:
    try:
        main(argv)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def require_config(holder: flags.FlagHolder, argv: Sequence[str]) -> None:
    """Raises a usage error unless ``--config`` was given, and nothing but flags."""
    if len(argv) > 1 or holder.value is None:
        raise app.UsageError("--config=FILE.py is required, and no other argument")
