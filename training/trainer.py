"""One phase of a training, as each of its workers goes through it."""

import contextlib
import logging
import math
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from data_manifests.storage import Storage
from training import checkpoint, phases
from training.ema import AveragedWeights
from training.job import Job, Learner, Loader, Outcome, TrainingError
from training.outputs import Outputs
from training.parallel import Team, bare, clip, full, gradient_norm, spread, syncing
from training.speed import Meter
from training.tracking import KEPT_ON, METRICS, End, Trackers

_log = logging.getLogger(__name__)

Reported = Callable[[dict[str, float]], None]


def train_phase(job: Job, team: Team, reported: Reported | None = None) -> Outcome:
    """Train a phase to its end, from its latest checkpoint where there is one.

    Every worker calls it. reported: called on every worker at each checkpoint.

    Raises TrainingError, phases.PhaseError, checkpoint.CheckpointError and whatever the loader raises.
    """
    learner = job.learner(job, team)
    settings = phases.settings_of(job.recipe, job.phase, learner.dataset)
    ended = phases.about_weights(job.out, job.phase)
    if ended is not None:
        _check_same(job, ended["settings"], settings)
        if ended["step"] >= job.settings.steps:
            return Outcome(job.phase, ended["step"], True, ended["step"], ended["loss"], ended["started_from"])
    with _PhaseRun(job, team, learner, settings) as run:
        return run.to_the_end(reported)


def _check_same(job: Job, before: dict[str, Any], now: dict[str, Any]) -> None:
    chosen = phases.settings_of(job.recipe, job.phase, now["dataset"], chosen=True)
    differences = phases.changed(before, now, chosen)
    if differences:
        raise TrainingError(
            f"{job.folder} holds a training by other settings; give another output folder, or take back:\n"
            + "\n".join(differences)
        )


class _PhaseRun:
    """A worker's model, optimizer and data, ready to go on from the latest checkpoint."""

    def __init__(self, job: Job, team: Team, learner: Learner, settings: dict[str, Any]) -> None:
        self._job, self._team, self._learner, self._settings = job, team, learner, settings
        self._how = job.recipe.run
        self._checkpoints = Storage(f"{job.folder}/checkpoints")
        if team.leads:
            checkpoint.sweep(self._checkpoints)
        team.barrier()
        there = checkpoint.latest(self._checkpoints)
        progress = checkpoint.progress_of(self._checkpoints, there) if there else {}
        if there is None:
            model = learner.model(phases.starting_scale(job.phase, job.recipe, job.out))
            self._started_from = self._start(model)
        else:
            _check_same(job, progress["settings"], settings)
            model = learner.model(phases.latent_scale(progress))
            self._started_from = progress["started_from"]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(learner.part_of(name) in job.settings.train)
        self._prepare(model)
        self._load(there, progress)
        self._loss = float("nan") if progress.get("loss") is None else progress["loss"]

    def _start(self, model: nn.Module) -> dict[str, Any]:
        """Give the model the weights that the phase starts from; says which."""
        job, learner = self._job, self._learner
        own = {name: parameter.detach() for name, parameter in model.named_parameters()}
        weights = phases.starting_weights(own, job.phase, job.recipe, job.out, learner.part_of, learner.counterpart)
        with torch.no_grad():
            for name, value in weights.items():
                own[name].copy_(value)
        hashes = phases.part_hashes(own, learner.part_of)
        return {part: {"origin": origin, "sha256": hashes[part]} for part, origin in job.settings.weights.items()}

    def _prepare(self, model: nn.Module) -> None:
        job, learner, how, team = self._job, self._learner, self._how, self._team
        if how.recompute:
            learner.recompute(model)
        if how.compile:
            for block in learner.blocks(model):
                block.compile()
        self._bf16 = how.bf16 and team.device.type == "cuda"
        self._model = spread(model, team, how.sharding, self._bf16, learner.units(model), learner.in_float32(model))
        self._bare = bare(self._model)
        self._trained = [parameter for parameter in self._bare.parameters() if parameter.requires_grad]
        adam = job.recipe.optimizer
        self._rate = job.settings.learning_rate or adam.learning_rate
        self._optimizer = torch.optim.AdamW(
            self._trained,
            lr=self._rate,
            betas=adam.betas,
            weight_decay=adam.weight_decay,
            fused=team.device.type == "cuda",
        )
        self._averaged = AveragedWeights(self._bare, job.recipe.ema)
        self._state = checkpoint.Trained(self._bare, self._optimizer, self._averaged)

    def _load(self, there: str | None, progress: dict[str, Any]) -> None:
        self._loader = self._learner.loader()
        self._step = 0
        if there is not None:
            checkpoint.load(self._checkpoints, there, self._state, self._team)
            self._loader.load_state_dict(progress["loader"])
            self._step = int(progress["step"])
        self._data: Generator[Any, None, None] = _closable(self._loader)
        self._resumed_at = self._step
        self._trackers: Trackers | None = None
        self._outputs = Outputs(self._job.folder, KEPT_ON if self._team.leads else ())
        if self._team.leads:
            self._trackers = Trackers(
                self._outputs.path, self._job.phase, self._step, self._how.trackers, self._settings
            )
            self._outputs.copy()

    def __enter__(self) -> "_PhaseRun":
        return self

    def __exit__(self, _kind: object, ended_by: BaseException | None, _trace: object) -> None:
        end: End = "failed" if ended_by else "finished" if self._step >= self._job.settings.steps else "stopped"
        try:
            with contextlib.ExitStack() as closing:  # in turn from the last one, each whatever becomes of the others
                closing.callback(self._outputs.close)
                closing.callback(self._outputs.copy)
                if self._trackers is not None:
                    closing.callback(self._trackers.close, end)
                closing.callback(self._data.close)
        except Exception as error:
            if ended_by is None:
                raise
            _log.warning("phase %s was not closed in order: %s", self._job.phase, error)  # what ended it tells more

    # ---- the loop ----

    def to_the_end(self, reported: Reported | None) -> Outcome:
        how, last = self._how, self._job.settings.steps
        meter = Meter(self._team)
        stop = False
        with _asked_to_end() as asked:
            while self._step < last and not stop:
                stop = self._take_step(meter, asked)
                ended = self._step == last
                if self._step % how.log_every == 0 or ended:
                    self._show(meter)
                with meter.outside():
                    if stop or ended or self._step % how.checkpoint_every == 0:
                        self._save()
                        if reported is not None:
                            reported({"step": self._step, "loss": self._loss})
                    if how.sample_every and not stop and (self._step % how.sample_every == 0 or ended):
                        self._sample()
        done = self._step >= last
        if done:
            self._leave_weights()
        loss = self._loss if math.isfinite(self._loss) else None
        return Outcome(self._job.phase, self._step, done, self._resumed_at, loss, self._started_from)

    def _take_step(self, meter: Meter, asked: threading.Event) -> bool:
        """One step of the optimizer over a global batch; gives whether any worker was asked to end."""
        job, team, device = self._job, self._team, self._team.device
        with meter.waiting():
            share_of_batch = next(self._data)
        micro_batches = share_of_batch.split(self._how.micro_batch or len(share_of_batch))
        # gradients are averaged over the workers, and the loss is the mean over the step's samples that could be read
        counted = float(team.sum(share_of_batch.weight.sum().to(device, torch.float32)))
        share = team.size / max(counted, 1.0)
        taken: list[tuple[Sequence[str], Tensor]] = []
        for number, batch in enumerate(micro_batches, 1):
            batch = batch.to(device)
            with syncing(self._model, last=number == len(micro_batches)):
                with torch.autocast(device.type, torch.bfloat16, enabled=self._bf16):
                    losses = self._learner.losses(self._model, batch)
                weighted = losses.values * batch.weight
                (weighted.sum() * share).backward()
            taken.append((batch.keys, weighted.detach()))
            meter.add(weighted.detach(), batch.weight, losses.sigmas, *self._learner.work(batch))
        for parameter in self._trained:
            if parameter.grad is None:  # a part that no sample of the step has touched
                parameter.grad = torch.zeros_like(parameter)
        norm = gradient_norm(self._trained)
        total = sum((losses.sum() for _, losses in taken), torch.zeros((), device=device))
        of_all = team.sum(torch.stack([total.float(), torch.tensor(float(asked.is_set()), device=device)])).tolist()
        if not math.isfinite(of_all[0]) or not math.isfinite(float(norm)):
            self._stop_at_what_is_not_finite(taken)
        clip(self._trained, norm, job.recipe.optimizer.max_grad_norm)
        self._step += 1
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * job.recipe.optimizer.share_of_rate(self._step, job.settings.steps)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._averaged.update(self._step)
        self._loss = of_all[0] / max(counted, 1.0)
        meter.step(float(norm))
        return of_all[1] > 0

    def _stop_at_what_is_not_finite(self, taken: list[tuple[Sequence[str], Tensor]]) -> None:
        wrong = [
            key for keys, losses in taken for key, value in zip(keys, losses.tolist(), strict=True)
            if not math.isfinite(value)
        ]  # fmt: skip
        everywhere = sorted(key for keys in self._team.gather(wrong) for key in keys)
        what = f"the loss of {_listed(everywhere)} is not finite"
        if not everywhere:
            all_keys = self._team.gather([key for keys, _ in taken for key in keys])
            what = f"the gradient is not finite, over {_listed(sorted(k for keys in all_keys for k in keys))}"
        raise TrainingError(
            f"phase {self._job.phase}, step {self._step + 1}: {what}; the weights are as they were before that step, "
            "and the checkpoints before it stand"
        )

    # ---- what is kept and shown ----

    def _save(self) -> None:
        progress = {
            "step": self._step,
            "loss": self._loss,
            "loader": self._loader.state_dict(),
            "settings": self._settings,
            "started_from": self._started_from,
            **self._learner.about(self._bare),
        }
        if self._trackers is not None:
            self._trackers.flush()
        self._outputs.copy()  # first, so that whoever goes on from the checkpoint has the curve up to it
        checkpoint.save(self._checkpoints, self._step, self._state, progress, self._how.keep, self._team)

    def _show(self, meter: Meter) -> None:
        values = meter.read()
        if self._trackers is not None:
            self._trackers.scalars(self._step, {**values, "learning_rate": self._optimizer.param_groups[0]["lr"]})
            self._outputs.copy_now_and_then(METRICS)

    def _sample(self) -> None:
        folder = self._outputs.path / "samples" / f"step-{self._step:08d}"
        self._bare.eval()
        with self._averaged.in_place(), torch.no_grad():
            measured = self._learner.sample(self._bare, self._step, folder, self._trackers)
        self._bare.train()
        if self._trackers is not None and measured:
            self._trackers.scalars(self._step, measured)
        self._outputs.copy()

    def _leave_weights(self) -> None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: dict[str, Tensor] = get_model_state_dict(self._bare, options=options)  # type: ignore[assignment]
        names = dict(self._bare.named_parameters())
        averaged = {}
        for name, value in self._averaged.weights.items():
            whole = full(value)
            if self._team.leads:
                averaged[name] = whole.cpu()
        if self._team.leads:
            model = {name: state[name] for name in names}
            part_of = self._learner.part_of
            about = {
                "recipe": {"name": self._job.recipe.name, "hash": self._job.recipe.digest()},
                "model": self._job.recipe.model,
                "size": self._job.recipe.size,
                "phase": self._job.phase,
                "step": self._step,
                "loss": self._loss if math.isfinite(self._loss) else None,
                "settings": self._settings,
                **self._learner.about(self._bare),
                "started_from": self._started_from,
                "parts": {
                    phases.WEIGHTS: phases.part_hashes(model, part_of),
                    phases.AVERAGED: phases.part_hashes(averaged, part_of),
                },
            }
            phases.write_weights(self._job.out, self._job.phase, model, averaged, about)
        self._team.barrier()


def _closable(loader: Loader) -> Generator[Any, None, None]:
    """Closing it ends what the loader does in the background."""
    yield from loader


def _listed(keys: Sequence[str], most: int = 20) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


@contextlib.contextmanager
def _asked_to_end() -> Iterator[threading.Event]:
    """Set by SIGTERM, and by the first SIGINT. Only a process's main thread can listen for signals; elsewhere nobody
    asks."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
