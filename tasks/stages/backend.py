"""The contract of a backend: one way to measure, which a recipe chooses by its name.

What a backend is made from, what it takes and what it returns differ from stage to stage. Each stage has a base class
of its own that adds this to `Backend`, such as `optical_flow.FlowBackend`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tasks.weights import store as weights


@dataclass(frozen=True)
class Resources:
    """What one copy of a backend needs while it works. Each worker holds a copy of its own."""

    cpus: float = 1.0
    """CPU cores."""
    gpu: float = 0.0
    """Share of a GPU, 0 to 1, where the machine has one. 0 for a backend that never uses a GPU."""
    memory_gb: float = 0.1
    """Gigabytes: of the GPU's memory for a backend that uses a GPU, else of the machine's.

    For a backend without published weights it is measured (`python -m benchmarks.backends`), rounded up to one decimal.
    For a backend with published weights it is their size in the precision that it computes in, plus an allowance for
    libraries and activations, which is stated beside it."""
    batch: int = 1
    """Frames, or pairs of frames, that are computed at a time."""


class Backend:
    """One way to measure. A subclass sets what it needs; the defaults suit a backend that needs nothing.

    A backend keeps no memory of earlier clips: the same clip gives the same numbers, whatever came before it.
    """

    networks: ClassVar[tuple[str, ...]] = ()
    """The published weights that it needs, by their names in tasks.weights.catalogue."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Defaults of the stage's settings that differ for this backend. They hold where a recipe names the backend and
    leaves the setting out, so the stage's default backend has none."""
    resources: ClassVar[Resources] = Resources()
    """What one copy needs."""

    @classmethod
    def version(cls) -> str:
        """The libraries and weights that can change a number; "" where all the code is the stage's own.

        It is part of the fingerprint of every row. Raises tasks.weights.missing.MissingBackend.
        """
        return ""

    @classmethod
    def check(cls, settings: Any) -> None:
        """Check that the backend can run under a stage's settings, before any work starts.

        Without an override it checks the weights. Raises tasks.weights.missing.MissingBackend.
        """
        for name in cls.networks:
            weights.check(name)
