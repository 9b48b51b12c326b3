"""`understudy show`: one clip of a finished run with all that was found in it."""

from pathlib import Path
from typing import Any

from flows.pages import check_writable, short
from tasks.run_folder import Refused, RunFolder
from tasks.show import show_clip

_VERDICTS = {"keep": "kept", "drop": "dropped"}


def show_clip_of(out: str, prefix: str, to: Path | None) -> Path:
    """Draw the clip that `prefix` names into a file; CLIP_ID.mp4 in this folder when `to` is None.

    Raises Refused when no clip, or more than one, is called so, or for another kind of file.
    """
    if to is not None and to.suffix not in (".mp4", ".png"):
        raise Refused(f"{to}: a clip is shown as .mp4, a film, or .png, a picture; give a name that ends so")
    if to is not None:
        check_writable(to)
    run = RunFolder(out)
    clip_id = run.find(prefix)
    path = to or Path(Path(f"{clip_id}.mp4").name)  # here, whatever somebody's run calls its clips
    check_writable(path)
    ((record, findings),) = run.clips([clip_id], remade=False)
    scores = {f"{finding.stage}.{name}": value for finding in findings for name, value in finding.columns.items()}
    with run.open(record, findings) as clip:
        show_clip(clip, {**_verdict(run, clip_id), "scores": scores}, path)
    return path


def _verdict(run: RunFolder, clip_id: str) -> dict[str, Any]:
    decision = run.decisions.loc[clip_id]
    verdict = str(decision["verdict"])
    reason = {
        "keep": f"tier {decision['tier']}",
        "drop": f"{decision['rule']}: {short(decision['value'])}, wanted {decision['threshold']}",
        "error": f"{decision['stage']}: {decision['error']}",
    }.get(verdict, f"not measured by {decision['stage']} yet")
    return {"verdict": _VERDICTS.get(verdict, verdict), "reason": reason}
