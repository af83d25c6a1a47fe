"""How the command lines start: ``--config``, and user errors in one line, not a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags
from ml_collections import config_flags


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Parses flags and calls ``main``; exits with a message on what the user can put right."""

    def start(argv: Sequence[str]) -> None:
        try:
            main(argv)
        except (OSError, ValueError) as error:
            sys.exit(f"error: {error}")

    app.run(start, flags_parser=_parse)


def run_with_config(
    main: Callable[[Any, Sequence[str]], None], help_text: str, required: bool = True
) -> None:
    """``run`` with the flag ``--config``: calls ``main(config, positional arguments)``.

    The flag is made here rather than on import, so that modules with a command line can be
    imported together.

    Args:
        main: its ConfigDict is None if ``--config`` was not given.
        help_text: of the flag.
        required: without ``--config``, or with other arguments, show the usage and stop.
    """
    holder = config_flags.DEFINE_config_file("config", None, help_text)
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["config"])

    def start(argv: Sequence[str]) -> None:
        if required:
            require_config(holder, argv)
        main(holder.value, argv[1:])

    run(start)


def require_config(holder: flags.FlagHolder, argv: Sequence[str]) -> None:
    """Raises a usage error unless ``--config`` was given, and nothing but flags."""
    if len(argv) > 1 or holder.value is None:
        raise app.UsageError("--config=FILE.py is required, and no other argument")


def _parse(argv: list[str]) -> list[str]:
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:  # a field that the configuration does not have
        message = " ".join(str(error).replace("\\n", " ").replace("\\'", "'").split()).strip("\"'")
        sys.exit(f"error: unknown configuration field: {message}")
    except OSError as error:
        sys.exit(f"error: cannot read the configuration: {error}")
