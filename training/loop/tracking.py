"""Where a training's metrics and samples go: always to metrics.jsonl, and to the recipe's trackers."""

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from data_manifests.samples import one_line
from data_manifests.storage import answering, locate
from tasks.weights.missing import MissingBackend

_log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
_MLFLOW_RUN = "mlflow_run"  # a file that holds the id of the run
RESUMED_FILES = (METRICS, _MLFLOW_RUN)  # files that a resumed phase goes on writing
MLFLOW_VARIABLES = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME")  # environment variables: where runs go
_RETRY_S = 300.0  # from an unanswered request to the next one
# MLflow's own values are 7 and 120. Metrics that are not sent are kept, so the training need not wait.
_MLFLOW_REQUESTS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "15"}

# how a run of a phase ended: at its last step, because it was asked to stop, or by an error
PhaseEnd = Literal["finished", "stopped", "failed"]


class Tracker(Protocol):
    """Stores or shows a training's metrics and samples."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record the metrics of a step by name, such as loss."""

    def sample(self, step: int, name: str, video: Path, strip: Path) -> None:
        """Record a sample. video: an MP4 with sound. strip: a PNG of some of its frames side by side."""

    def flush(self) -> None:
        """Write or send what was recorded so far."""

    def close(self, end: PhaseEnd) -> None:
        """Finish. Nothing is recorded after it."""


class MetricsFile:
    """metrics.jsonl: one line for each logged step.

    step: the step that the run resumes from. Lines of later steps are removed.
    """

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

    def skipped(self, step: int, samples: Sequence[str]) -> None:
        """Record a batch that was skipped at a step. samples: the clip ids for which it was not finite."""
        self._file.write(json.dumps({"step": step, "skipped": list(samples)}, sort_keys=True) + "\n")
        self.flush()

    def sample(self, step: int, name: str, video: Path, strip: Path) -> None:
        """Nothing to do: the sample's files are in the same folder."""

    def flush(self) -> None:
        self._file.flush()

    def close(self, end: PhaseEnd) -> None:
        self._file.close()


def read_metrics(path: Path | str, last: int | None = None) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl at a path or any fsspec address. Each has its step.

    No rows where there is no file. A line that was cut off is left out.

    last: read only this many bytes at the file's end, and return the complete rows among them. None: the whole file.

    Raises OSError when a store does not answer.
    """
    rows = []
    try:
        with answering(str(path)):
            fs, place = locate(str(path))
            data = fs.cat_file(place, start=None if last is None else -last)
            lines = data.decode("utf-8", "replace").splitlines()
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
    """Event files for TensorBoard, in the folder `tensorboard` of a phase's output folder."""

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

    def close(self, end: PhaseEnd) -> None:
        self._writer.close()


class MLflowTracker:
    """A run of MLflow for each phase, on the server or in the database that MLFLOW_TRACKING_URI names.

    Settings become parameters, metrics become metrics by step, samples become artifacts. A resumed phase goes on in its
    run. Steps after the checkpoint that it resumes from are in the run twice.

    A server that stops answering ends no phase. Metrics are sent when it answers again. Samples stay in the phase's
    folder.

    Raises MissingBackend when MLflow is not installed or does not answer at the start.
    """

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        check_mlflow()
        import mlflow  # type: ignore[import-not-found]

        run_file = folder / _MLFLOW_RUN
        known = run_file.read_text().strip() if run_file.exists() else None
        self._mlflow = mlflow
        self._unsent: list[tuple[int, dict[str, float]]] = []
        self._failed_at = float("-inf")
        try:
            self._run = mlflow.start_run(run_id=known, run_name=None if known else name)
        except mlflow.MlflowException as error:
            hint = f"; remove {run_file} to begin a new run" if known else ""
            raise MissingBackend(f"MLflow starts no run for phase {name}: {one_line(error)}{hint}") from None
        folder.mkdir(parents=True, exist_ok=True)
        run_file.write_text(self._run.info.run_id)
        if not known:
            with self._warn_on_failure("the settings"):
                mlflow.log_params(flat(settings))

    @contextlib.contextmanager
    def _warn_on_failure(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the server and the artifact store raise exceptions of many kinds
            self._failed_at = time.monotonic()
            _log.warning("MLflow did not take %s: %s", what, one_line(error))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._unsent.append((step, dict(values)))
        if time.monotonic() >= self._failed_at + _RETRY_S:
            self._send()

    def _send(self) -> None:
        with self._warn_on_failure("the newest metrics"):
            while self._unsent:
                step, values = self._unsent[0]
                self._mlflow.log_metrics(values, step=step)
                del self._unsent[0]

    def sample(self, step: int, name: str, video: Path, strip: Path) -> None:
        with self._warn_on_failure(f"sample {name} of step {step}"):
            for path in (video, strip):
                self._mlflow.log_artifact(str(path), f"samples/step-{step:08d}")

    def flush(self) -> None:
        """Nothing to do: metrics are sent at once, or when the server answers again."""

    def close(self, end: PhaseEnd) -> None:
        self._send()
        with self._warn_on_failure("the end of the run"):
            self._mlflow.end_run({"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[end])


def check_mlflow() -> None:
    """Raises MissingBackend when MLflow is not installed, or its server does not answer."""
    try:
        import mlflow
    except ImportError:
        raise MissingBackend(
            "mlflow is not installed: pip install 'understudy[mlflow]', or use tensorboard in the recipe's "
            "training.run.trackers"
        ) from None
    for name, value in _MLFLOW_REQUESTS.items():
        os.environ.setdefault(name, value)
    try:
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "understudy"))
    except Exception as error:  # the server or the database raises exceptions of many kinds
        raise MissingBackend(
            f"MLflow cannot be used: {one_line(error)}; check the server that MLFLOW_TRACKING_URI names, or use "
            "tensorboard in the recipe's training.run.trackers"
        ) from None


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings as one level: {"data": {"fps": 25}} becomes {"data.fps": 25}."""
    flattened: dict[str, Any] = {}
    for key, value in settings.items():
        flattened |= flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return flattened


class Trackers:
    """All trackers of a phase as one: metrics.jsonl, and those of the recipe.

    step: the step that the phase resumes from. names: the recipe's trackers. settings: those that decide what the phase
    learns (training.loop.phases.settings_of).
    """

    def __init__(self, folder: Path, phase: str, step: int, names: Iterable[str], settings: Mapping[str, Any]) -> None:
        self._file = MetricsFile(folder / METRICS, step)
        self._all: list[Tracker] = [self._file]
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

    def skipped(self, step: int, samples: Sequence[str]) -> None:
        """Record a skipped batch, in metrics.jsonl alone."""
        self._file.skipped(step, samples)

    def flush(self) -> None:
        for tracker in self._all:
            tracker.flush()

    def close(self, end: PhaseEnd) -> None:
        for tracker in self._all:
            tracker.close(end)
