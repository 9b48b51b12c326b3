"""`understudy show`: the card of one clip of a finished run."""

from pathlib import Path
from typing import Any

from flows.report.pages import check_writable, short
from tasks.review.clip_card import show_clip
from tasks.review.refusal import Refused
from tasks.review.run_folder import RunFolder

_VERDICTS = {"keep": "kept", "drop": "dropped"}


def show_clip_of(out: str, prefix: str, to: Path | None) -> Path:
    """Draw the card of a clip into a file. Returns the file's path.

    out: address of the run. prefix: a clip_id, or the beginning of one. to: the file, .mp4 or .png; CLIP_ID.mp4 in the
    current folder when None.

    Raises Refused when no clip or several clips begin with `prefix`, or when the file cannot be written.
    """
    if to is not None and to.suffix not in (".mp4", ".png"):
        raise Refused(
            f"{to}: a clip is shown as .mp4 (a video) or .png (an image); give a name with one of these endings"
        )
    if to is not None:
        check_writable(to)
    run = RunFolder(out)
    clip_id = run.find(prefix)
    # only the last part of the name, so that the file lies in the current folder whatever a foreign run's clip_ids hold
    path = to or Path(Path(f"{clip_id}.mp4").name)
    check_writable(path)
    ((record, results),) = run.clips([clip_id], remade=False)
    scores = {f"{result.stage}.{name}": value for result in results for name, value in result.columns.items()}
    with run.open(record, results) as clip:
        show_clip(clip, {**_verdict(run, clip_id), "scores": scores}, path)
    return path


def _verdict(run: RunFolder, clip_id: str) -> dict[str, Any]:
    """The clip's verdict and its reason, as the card takes them."""
    decision = run.decisions.loc[clip_id]
    verdict = str(decision["verdict"])
    reason = {
        "keep": f"tier {decision['tier']}",
        "drop": f"{decision['rule']}: {short(decision['value'])}, wanted {decision['threshold']}",
        "error": f"{decision['stage']}: {decision['error']}",
    }.get(verdict, f"not measured by {decision['stage']} yet")
    return {"verdict": _VERDICTS.get(verdict, verdict), "reason": reason}
