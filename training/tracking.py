"""Where a training's curves and samples go: a file of JSON lines always, trackers beside it."""

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from data_manifests.samples import brief
from data_manifests.storage import answering, locate
from tasks.stage import MissingBackend

_log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
_MLFLOW_RUN = "mlflow_run"  # holds the id of the run
KEPT_ON = (METRICS, _MLFLOW_RUN)  # files that a phase which goes on goes on with
MLFLOW_WHERE = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME")  # what says where runs go
_AGAIN_S = 300.0  # after which a server that did not answer is tried again
# curves wait for a server, so a training need not; MLflow's own are 7 and 120
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "15"}

End = Literal["finished", "stopped", "failed"]  # of a phase: at its last step, asked to end, by an error


class Tracker(Protocol):
    """Shows a training's numbers and samples somewhere."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show numbers of a step by name, such as loss."""

    def sample(self, step: int, name: str, video: Path, strip: Path) -> None:
        """Show a sample. video: an MP4 with sound. strip: a PNG of some of its frames side by side."""

    def flush(self) -> None:
        """Let what was shown so far be where it goes."""

    def close(self, end: End) -> None:
        """Nothing more will come."""


class Metrics:
    """metrics.jsonl: one line a logged step. What was logged after the step that a run goes on from is taken out."""

    def __init__(self, path: Path, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        aside = path.with_name(f".{path.name}.tmp")
        aside.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in kept))
        aside.replace(path)
        self._file = path.open("a")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}, sort_keys=True) + "\n")
        self.flush()

    def sample(self, step: int, name: str, video: Path, strip: Path) -> None:
        """Samples lie beside the file as it is."""

    def flush(self) -> None:
        self._file.flush()

    def close(self, end: End) -> None:
        self._file.close()


def read_metrics(path: Path | str, last: int | None = None) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl, at a path or any fsspec address, each with its step; none where there is no file. A
    line that a kill cut off is left out. Raises OSError where a store does not answer.

    last: bytes at the file's end, of which alone whole rows are given; all of the file when None.
    """
    rows = []
    try:
        with answering(str(path)):
            fs, place = locate(str(path))
            end = fs.cat_file(place, start=None if last is None else -last)
            lines = end.decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


class TensorBoardTracker:
    """Event files for TensorBoard, in `tensorboard` in a phase's folder."""

    def __init__(self, folder: Path, step: int, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if step == 0:
            rows = "".join(f"| {name} | {value} |\n" for name, value in flat(settings).items())
            self._writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}", step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def sample(self, step: int, name: str, video: Path, strip: Path) -> None:
        import numpy as np
        from PIL import Image

        self._writer.add_image(name, np.asarray(Image.open(strip).convert("RGB")), step, dataformats="HWC")
        self._writer.add_text(f"{name}/video", str(video.relative_to(self._folder)), step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self, end: End) -> None:
        self._writer.close()


class MLflowTracker:
    """A run of MLflow for each phase, on the server or in the database that MLFLOW_TRACKING_URI names: settings as
    parameters, numbers as metrics by step, samples as artifacts. A phase that goes on, goes on in its run; steps that
    it takes once more, since the checkpoint was before them, are in the run twice.

    A server that falls silent ends no phase: numbers go out when it answers again, samples lie in the folder.
    """

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        """Raises MissingBackend where MLflow is not installed or does not answer."""
        check_mlflow()
        import mlflow  # type: ignore[import-not-found]

        note = folder / _MLFLOW_RUN
        known = note.read_text().strip() if note.exists() else None
        self._mlflow = mlflow
        self._unsent: list[tuple[int, dict[str, float]]] = []
        self._silent_since = float("-inf")
        try:
            self._run = mlflow.start_run(run_id=known, run_name=None if known else name)
        except mlflow.MlflowException as error:
            again = f"; remove {note} to begin a new run" if known else ""
            raise MissingBackend(f"MLflow starts no run for phase {name}: {brief(error)}{again}") from None
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(self._run.info.run_id)
        if not known:
            with self._answering("the settings"):
                mlflow.log_params(flat(settings))

    @contextlib.contextmanager
    def _answering(self, what: str) -> Iterator[None]:
        """A warning where the server does not answer."""
        try:
            yield
        except Exception as error:  # the server's and the artifact store's are of many kinds
            self._silent_since = time.monotonic()
            _log.warning("MLflow has not got %s: %s", what, brief(error))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._unsent.append((step, dict(values)))
        if time.monotonic() >= self._silent_since + _AGAIN_S:
            self._send()

    def _send(self) -> None:
        with self._answering("the newest curves"):
            while self._unsent:
                step, values = self._unsent[0]
                self._mlflow.log_metrics(values, step=step)
                del self._unsent[0]

    def sample(self, step: int, name: str, video: Path, strip: Path) -> None:
        with self._answering(f"sample {name} of step {step}"):
            for path in (video, strip):
                self._mlflow.log_artifact(str(path), f"samples/step-{step:08d}")

    def flush(self) -> None:
        """What is not sent yet waits for the server."""

    def close(self, end: End) -> None:
        self._send()
        with self._answering("the end of the run"):
            self._mlflow.end_run({"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[end])


def check_mlflow() -> None:
    """Raises MissingBackend where MLflow is not installed, or the server does not answer."""
    try:
        import mlflow
    except ImportError:
        raise MissingBackend(
            "mlflow is not installed: pip install 'understudy[mlflow]', or take tensorboard in the recipe's "
            "run.trackers"
        ) from None
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    try:
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "understudy"))
    except Exception as error:  # of the server, or of the database
        raise MissingBackend(
            f"MLflow cannot be used: {brief(error)}; see to the server that MLFLOW_TRACKING_URI names, or take "
            "tensorboard in the recipe's run.trackers"
        ) from None


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Settings within settings as one level: {"data": {"fps": 25}} is {"data.fps": 25}."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return found


class Trackers:
    """All trackers of a phase as one."""

    def __init__(self, folder: Path, phase: str, step: int, names: Iterable[str], settings: Mapping[str, Any]) -> None:
        """step: that the phase goes on from. settings: all that decides what it learns."""
        self._all: list[Tracker] = [Metrics(folder / METRICS, step)]
        for name in names:
            if name == "tensorboard":
                self._all.append(TensorBoardTracker(folder, step, settings))
            elif name == "mlflow":
                self._all.append(MLflowTracker(folder, phase, settings))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tracker in self._all:
            tracker.scalars(step, values)

    def sample(self, step: int, name: str, video: Path, strip: Path) -> None:
        for tracker in self._all:
            tracker.sample(step, name, video, strip)

    def flush(self) -> None:
        for tracker in self._all:
            tracker.flush()

    def close(self, end: End) -> None:
        for tracker in self._all:
            tracker.close(end)
