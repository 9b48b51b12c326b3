"""Nothing left running by a run that was killed."""

import subprocess
import sys

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
    """See that Prefect's temporary server, if this process has started one, does not outlive it.

    Prefect stops it when the process ends by itself; after a SIGKILL it would stay for good, with some 200 MB. The
    watcher's standard input closes with this process, however that ends.
    """
    global _watcher
    import psutil

    children = psutil.Process().children()
    servers = [str(child.pid) for child in children if "uvicorn" in " ".join(child.cmdline())]
    if servers and _watcher is None:
        _watcher = subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", _WATCH, *servers], stdin=subprocess.PIPE, start_new_session=True
        )
