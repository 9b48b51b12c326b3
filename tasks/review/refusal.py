"""The error of a question about a run that cannot be answered."""


class Refused(ValueError):
    """What the user asked of a finished run cannot be done. The message says why, and what to do instead."""
