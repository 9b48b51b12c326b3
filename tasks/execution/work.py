"""What a curation has its workers do: steps, pieces of work, their units, and the rows that come of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa


class Progress(Protocol):
    """A callback that a piece of work reports its progress to."""

    def __call__(self, done: int, total: int, errors: int, by_step: Mapping[str, int] = ...) -> None:
        """done: units done. total: all units. errors: units in error so far. by_step: rows made, by step."""


@dataclass(frozen=True)
class RowResult:
    """A ledger row, without its key and the hash of its inputs."""

    row: dict[str, Any]
    seconds: float
    """Wall time that the row took."""


UnitJob = Callable[[Any], dict[str, RowResult]]
"""Takes a unit's payload in a worker, and gives the rows that the unit lacks, by step. It must pickle."""


@dataclass(frozen=True)
class Unit:
    """One source or clip that lacks a row."""

    step: str
    """The first step whose row it lacks."""
    key: str
    """A uri, source_id or clip_id: the key of its rows."""
    inputs: str
    """The hash of the manifest fields that the row depends on."""
    payload: Any
    """What the job is given."""


@dataclass(frozen=True)
class Step:
    """One table of the ledger, and how a missing row of it is made."""

    name: str
    job: UnitJob
    fingerprint: str
    schema: pa.Schema
    about: dict[str, Any]
    """What the fingerprint is made of: "version", "backend_version" and "settings"."""
    gone: Callable[[dict[str, Any]], bool] = lambda row: False
    """Whether a row names files that are no longer in the storage."""

    def differences(self, before: dict[str, Any]) -> list[str]:
        """Each setting or version that differs from an earlier `about`, as "KEY BEFORE -> NOW"."""
        then, now = _flat(before), _flat(self.about)
        keys = sorted(then.keys() | now.keys())
        return [f"{key} {then.get(key)!r} -> {now.get(key)!r}" for key in keys if then.get(key) != now.get(key)]


def _flat(about: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in about.items() if key != "settings"} | (about.get("settings") or {})


@dataclass(frozen=True)
class Work:
    """One piece of work: a job, and the units of a group of partitions that it is for."""

    name: str
    job: UnitJob
    steps: tuple[str, ...]
    """The steps whose rows the job makes, in order."""
    partitions: Sequence[int]
    units: list[Unit]
    fused: bool = False
    """Whether several steps share one fetch and one decoding of a unit. A unit that ends its worker in fused work gets
    no row: which step was at fault is not known."""
    lost: set[str] = field(default_factory=set)
    """Keys of the units that have ended their worker in fused work. The runner adds to it."""

    @property
    def group(self) -> str:
        """The partitions in words, such as "0-15"."""
        return f"{self.partitions[0]}-{self.partitions[-1]}"


@dataclass(frozen=True)
class StepTotals:
    """What a step has done."""

    done: int
    """Rows made."""
    errors: int
    """Those of them with an error."""
    seconds: float
    """Wall time, shared out among the steps of fused work."""

    def __add__(self, other: "StepTotals") -> "StepTotals":
        return StepTotals(self.done + other.done, self.errors + other.errors, self.seconds + other.seconds)


Totals = dict[str, StepTotals]
"""By step."""


def add_totals(totals: Totals, more: Mapping[str, StepTotals]) -> None:
    """Add to totals, step by step."""
    for name, added in more.items():
        totals[name] = totals[name] + added if name in totals else added


def share_seconds(totals: Mapping[str, StepTotals], seconds: float) -> Totals:
    """Share the wall time of a piece of work among its steps, by the seconds that each took in the workers.

    A step without a row is left out.
    """
    together = sum(total.seconds for total in totals.values())
    shares = {name: total.seconds / together if together else 1 / len(totals) for name, total in totals.items()}
    return {
        name: StepTotals(total.done, total.errors, seconds * shares[name])
        for name, total in totals.items()
        if total.done
    }
