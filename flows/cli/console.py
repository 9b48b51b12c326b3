"""What the commands share: the console for messages, refusals, and running a Prefect flow from a terminal."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from flows.cli.exit_codes import FAILED, INTERRUPTED

if TYPE_CHECKING:
    from rich.console import Console

_GRACE_S = 5.0


def error_console() -> "Console":
    """The console of standard error, where messages and progress go. Results go to standard output."""
    from rich.console import Console

    return Console(stderr=True)


def print_error(error: object, console: "Console | None" = None) -> None:
    """Print what the user can mend, as one message. console: that of standard error when None."""
    (console or error_console()).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)


def print_failure(error: BaseException, verbose: bool, console: "Console | None" = None) -> None:
    """Print an error that is not the user's, with its traceback on demand. console: as for `print_error`."""
    console = console or error_console()
    if verbose:
        console.print_exception()
    hint = "" if verbose else " (-v shows where)"
    console.print(f"failed: {type(error).__name__}: {error}{hint}", style="red", markup=False, soft_wrap=True)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """End with one message and no traceback on what the user can mend."""
    from data_manifests.dataset import NoDataset
    from data_manifests.sources import ManifestError
    from data_manifests.strict import RecipeError
    from tasks.execution.ledger import LedgerError
    from tasks.review.refusal import Refused
    from tasks.weights.missing import MissingBackend

    try:
        yield
    except BrokenPipeError:
        raise  # main handles it
    except (Refused, RecipeError, ManifestError, NoDataset, LedgerError, MissingBackend, OSError) as error:
        print_error(error)
        raise typer.Exit(FAILED) from None


def prepare_prefect(verbose: bool) -> None:
    """Settings that must stand before Prefect is imported. A setting of the user's own stays."""
    defaults = {
        # a temporary server on a busy machine has taken half a minute to start
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        # the command prints what a user can mend, once and without a traceback
        "PREFECT_LOGGING_LEVEL": "INFO" if verbose else "CRITICAL",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "tasks,training",
        # messages of the loader's threads belong to no run that Prefect knows of
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def end_soon_after_interrupt() -> None:
    """On Ctrl-C keep what is done, and end within seconds. A second Ctrl-C ends at once.

    The terminal interrupts Prefect's temporary server as well, and Prefect's client would ask it in vain for a minute.
    Whenever the process ends, a rerun goes on from the last row that was kept.
    """

    def end() -> None:
        os.write(2, b"\ninterrupted; run the same command again to go on from here\n")
        os._exit(INTERRUPTED)

    def interrupt(_signal: int, _frame: object) -> None:
        if timer.is_alive():
            end()
        timer.start()
        raise KeyboardInterrupt

    timer = threading.Timer(_GRACE_S, end)
    timer.daemon = True
    signal.signal(signal.SIGINT, interrupt)
