"""Training of one phase, as each of its workers runs it."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import nn

from data_manifests.storage import Storage
from training.loop import checkpoint, phases
from training.loop.ema import ExponentialMovingAverage
from training.loop.job import BatchStream, Job, Learner, PhaseResult, TrainingError
from training.loop.metrics import StepMetrics
from training.loop.outputs import OutputFolder
from training.loop.parallel import (
    WorkerGroup,
    autocast,
    clip_gradients,
    gradient_norm,
    gradient_sync,
    local_tensor,
    parallelize,
    place_of,
    unwrap,
)
from training.loop.skipped import WINDOW, MicroBatchLosses, SkippedBatches, not_finite_samples
from training.loop.stopping import LOOK_EVERY_S, StopFile, stop_signals
from training.loop.tracking import METRICS, RESUMED_FILES, PhaseEnd, Trackers

_log = logging.getLogger(__name__)

ReportCheckpoint = Callable[[dict[str, float]], None]  # takes the step and the loss of a checkpoint


def train_phase(
    job: Job, group: WorkerGroup, report: ReportCheckpoint | None = None, leaving: Callable[[], bool] | None = None
) -> PhaseResult:
    """Train a phase to its end, resuming from its latest checkpoint if there is one. Every worker calls it.

    report: called on every worker at each checkpoint.
    leaving: called on every worker every few seconds; the same on every worker. Once it is True, since a machine will
    be taken away, a checkpoint is made.

    Raises TrainingError, phases.PhaseError, checkpoint.CheckpointError and anything that the loader raises.
    """
    learner = job.learner(job, group)
    settings = phases.settings_of(job.recipe, job.phase, learner.dataset)
    finished = phases.about_weights(job.out, job.phase)
    if finished is not None:
        _check_same_settings(job, finished["settings"], settings)
        if finished["step"] >= job.settings.steps:
            step, loss = finished["step"], finished["loss"]
            return PhaseResult(job.phase, step, True, step, loss, finished["started_from"])
    with _PhaseRun(job, group, learner, settings) as run:
        return run.train(report, leaving)


def _check_same_settings(job: Job, before: dict[str, Any], now: dict[str, Any]) -> None:
    if before.get("dataset") != now["dataset"]:
        raise TrainingError(
            f"{job.folder} holds a training on another dataset than {job.manifest} is now; give another output folder"
        )
    not_default = phases.settings_of(job.recipe, job.phase, now["dataset"], without_defaults=True)
    differences = phases.changed_settings(before, now, not_default)
    if differences:
        raise TrainingError(
            f"{job.folder} holds a training with other settings; give another output folder, or undo these changes:\n"
            + "\n".join(differences)
        )


class _PhaseRun:
    """A worker's model, optimizer and data in one run of a phase, restored from the latest checkpoint.

    A context manager: leaving the context closes the data, the trackers and the output folder.
    """

    def __init__(self, job: Job, group: WorkerGroup, learner: Learner, settings: dict[str, Any]) -> None:
        self._job, self._group, self._learner, self._settings = job, group, learner, settings
        self._run_settings = job.recipe.run
        self._checkpoints = Storage(f"{job.folder}/checkpoints")
        if group.is_leader:
            checkpoint.remove_incomplete(self._checkpoints)
        group.barrier()
        latest = checkpoint.latest(self._checkpoints)
        progress = checkpoint.read_progress(self._checkpoints, latest) if latest else {}
        if latest is None:
            self._trained_origins = phases.trained_origins(job.phase, job.recipe, job.out)
            model = learner.model(phases.starting_scale(job.phase, job.recipe, job.out))
        else:
            _check_same_settings(job, progress["settings"], settings)
            model = learner.model(phases.latent_scale_in(progress))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(learner.part_of(name) in job.settings.train)
        self._prepare_model(model, is_new=latest is None)
        self._started_from = self._origins() if latest is None else progress["started_from"]
        self._prepare_optimizer()
        self._restore(latest, progress)
        self._saved_at = self._looked_at = time.monotonic()
        self._loss = float("nan") if progress.get("loss") is None else progress["loss"]
        self._open_outputs()

    def _prepare_model(self, model: nn.Module, is_new: bool) -> None:
        learner, run, group = self._learner, self._run_settings, self._group
        if run.activation_checkpointing:
            learner.enable_activation_checkpointing(model)
        if run.compile:
            for block in learner.blocks(model):
                block.compile()

        def keep_empty(_model: nn.Module) -> None:
            """The checkpoint gives the weights."""

        fill = self._fill if is_new else keep_empty
        self._parallel_model = parallelize(model, group, run.sharding, learner.units(model), fill)
        self._model = unwrap(self._parallel_model)

    def _fill(self, model: nn.Module) -> None:
        """Give the parameters the values that the phase starts from: each worker reads or draws one parameter after the
        other, and keeps its part."""
        job, learner, own = self._job, self._learner, dict(model.named_parameters())
        shapes = {name: parameter.shape for name, parameter in own.items()}
        with phases.StartingWeights(
            shapes, job.phase, job.recipe, job.out, learner.part_of, learner.counterpart
        ) as starting:
            for name, parameter in own.items():
                place = place_of(parameter)
                value = starting.piece(name, place)
                local_tensor(parameter).copy_(learner.new_weight(model, name)[place] if value is None else value)

    def _origins(self) -> dict[str, Any]:
        """By part, the origin and sha256 of the weights that the phase starts from, and whether they were trained."""
        hashes = phases.part_hashes(dict(self._model.named_parameters()), self._learner.part_of, self._group)
        origins = self._job.settings.weights.items()
        return {
            part: {"origin": origin, "sha256": hashes[part], "trained": self._trained_origins[part]}
            for part, origin in origins
        }

    def _prepare_optimizer(self) -> None:
        settings = self._job.recipe.optimizer
        self._trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._learning_rate = self._job.settings.learning_rate or settings.learning_rate
        self._optimizer = torch.optim.AdamW(
            self._trained,
            lr=self._learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=self._group.device.type == "cuda",
        )
        self._averaged = ExponentialMovingAverage(self._model, self._job.recipe.ema)
        self._state = checkpoint.TrainingState(self._model, self._optimizer, self._averaged)

    def _restore(self, latest: str | None, progress: dict[str, Any]) -> None:
        self._loader = self._learner.loader()
        self._skipped = SkippedBatches(self._run_settings.max_skipped)
        self._step = 0
        if latest is not None:
            checkpoint.load(self._checkpoints, latest, self._state, self._group)
            self._loader.load_state_dict(progress["loader"])
            self._step = int(progress["step"])
            if "skipped" in progress:
                self._skipped.load_state_dict(progress["skipped"])
        self._batches: Generator[Any, None, None] = _closable(self._loader)
        self._resumed_at = self._step

    def _open_outputs(self) -> None:
        self._trackers: Trackers | None = None
        self._outputs = OutputFolder(self._job.folder, RESUMED_FILES if self._group.is_leader else ())
        if self._group.is_leader:
            names = self._run_settings.trackers
            self._trackers = Trackers(self._outputs.path, self._job.phase, self._step, names, self._settings)
            self._outputs.copy()

    def __enter__(self) -> "_PhaseRun":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        end: PhaseEnd = "failed" if error else "finished" if self._step >= self._job.settings.steps else "stopped"
        try:
            with contextlib.ExitStack() as closing:  # runs all callbacks, the last one first, even if one of them fails
                closing.callback(self._outputs.close)
                closing.callback(self._outputs.copy)
                if self._trackers is not None:
                    closing.callback(self._trackers.close, end)
                closing.callback(self._batches.close)
        except Exception as closing_error:
            if error is None:
                raise
            # the error that ended the phase tells more than this one
            _log.warning("phase %s was not closed properly: %s", self._job.phase, closing_error)

    # ---- the loop ----

    def train(self, report: ReportCheckpoint | None, leaving: Callable[[], bool] | None) -> PhaseResult:
        """Take steps until the phase's last one, or until a worker is asked to stop."""
        run, last_step = self._run_settings, self._job.settings.steps
        metrics = StepMetrics(self._group)
        stop_file, self._leaving = StopFile(self._job.folder), leaving
        stop = False
        with stop_signals() as stop_requested:
            while self._step < last_step and not stop:
                taken = self._take_step(metrics)
                stop, due = self._agree(stop_requested.is_set() or (self._group.is_leader and stop_file.is_there()))
                ended = self._step == last_step
                if taken and (self._step % run.log_every == 0 or ended):
                    self._log_metrics(metrics)
                with metrics.excluded():
                    if stop or due or (taken and (ended or self._step % run.checkpoint_every == 0)):
                        self._save_checkpoint()
                        if report is not None:
                            report({"step": self._step, "loss": self._loss})
                    if run.sample_every and taken and not stop and (self._step % run.sample_every == 0 or ended):
                        self._sample()
        done = self._step >= last_step
        if done:
            self._write_weights()
        loss = self._loss if math.isfinite(self._loss) else None
        return PhaseResult(self._job.phase, self._step, done, self._resumed_at, loss, self._started_from)

    def _take_step(self, metrics: StepMetrics) -> bool:
        """One optimizer step over a global batch. Returns False where the batch was skipped, because its loss or its
        gradient is not finite."""
        group, optimizer_settings = self._group, self._job.recipe.optimizer
        with metrics.waiting_for_data():
            share = next(self._batches)
        num_readable = float(group.sum(share.weight.sum().to(group.device, torch.float32)))
        micro_batches = self._accumulate_gradients(share, max(num_readable, 1.0))
        norm = gradient_norm(self._trained)
        loss_sum = sum((of.losses.sum() for of in micro_batches), torch.zeros((), device=group.device))
        global_loss_sum = float(group.sum(loss_sum.float()))
        if not math.isfinite(global_loss_sum) or not math.isfinite(float(norm)):
            self._skip(micro_batches)
            return False
        clip_gradients(self._trained, norm, optimizer_settings.max_grad_norm)
        self._step += 1
        rate_share = optimizer_settings.share_of_rate(self._step, self._job.settings.steps)
        for parameters in self._optimizer.param_groups:
            parameters["lr"] = self._learning_rate * rate_share
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._averaged.update(self._step)
        self._loss = global_loss_sum / max(num_readable, 1.0)
        for of in micro_batches:
            metrics.add(of.losses, of.weights, of.sigmas, *of.work)
        metrics.step(float(norm))
        return True

    def _agree(self, asked_to_stop: bool) -> tuple[bool, bool]:
        """Whether any worker was asked to stop, and whether a checkpoint is due now, by the leading worker's clock or
        because a machine will be taken away."""
        now, leads = time.monotonic(), self._group.is_leader
        overdue = leads and now - self._saved_at >= 60 * self._run_settings.checkpoint_minutes
        looks = leads and self._leaving is not None and now - self._looked_at >= LOOK_EVERY_S
        flags = torch.tensor([asked_to_stop, overdue, looks], dtype=torch.float32, device=self._group.device)
        stop, save, look = (flag > 0 for flag in self._group.sum(flags).tolist())
        if look and self._leaving is not None and self._leaving():
            self._leaving = None  # one checkpoint is enough
            save = True
        if look:
            self._looked_at = now
        return stop, save

    def _accumulate_gradients(self, share: Any, num_readable: float) -> list[MicroBatchLosses]:
        """Run forward and backward over this worker's share of the batch, micro-batch by micro-batch.

        num_readable: the global batch's samples that could be read. The step's loss is the mean over them.
        """
        device, group = self._group.device, self._group
        micro_batches = share.split(self._run_settings.micro_batch or len(share))
        scale = group.size / num_readable  # group.size, because gradients are averaged over the workers
        results: list[MicroBatchLosses] = []
        for number, batch in enumerate(micro_batches, 1):
            batch = batch.to(device)
            with gradient_sync(self._parallel_model, last=number == len(micro_batches)):
                with autocast(self._run_settings.bf16, device):
                    losses = self._learner.losses(self._parallel_model, batch)
                weighted = losses.values * batch.weight
                (weighted.sum() * scale).backward()
            work = self._learner.work(batch)
            results.append(MicroBatchLosses(batch.keys, weighted.detach(), batch.weight, losses.sigmas, work))
        for parameter in self._trained:
            if parameter.grad is None:  # no sample of this step used it
                parameter.grad = torch.zeros_like(parameter)
        return results

    def _skip(self, micro_batches: list[MicroBatchLosses]) -> None:
        """Leave out a batch that is not finite. Raises TrainingError, on all workers, when there are too many."""
        samples, what = not_finite_samples(micro_batches, self._group)
        self._optimizer.zero_grad(set_to_none=True)
        too_many = self._skipped.add(self._step)
        about = f"phase {self._job.phase}, step {self._step + 1}: {what}"
        if self._trackers is not None:
            self._trackers.skipped(self._step + 1, samples)
        if too_many:
            raise TrainingError(
                f"{about}; more than {self._run_settings.max_skipped:.2%} of the last {WINDOW} batches were like that. "
                "The step was not taken, and all checkpoints before it are intact. The key `skipped` in "
                f"{self._job.folder}/{METRICS} names the samples; data.denylist excludes samples"
            )
        if self._group.is_leader:
            _log.warning("%s; the batch is skipped, number %d", about, self._skipped.total)

    # ---- outputs ----

    def _save_checkpoint(self) -> None:
        progress = {
            "step": self._step,
            "loss": self._loss,
            "loader": self._loader.state_dict(),
            "settings": self._settings,
            "started_from": self._started_from,
            "skipped": self._skipped.state_dict(),
            **self._learner.about(self._model),
        }
        if self._trackers is not None:
            self._trackers.flush()
        self._outputs.copy()  # before the checkpoint, so that a run that resumes from it has the metrics up to it
        checkpoint.save(self._checkpoints, self._step, self._state, progress, self._run_settings.keep, self._group)
        self._saved_at = time.monotonic()

    def _log_metrics(self, metrics: StepMetrics) -> None:
        values = metrics.read()
        if self._trackers is not None:
            values["learning_rate"] = self._optimizer.param_groups[0]["lr"]
            values["skipped_batches"] = self._skipped.total
            self._trackers.scalars(self._step, values)
            self._outputs.copy_now_and_then(METRICS)

    def _sample(self) -> None:
        folder = self._outputs.path / "samples" / f"step-{self._step:08d}"
        self._model.eval()
        with self._averaged.in_place(), torch.no_grad():
            measured = self._learner.sample(self._model, self._step, folder, self._trackers)
        self._model.train()
        if self._trackers is not None and measured:
            self._trackers.scalars(self._step, measured)
        self._outputs.copy()

    def _write_weights(self) -> None:
        """Write the finished phase's weights. Every worker calls it, and the leading one writes."""
        model, averaged = dict(self._model.named_parameters()), self._averaged.weights
        about = self._about_weights(model, averaged)
        phases.write_weights(self._job.out, self._job.phase, model, averaged, about, self._group)
        self._group.barrier()

    def _about_weights(self, model: phases.Weights, averaged: phases.Weights) -> dict[str, Any]:
        recipe, part_of, group = self._job.recipe, self._learner.part_of, self._group
        return {
            "recipe": {"name": recipe.name, "hash": recipe.digest()},
            "model": recipe.model,
            "size": recipe.size,
            "phase": self._job.phase,
            "step": self._step,
            "loss": self._loss if math.isfinite(self._loss) else None,
            "settings": self._settings,
            **self._learner.about(self._model),
            "started_from": self._started_from,
            "trained": {
                part: start.get("trained", True) or (self._step > 0 and part in self._job.settings.train)
                for part, start in self._started_from.items()
            },
            "parts": {
                phases.WEIGHTS: phases.part_hashes(model, part_of, group),
                phases.AVERAGED: phases.part_hashes(averaged, part_of, group),
            },
        }


def _closable(loader: BatchStream) -> Generator[Any, None, None]:
    """The loader's batches. Closing the generator ends the loader's threads."""
    yield from loader
