"""The lines of the funnel in words, from the rows of the source manifest to the tiers; and the errors beside it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

FunnelLine = tuple[str, int, float | None]
"""A label, a count of rows, sources or clips, and their hours. Hours are None where they are not known."""

_STATUS_WORDS = {"bad row": "  bad rows", "error": "  in error", "duplicate": "  duplicates", "ok": "sources"}
_WORDS = {
    "in": "clips",
    "dropped": "  dropped: fails {reason}",
    "dropped by name": "  dropped: {rule}",
    "error": "  {stage}: {reason}",
    "pending": "  {stage}: {reason}",
    "left": "  left after {stage}",
    "kept": "kept",
    "audio": "  sound {reason}",
    "tier": "  tier {reason}",
}


def source_lines(rows: Sequence[Mapping[str, Any]], skipped: "pd.DataFrame") -> list[FunnelLine]:
    """The lines about sources.

    rows: the rows of sources.csv. skipped: the parts of the footage that no clip shows, as `LedgerView.skipped` returns
        them.
    """
    lines: list[FunnelLine] = [("rows of the manifest", len(rows), None)]
    for status in ("bad row", "error", "duplicate", "ok"):
        some = [row for row in rows if row["status"] == status]
        hours = sum(row.get("duration_s") or 0.0 for row in some) / 3600
        if some or status == "ok":
            lines.append((_STATUS_WORDS[status], len(some), hours if status == "ok" else None))
    ours = skipped[skipped["key"].isin([row["source_id"] for row in rows if row.get("source_id")])]
    for reason, some in ours.groupby("reason"):
        lines.append((f"  parts left out: {reason}", len(some), float((some["end_s"] - some["start_s"]).sum()) / 3600))
    return lines


def clip_lines(table: "pd.DataFrame") -> list[FunnelLine]:
    """The lines about clips. A line "left after STAGE" is given only for a stage that can drop clips or has lost some.

    table: as tasks.policy.decide.funnel returns it.
    """
    deciding = set(table["stage"][(table["what"] == "dropped") | (table["clips"] > 0) & (table["what"] != "left")])
    return [
        (funnel_label(row), row["clips"], row["hours"])
        for row in table.to_dict("records")
        if (row["stage"] in deciding if row["what"] == "left" else row["clips"])
        or row["what"] in ("in", "kept", "tier", "dropped")
    ]


def funnel_label(row: Mapping[str, Any]) -> str:
    """The label of a row of tasks.policy.decide.funnel's table: what it counts, in words."""
    what = "dropped by name" if row["what"] == "dropped" and row["reason"] == row["rule"] else row["what"]
    return _WORDS[what].format(**row)


def list_problems(sources: Sequence[Mapping[str, Any]], decisions: "pd.DataFrame") -> list[tuple[str, str]]:
    """(where, why) for each manifest row, source and clip that ended in an error. `where` is an address, a place in the
    manifest or a clip_id.

    sources: the rows of sources.csv. decisions: as tasks.policy.decide.decide returns them.
    """
    rows = [row for row in sources if row["status"] in ("error", "bad row")]
    failed = decisions[decisions["verdict"] == "error"]
    return [(row["uri"] or row["where"], row["reason"]) for row in rows] + [
        (clip_id, f"{stage}: {error}")
        for clip_id, stage, error in zip(failed.index, failed["stage"], failed["error"], strict=True)
    ]
