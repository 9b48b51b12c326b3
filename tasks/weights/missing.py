"""The error of a backend that cannot run on this machine."""


class MissingBackend(RuntimeError):
    """A backend's library or weights are not on this machine.

    The message names what is missing, where it was looked for, how to get it, and which embedded backend can be used
    instead.
    """
