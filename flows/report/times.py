"""times.json: the time that each step has taken, over all runs in an output folder."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from data_manifests.storage import Storage
from flows.report.charts import percent
from tasks.review.run_folder import RunFolder

if TYPE_CHECKING:
    from tasks.execution.work import StepTotals

TIMES = "times.json"


def add_times(storage: Storage, fingerprints: Mapping[str, str], totals: "Mapping[str, StepTotals]") -> None:
    """Add the time that a run took to times.json, by step. The time of another fingerprint is replaced.

    times.json, and the report that shows it, are the only files of an output folder that depend on how long a run took.
    """
    if not totals:
        return
    times = read_times(storage)
    for name, total in totals.items():
        made = fingerprints[name]
        known = times.get(name, {})
        before = known if known.get("fingerprint") == made else {"units": 0, "seconds": 0.0}
        times[name] = {
            "fingerprint": made,
            "units": before["units"] + total.done,
            "seconds": round(before["seconds"] + total.seconds, 3),
        }
    storage.write_bytes(TIMES, json.dumps(times, indent=1).encode() + b"\n")


def read_times(storage: Storage) -> dict[str, dict[str, Any]]:
    """Fingerprint, units and seconds by step; {} when times.json is missing or damaged."""
    try:
        content = json.loads(storage.read_bytes(TIMES))
        times = {
            str(name): {"fingerprint": str(t["fingerprint"]), "units": int(t["units"]), "seconds": float(t["seconds"])}
            for name, t in content.items()
        }
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return {}
    return times


def times_table(run: RunFolder) -> list[dict[str, Any]]:
    """The rows of the report's table of times, one a step.

    Each has name, fingerprint, units, seconds, each (seconds a unit), share (percent of the longest step's seconds),
    rejected (percent of the measured clips that the stage's rules drop) and cost (seconds that the stage spends for
    each clip that it drops). Rejected and cost are None where they have no meaning. Stages with a low cost should come
    first in a recipe.
    """
    times = read_times(run.storage)
    rows = []
    for name, fingerprint in run.fingerprints.items():
        time = times.get(name)
        if time is None or time["fingerprint"] != fingerprint or not time["units"]:
            continue
        measured = dropped = 0
        if name in run.stages:
            measured = int(run.frame[f"{name}.status"].notna().sum())
            dropped = int(((run.decisions["verdict"] == "drop") & (run.decisions["stage"] == name)).sum())
        each = time["seconds"] / time["units"]
        rows.append(
            time
            | {
                "name": name,
                "each": each,
                "rejected": percent(dropped, measured) if measured else None,
                "cost": each * measured / dropped if dropped else None,
            }
        )
    most = max((row["seconds"] for row in rows), default=0.0) or 1.0
    return [row | {"share": percent(row["seconds"], most)} for row in rows]
