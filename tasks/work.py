"""What a curation has its workers do: pieces of work, their units, and what came of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa


class Progress(Protocol):
    def __call__(self, done: int, total: int, errors: int, by_step: Mapping[str, int] = ...) -> None:
        """Units done, units in all, errors so far, and the rows made by each of several steps."""


@dataclass(frozen=True)
class Made:
    """A row of the ledger but for its key and the hash of its inputs, and the seconds that it took to make."""

    row: dict[str, Any]
    seconds: float


@dataclass(frozen=True)
class Work:
    """What the workers do for each of many units.

    job: makes the rows that a unit lacks, by step. units: those of these partitions that lack one, each with its key
    and the hash of its inputs.
    """

    name: str
    job: Callable[[Any], dict[str, Made]]
    units: Callable[[Sequence[int]], list["Unit"]]


@dataclass(frozen=True)
class Joint(Work):
    """Several steps that share the decoding of a unit. steps: their names, in order."""

    steps: tuple[str, ...]


@dataclass(frozen=True)
class Step(Work):
    """One table of the ledger and how its missing rows are made.

    about: what the fingerprint is made of: "version", "backend_version" and, within "settings", the step's. gone:
    whether a row speaks of files that are no longer in the storage.
    """

    fingerprint: str
    schema: pa.Schema
    about: dict[str, Any]
    gone: Callable[[dict[str, Any]], bool] = lambda row: False

    def differences(self, before: dict[str, Any]) -> list[str]:
        """What has changed since rows were made by a step that was `about` that."""
        then, now = _flat(before), _flat(self.about)
        keys = sorted(then.keys() | now.keys())
        return [f"{key} {then.get(key)!r} -> {now.get(key)!r}" for key in keys if then.get(key) != now.get(key)]


def _flat(about: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in about.items() if key != "settings"} | (about.get("settings") or {})


@dataclass(frozen=True)
class Unit:
    """One unit of work, and the row of which step it lacks first."""

    step: str
    key: str
    inputs: str
    value: Any


@dataclass(frozen=True)
class StepResult:
    done: int
    errors: int
    seconds: float

    def __add__(self, other: "StepResult") -> "StepResult":
        return StepResult(self.done + other.done, self.errors + other.errors, self.seconds + other.seconds)


Run = Callable[[Work, Sequence[int], list[Unit]], dict[str, StepResult]]  # a piece of work, the partitions, the units


def shared_out(tally: Mapping[str, StepResult], seconds: float) -> dict[str, StepResult]:
    """The time that a piece of work took, shared out by what its steps took of the workers."""
    together = sum(result.seconds for result in tally.values())
    shares = {name: result.seconds / together if together else 1 / len(tally) for name, result in tally.items()}
    return {
        name: StepResult(result.done, result.errors, seconds * shares[name])
        for name, result in tally.items()
        if result.done
    }
