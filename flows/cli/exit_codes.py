"""The exit codes of the `understudy` command."""

DONE = 0
DONE_WITH_ERRORS = 1
"""Done, but some sources, clips or samples are in error."""
FAILED = 2
INTERRUPTED = 130
"""Asked to end, by Ctrl-C or SIGTERM; what is done is kept."""
