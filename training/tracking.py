"""Where a training's curves and samples go: a file of JSON lines always, trackers beside it."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from data_manifests.storage import answering, locate
from tasks.stage import MissingBackend

METRICS = "metrics.jsonl"
_MLFLOW_RUN = "mlflow_run"  # holds the id of the run
KEPT_ON = (METRICS, _MLFLOW_RUN)  # files that a phase which goes on goes on with


class Tracker(Protocol):
    """Shows a training's numbers and samples somewhere."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show numbers of a step by name, such as loss."""

    def sample(self, step: int, name: str, video: Path, strip: Path) -> None:
        """Show a sample. video: an MP4 with sound. strip: a PNG of some of its frames side by side."""

    def flush(self) -> None:
        """Let what was shown so far be where it goes."""

    def close(self) -> None:
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

    def close(self) -> None:
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

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

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

    def close(self) -> None:
        self._writer.close()


class MLflowTracker:
    """A run of MLflow for each phase, on the server that MLFLOW_TRACKING_URI names. A phase that goes on, goes on in
    its run."""

    def __init__(self, folder: Path, name: str) -> None:
        check_mlflow()
        import mlflow  # type: ignore[import-not-found]

        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "understudy"))
        note = folder / _MLFLOW_RUN
        known = note.read_text().strip() if note.exists() else None
        self._mlflow = mlflow
        self._run = mlflow.start_run(run_id=known, run_name=None if known else name)
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(self._run.info.run_id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        # MLflow's names know no more than letters, digits, /, -, ., _ and blanks
        self._mlflow.log_metrics(dict(values), step=step)

    def sample(self, step: int, name: str, video: Path, strip: Path) -> None:
        self._mlflow.log_artifact(str(video), f"samples/step-{step:08d}")
        self._mlflow.log_artifact(str(strip), f"samples/step-{step:08d}")

    def flush(self) -> None:
        """Each call above has sent what it was given before it returned."""

    def close(self) -> None:
        self._mlflow.end_run()


def check_mlflow() -> None:
    """Raises MissingBackend where MLflow is not installed."""
    try:
        import mlflow  # noqa: F401
    except ImportError:
        raise MissingBackend(
            "mlflow is not installed: pip install mlflow, or take tensorboard in the recipe's run.trackers"
        ) from None


class Trackers:
    """All trackers of a phase as one."""

    def __init__(self, folder: Path, phase: str, step: int, names: Iterable[str]) -> None:
        self._all: list[Tracker] = [Metrics(folder / METRICS, step)]
        for name in names:
            if name == "tensorboard":
                self._all.append(TensorBoardTracker(folder, step))
            elif name == "mlflow":
                self._all.append(MLflowTracker(folder, phase))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tracker in self._all:
            tracker.scalars(step, values)

    def sample(self, step: int, name: str, video: Path, strip: Path) -> None:
        for tracker in self._all:
            tracker.sample(step, name, video, strip)

    def flush(self) -> None:
        for tracker in self._all:
            tracker.flush()

    def close(self) -> None:
        for tracker in self._all:
            tracker.close()
