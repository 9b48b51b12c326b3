"""Ending Prefect's temporary server when a run is killed."""

import subprocess
import sys

# the watcher: waits until its standard input closes, then ends the processes that it was given
_WATCH = """
import os, signal, sys
sys.stdin.read()
for pid in sys.argv[1:]:
    try:
        os.kill(int(pid), signal.SIGTERM)
    except ProcessLookupError:
        pass
"""

_watcher: "subprocess.Popen[bytes] | None" = None


def end_server_with_us() -> None:
    """Let Prefect's temporary server, if this process has started one, end together with this process.

    Prefect stops the server when the process ends normally. After a SIGKILL the server would stay for good, and hold
    some 200 MB of memory. A small watcher process prevents that: its standard input closes when this process ends,
    however it ends, and the watcher then ends the server.
    """
    global _watcher
    import psutil

    children = psutil.Process().children()
    servers = [str(child.pid) for child in children if "uvicorn" in " ".join(child.cmdline())]
    if servers and _watcher is None:
        _watcher = subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", _WATCH, *servers], stdin=subprocess.PIPE, start_new_session=True
        )
