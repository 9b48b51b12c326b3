"""What the proof measures, on videos of which the outcome is known; and, slowly, a smaller proof.

The whole proof is `make proof`.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.proof import bars, sampler, table, trained
from tests.world.puppet_shards import make_puppets
from tests.world.puppet_trials import Drift, figures, follow, unseen
from tests.world.puppets import muted, reference
from training.config import TrainingRecipe, load_training
from training.learner import load_trained
from training.models.active_mind import ActiveMind

PUPPETS = unseen(10)
DRIFT = Drift(np.array([0.01, 0.012]), np.array([0.01, 0.05]))


def missed(speaking: np.ndarray, silent: np.ndarray, drift: Drift = DRIFT) -> list[str]:
    return [bar.what.partition(" to ")[0] for bar in bars(figures(PUPPETS, speaking, silent), drift) if not bar.met]


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    return np.stack([puppet.pictures for puppet in PUPPETS])


@pytest.fixture(scope="module")
def silent() -> np.ndarray:
    return np.stack([replace(puppet, silent=True).pictures for puppet in PUPPETS])


def noisy(clips: np.ndarray) -> np.ndarray:
    """With an error that is the same everywhere, since that of the truth is 0 at rest as in movement."""
    noise = np.random.default_rng(0).normal(scale=4.0, size=clips.shape)
    return np.clip(clips + noise, 0, 255).astype(np.uint8)


def test_puppets_that_do_as_they_should_pass(truth: np.ndarray, silent: np.ndarray) -> None:
    assert not any(muted(puppet.sound).any() for puppet in PUPPETS)
    assert missed(noisy(truth), noisy(silent)) == []


def test_each_fault_is_seen_by_what_measures_it(truth: np.ndarray, silent: np.ndarray) -> None:
    assert missed(noisy(truth), noisy(truth)) == ["muted: correlation with the truth", "muted: amplitude"]
    others = np.roll(truth, 5, axis=0)  # five gestures take turns, so only the sound is another's
    assert "mouth: correlation with the truth" in missed(noisy(others), noisy(silent))
    swapped = np.stack(
        [replace(p, gesture=q.gesture).pictures for p, q in zip(PUPPETS, PUPPETS[1:] + PUPPETS[:1], strict=True)]
    )
    assert "gesture: share told right" in missed(noisy(swapped), noisy(silent))
    still = np.repeat(np.stack([reference(puppet.identity) for puppet in PUPPETS])[:, None], 33, axis=1)
    assert {"mouth: correlation with the truth", "mouth: amplitude", "gesture: share told right", "arm: amplitude"} <= {
        *missed(still, still)
    }
    smeared = np.stack([np.broadcast_to(clip.mean(axis=0), clip.shape) for clip in truth]).astype(np.uint8)
    assert {"arm: amplitude", "arm: error"} <= {*missed(noisy(smeared), noisy(silent))}
    no_better = Drift(DRIFT.without, DRIFT.without)
    assert missed(noisy(truth), noisy(silent), no_better) == ["colours: rise of the error"]


def test_the_table_says_what_was_asked_for(truth: np.ndarray, silent: np.ndarray) -> None:
    told = table(list(bars(figures(PUPPETS, noisy(truth), noisy(truth)), DRIFT)))
    assert "| mouth: amplitude to the truth's | 1.0" in told and "| at least 0.80, at most 1.25 | met |" in told
    assert told.count("MISSED") == 2


def taught(folder: Path, puppets: int, steps: int, **changes: object) -> tuple[ActiveMind, TrainingRecipe]:
    """A network trained on puppets in one phase, from nothing, and its recipe with these changes."""
    recipe = load_training("puppets")
    weights = dict.fromkeys(("video", "text", "audio"), "new")
    changes = {
        "phases": {"main": recipe.phases["main"].model_copy(update={"steps": steps, "weights": weights})},
        "run": recipe.run.model_copy(update={"sample_every": 0, "trackers": []}),
        **changes,
    }
    recipe = recipe.model_copy(update=changes)
    make_puppets(folder / "shards", puppets, 5)
    trained(recipe, folder / "shards" / "dataset.json", folder / "out")
    return load_trained(folder / "out", "main").network, recipe


def test_text_is_obeyed_after_half_a_minute(tmp_path: Path) -> None:
    data = load_training("puppets").data.model_copy(update={"batch": 4})
    network, recipe = taught(tmp_path, 150, 250, data=data, ema=0.95)
    assert follow(network, sampler(recipe, 8), cases=10).gestures >= 0.5  # by chance it is 0.2


@pytest.mark.slow
def test_sound_and_text_are_followed_after_two_minutes(tmp_path: Path) -> None:
    """By bars that a tenth of the training reaches."""
    network, recipe = taught(tmp_path, 600, 700)
    found = follow(network, sampler(recipe), cases=20)
    assert found.mouth > 0.8 and 0.7 < found.mouth_amplitude < 1.3
    assert found.muted < 0.3 and found.muted_amplitude < 0.5
    assert found.gestures >= 0.7 and 0.7 < found.arm_amplitude < 1.4
