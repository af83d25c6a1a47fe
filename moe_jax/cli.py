"""How the command lines start: ``--config``, and user errors in one line, not a traceback."""

from __future__ import annotations

import ast
import contextlib
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags
from ml_collections import config_flags
from ml_collections.config_flags import tuple_parser

from moe_jax.interruption import Stopped, ended_by_signals, leave
from moe_jax.processes import initialise, is_writer, stop_announced

# What bad input, a full disk, a missing package or too little memory raises.
_USER_ERRORS = (OSError, ValueError, ImportError, ArithmeticError, MemoryError)


def run(main: Callable[[Sequence[str]], None], many_processes: bool = False) -> None:
    """Parses flags and calls ``main``; exits with a message on what the user can put right.

    Ended by SIGINT or SIGTERM, the program has status 130 or 143, never 0.

    Args:
        main: takes the positional arguments, the program's name first.
        many_processes: join those that the environment tells of, see ``processes.initialise``.
    """

    def start(argv: Sequence[str]) -> None:
        try:
            if many_processes:
                initialise()
            with ended_by_signals(), _one_of_many():
                main(argv)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            _exit(f"not enough memory: {error}")
        except _USER_ERRORS as error:
            _exit(_message(error))

    app.run(start, flags_parser=_parse)


@contextlib.contextmanager
def _one_of_many() -> Iterator[None]:
    """Ends one of many processes at once where it fails: the others wait for what it computes."""
    try:
        yield
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        if stop_announced():
            raise Stopped from error
        if not isinstance(error, _USER_ERRORS):
            traceback.print_exc()
        hint = ""
        if isinstance(error, jax.errors.JaxRuntimeError):
            hint = "; if another process was lost or has failed, run all of them again to go on"
        leave(f"error in process {jax.process_index()}: {_message(error)}{hint}", 1)


def run_with_config(
    main: Callable[[Any, Sequence[str]], None],
    help_text: str,
    required: bool = True,
    many_processes: bool = False,
) -> None:
    """``run`` with the flag ``--config``: calls ``main(config, positional arguments)``.

    The flag is made here rather than on import, so that modules with a command line can be
    imported together.

    Args:
        main: its ConfigDict is None if ``--config`` was not given.
        required: without ``--config``, or with other arguments, show the usage and stop.
        many_processes: see ``run``.
    """
    config_flags.register_flag_parser_for_type(tuple, _Tuple())
    # A configuration lists what differs from the defaults; whether there is such a field at all
    # is told by the dataclass that is made of it.
    holder = config_flags.DEFINE_config_file(
        "config", None, help_text, lock_config=False, accept_new_attributes=True
    )
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["config"])

    def start(argv: Sequence[str]) -> None:
        try:
            config = holder.value
            getattr(config, "lock", None)  # what went wrong is kept until a field is asked for
        except OSError as error:
            _exit(f"cannot read the configuration: {_last_line(str(error))}")
        if required and (config is None or len(argv) > 1):
            raise app.UsageError("--config=FILE.py is required, and no other argument")
        show_progress()
        main(config, argv[1:])

    run(start, many_processes)


def show_progress() -> None:
    """Sends what the package logs to standard error, and of its libraries only warnings.

    Of many processes, one tells what goes on.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.captureWarnings(True)
    warnings.formatwarning = _warning_text  # type: ignore[assignment]
    logging.getLogger("moe_jax").setLevel(logging.INFO if is_writer() else logging.ERROR)


def print_paths(paths: Mapping[str, object]) -> None:
    """What was written where, one file a line."""
    for name, path in paths.items():
        print(f"{name:<11} {path}")


def _warning_text(message: Any, *_: object) -> str:
    return f"warning: {message}"


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _exit(message: str) -> NoReturn:
    """Ends the program with one line."""
    sys.exit(f"error: {' '.join(message.split())}")


class _Tuple(tuple_parser.TupleParser):
    """Tuples as Python writes them, or items with commas between: names of files need no quotes."""

    def parse(self, argument: Any) -> tuple[Any, ...]:
        if argument is None or isinstance(argument, tuple):
            return argument or ()
        given = argument if isinstance(argument, list) else [argument]
        return tuple(item for text in given for item in _items(text))


def _items(text: Any) -> Sequence[Any]:
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return [part.strip() for part in str(text).split(",") if part.strip()]
    return value if isinstance(value, (tuple, list)) else [value]


def _parse(argv: list[str]) -> list[str]:
    """Flags; what a configuration file raises when it is read ends here, too."""
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:  # a field that the configuration does not have
        _exit(f"unknown configuration field: {_unknown_field(str(error))}")
    except OSError as error:
        _exit(f"cannot read the configuration: {_last_line(_message(error))}")
    except flags.UnrecognizedFlagError as error:
        _exit(f"{error}; --help tells what there is")
    except (flags.Error, SyntaxError, TypeError, ValueError, ImportError) as error:
        _exit(f"configuration: {_last_line(_message(error))}")


def _unknown_field(message: str) -> str:
    """ml_collections' message, which has a repr of its lines in it, in a readable form."""
    found = re.search(r'Did you mean "(.+)" instead of "(.+)"', message)
    return f"{found[2]} (did you mean {found[1]!r}?)" if found else message.strip("\"' ")


def _last_line(message: str) -> str:
    """The cause, where a library puts its traceback into the message."""
    last = message.strip().splitlines()[-1].strip()
    return re.sub(r"^[A-Za-z]+(Error|Exception): ", "", last)
