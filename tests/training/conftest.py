"""What the tests of training share."""

from tests.one_thread import one_thread  # noqa: F401
