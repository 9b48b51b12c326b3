"""The proof that the avatar learns: a small active-mind is trained on shards of puppets, from nothing, and then has to
follow sounds that it never heard, obey texts, and keep identities that it never saw.

    python -m benchmarks.proof [--seed 0] [--folder out/proof]

Shards, loader, trainer and phases are those of every training; the recipe is data_manifests/puppets.yaml. What is
printed is a Markdown table with the bar beside each figure; the exit code is 1 when one is missed. A training that was
cut off goes on where it was when the same folder is given again.
"""

import argparse
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.world.puppet_shards import make_puppets
from tests.world.puppet_trials import CASES, CHAINED, CHAINS, Drift, Figures, Sampler, drift, follow
from training.config import TrainingRecipe, load_training
from training.job import Job
from training.launch import launch
from training.learner import ActiveMindLearner, load_trained
from training.sampling import Guidance

PUPPETS = 3000
GUIDANCE = Guidance(text=2.0, audio=1.0, order="audio_then_text")  # so without text, and with all: two passes a step
STEPS, CHAIN_STEPS = 20, 10  # of Euler's method; of a chain's clips, which are 480


class Bar(NamedTuple):
    """What is measured, and between which values it has to lie."""

    what: str
    value: float
    low: float
    high: float

    @property
    def met(self) -> bool:
        return self.low <= self.value <= self.high


def bars(figures: Figures, drift: Drift | None) -> Iterator[Bar]:
    none, any_number = float("-inf"), float("inf")
    yield Bar("mouth: correlation with the truth", figures.mouth, 0.9, any_number)
    yield Bar("mouth: amplitude to the truth's", figures.mouth_amplitude, 0.8, 1.25)
    yield Bar("muted: correlation with the truth", figures.muted, none, 0.1)
    yield Bar("muted: amplitude to the truth's", figures.muted_amplitude, none, 0.25)
    yield Bar("gesture: share told right", figures.gestures, 0.9, any_number)
    yield Bar("arm: amplitude to the truth's", figures.arm_amplitude, 0.8, 1.25)
    yield Bar("arm: error to that at rest", _ratio(figures.arm_error, figures.rest_error), none, 2.0)
    if drift is not None:
        yield Bar("colours: rise of the error to that without pseudo last frame", _ratio(*drift.rises), none, 1 / 3)


def _ratio(value: float, to: float) -> float:
    """Infinite where there is nothing to compare with, so that nothing is claimed."""
    return value / to if to > 0 else float("inf")


def table(found: list[Bar]) -> str:
    lines = ["| measured on the unseen | figure | bar | |", "|---|---|---|---|"]
    for bar in found:
        at_least, at_most = bar.low > float("-inf"), bar.high < float("inf")
        asked = [f"at least {bar.low:.2f}"] * at_least + [f"at most {bar.high:.2f}"] * at_most
        lines.append(f"| {bar.what} | {bar.value:.3f} | {', '.join(asked)} | {'met' if bar.met else 'MISSED'} |")
    return "\n".join(lines)


def trained(recipe: TrainingRecipe, manifest: Path, out: Path) -> str:
    """Train all phases; says how long each took."""
    told = []
    for phase in recipe.phases:
        before, since = _cpu_seconds(), time.monotonic()
        outcome = launch(Job(recipe, phase, str(manifest), out, ActiveMindLearner))
        if not outcome.done:
            sys.exit(f"phase {phase} was asked to end; step {outcome.step} is kept: run it again to go on")
        steps = outcome.step - outcome.resumed_at
        spent = f"{_cpu_seconds() - before:.0f} CPU seconds, {time.monotonic() - since:.0f} on the clock"
        told.append(f"{phase} {steps} steps ({spent})")
    return "; ".join(told)


def sampler(recipe: TrainingRecipe, steps: int = STEPS) -> Sampler:
    return Sampler(recipe.data.latents, steps, GUIDANCE, recipe.run.pseudo_last)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the order, the noise and the puppets")
    parser.add_argument("--folder", type=Path, default=Path("out/proof"), help="where shards and weights are kept")
    parser.add_argument("--recipe", default="puppets")
    parser.add_argument("--puppets", type=int, default=PUPPETS)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    recipe = load_training(options.recipe).model_copy(update={"seed": options.seed})
    shards, out = options.folder / f"shards-{options.seed}", options.folder / f"trained-{options.seed}"
    if not (shards / "dataset.json").exists():
        before = _cpu_seconds()
        make_puppets(shards, options.puppets, options.seed)
        print(f"{options.puppets} puppets: {_cpu_seconds() - before:.0f} CPU seconds", flush=True)
    print(f"seed {options.seed}: {trained(recipe, shards / 'dataset.json', out)}", flush=True)
    network = load_trained(out, list(recipe.phases)[-1]).network
    figures = follow(network, sampler(recipe))
    drifted = drift(network, sampler(recipe, CHAIN_STEPS))
    found = list(bars(figures, drifted))
    print(table(found))
    by_clip = [", ".join(f"{error:.4f}" for error in errors) for errors in (drifted.with_reference, drifted.without)]
    print(f"\n{CASES} cases; {CHAINS} chains of {CHAINED} clips, colour error by clip with the pseudo last frame:")
    print(f"{by_clip[0]}; without: {by_clip[1]}")
    print(f"error where the arm can be: {figures.arm_error:.4f}, at rest {figures.rest_error:.4f}")
    if not all(bar.met for bar in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
