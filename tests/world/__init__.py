"""Footage with known truth: talking people made by program, awkward and broken files, and one table that says all."""

from tests.world.make import catalogue, make
from tests.world.measure import measure_events
from tests.world.truth import Truth, read_table

__all__ = ["Truth", "catalogue", "make", "measure_events", "read_table"]
