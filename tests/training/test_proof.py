"""The figures of the proof, on videos where they are known. A slow test runs a smaller proof.

`make proof` runs the whole proof.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.proof import SPENT, Bar, Spent, bars, best_distance, sampler, shards, spent, table, trained
from benchmarks.puppet_trials import Drift, figures, follow, heard, unseen
from data_manifests.dataset import load
from tasks.synthetic.puppet_readers import read_arm, swing
from tasks.synthetic.puppet_shards import make_puppets
from tasks.synthetic.puppets import FRAMES, GESTURES, Gesture, draw, muted, reference
from training.config import TrainingRecipe, load_training
from training.learners.active_mind import load_trained
from training.models.active_mind.model import ActiveMind

PUPPETS = unseen(10)
DRIFT = Drift(np.array([0.01, 0.012]), np.array([0.01, 0.05]))
TOOK = Spent(cpu_s=1000.0, clock_s=600.0)


def missed(speaking: np.ndarray, silent: np.ndarray, drift: Drift = DRIFT) -> list[str]:
    return [
        bar.what.partition(" to ")[0] for bar in bars(figures(PUPPETS, speaking, silent), drift, TOOK) if not bar.met
    ]


def test_slack_is_how_far_within_its_bounds_a_figure_is() -> None:
    none, any_number = float("-inf"), float("inf")
    assert Bar("", 1.0, 0.8, 1.25).slack == 1.25
    assert Bar("", 0.5, none, 2.0).slack == 4.0
    assert Bar("", 0.9, 0.6, any_number).slack == pytest.approx(1.5)
    assert Bar("", -0.1, none, 0.5).slack > 1e6  # no figure can be better
    assert Bar("", 0.7, 0.8, 1.25).slack < 1 < Bar("", 0.81, 0.8, 1.25).slack


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    return np.stack([puppet.pictures for puppet in PUPPETS])


@pytest.fixture(scope="module")
def silent() -> np.ndarray:
    return np.stack([replace(puppet, silent=True).pictures for puppet in PUPPETS])


def noisy(clips: np.ndarray) -> np.ndarray:
    """Clips with an error that is the same everywhere, because the truth has no error, at rest or in movement."""
    noise = np.random.default_rng(0).normal(scale=4.0, size=clips.shape)
    return np.clip(clips + noise, 0, 255).astype(np.uint8)


SWINGING = [puppet for puppet in PUPPETS if GESTURES[puppet.gesture].swing]


def swinging(change: Callable[[Gesture], Gesture], degrees: float = 0.0) -> float:
    """The swing read from drawn frames of arms whose gestures are changed, and turned by some degrees."""
    arms, true = [], [puppet.arm for puppet in SWINGING]
    for puppet in SWINGING:
        angles = change(GESTURES[puppet.gesture]).angles(puppet.frames) + degrees
        arms.append(read_arm(draw(puppet.identity, puppet.opening, angles)))
    return swing(np.stack(arms), np.stack(true))


def test_a_swing_is_measured_without_the_way_into_the_gesture() -> None:
    assert {puppet.gesture for puppet in SWINGING} == {"waves", "beckons"}
    assert swinging(lambda gesture: gesture) == pytest.approx(1.0, abs=0.02)
    assert swinging(lambda gesture: replace(gesture, swing=0.5 * gesture.swing)) == pytest.approx(0.5, abs=0.02)
    assert swinging(lambda gesture: replace(gesture, swing=1.5 * gesture.swing)) == pytest.approx(1.5, abs=0.02)
    assert swinging(lambda gesture: replace(gesture, swing=0.0)) == pytest.approx(0.0, abs=0.02)
    # A swing at another angle counts in full: other figures measure the angle. A swing the other way counts negative.
    assert swinging(lambda gesture: gesture, degrees=8.0) == pytest.approx(1.0, abs=0.02)
    assert swinging(lambda gesture: replace(gesture, swing=-gesture.swing)) == pytest.approx(-1.0, abs=0.02)
    # trembling does not count as a swing, though it would raise the angles' standard deviation
    random = np.random.default_rng(0)
    true = np.stack([puppet.arm for puppet in SWINGING] * 4)
    assert abs(swing(true.mean() + random.normal(scale=5.0, size=true.shape), true)) < 0.15


def test_puppets_that_do_as_they_should_pass(truth: np.ndarray, silent: np.ndarray) -> None:
    assert not any(muted(puppet.sound).any() for puppet in PUPPETS)
    assert missed(noisy(truth), noisy(silent)) == []


def test_each_fault_is_seen_by_what_measures_it(truth: np.ndarray, silent: np.ndarray) -> None:
    assert missed(noisy(truth), noisy(truth)) == ["muted: correlation with the truth", "muted: amplitude"]
    others = np.roll(truth, 5, axis=0)  # the five gestures repeat in turn, so only the sound is another puppet's
    assert "mouth: correlation with the truth" in missed(noisy(others), noisy(silent))
    swapped = np.stack(
        [replace(p, gesture=q.gesture).pictures for p, q in zip(PUPPETS, PUPPETS[1:] + PUPPETS[:1], strict=True)]
    )
    assert "gesture: share told right" in missed(noisy(swapped), noisy(silent))
    still = np.repeat(np.stack([reference(puppet.identity) for puppet in PUPPETS])[:, None], 33, axis=1)
    assert {
        "mouth: correlation with the truth",
        "mouth: amplitude",
        "gesture: share told right",
        "arm: swing after the ramp",
    } <= {*missed(still, still)}
    frozen = [replace(GESTURES[p.gesture], swing=0.0).angles(p.frames) for p in PUPPETS]
    stiff = np.stack([draw(p.identity, p.opening, arm) for p, arm in zip(PUPPETS, frozen, strict=True)])
    assert "arm: swing after the ramp" in missed(noisy(stiff), noisy(silent))
    smeared = np.stack([np.broadcast_to(clip.mean(axis=0), clip.shape) for clip in truth]).astype(np.uint8)
    assert {"arm: swing after the ramp", "arm: error"} <= {*missed(noisy(smeared), noisy(silent))}
    no_better = Drift(DRIFT.without, DRIFT.without)
    assert missed(noisy(truth), noisy(silent), no_better) == ["colours: rise of the error"]


def test_the_table_says_what_was_asked_for(truth: np.ndarray, silent: np.ndarray) -> None:
    told = table(list(bars(figures(PUPPETS, noisy(truth), noisy(truth)), DRIFT, TOOK)))
    assert "| mouth: amplitude to the truth's | 1.0" in told and "| at least 0.80, at most 1.25 | met |" in told
    assert told.count("MISSED") == 2


def test_a_training_that_took_longer_than_it_may_is_told(truth: np.ndarray, silent: np.ndarray) -> None:
    figured = figures(PUPPETS, noisy(truth), noisy(silent))

    def missed_by(cpu_s: float) -> list[str]:
        return [bar.what for bar in bars(figured, DRIFT, Spent(cpu_s, clock_s=4000.0)) if not bar.met]

    assert missed_by(2400.0) == []  # 20 minutes of both cores
    assert missed_by(2401.0) == missed_by(math.inf) == ["training: minutes of two cores' time"]


def test_shards_serve_again_only_where_they_would_be_made_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def names(count: int = 3, seed: int = 0) -> set[tuple[str, int]]:
        manifest = shards(tmp_path / "shards", count, seed)
        there = {f"shards/{path.name}" for path in (manifest.parent / "shards").glob("*.tar")}
        assert there == {shard.name for shard in load(str(manifest)).shards}  # no shards of an earlier call are left
        return {(name, (manifest.parent / name).stat().st_mtime_ns) for name in there}

    first = names()
    assert names() == first
    more = names(count=4)
    assert more.isdisjoint(first)
    others = names(count=4, seed=1)
    assert others.isdisjoint(more)
    monkeypatch.setattr("tasks.synthetic.puppet_shards.VERSION", 99)
    newer = names(count=4, seed=1)
    assert newer.isdisjoint(others)
    (tmp_path / "shards" / "dataset.json").write_text("{")
    assert names(count=4, seed=1).isdisjoint(newer)


def taught(folder: Path, puppets: int, steps: int, **changes: object) -> tuple[ActiveMind, TrainingRecipe]:
    """A network trained on puppets in one phase from new weights, and its recipe with these changes."""
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


def test_what_has_been_trained_is_not_trained_again(tmp_path: Path) -> None:
    before = time.process_time()
    _, recipe = taught(tmp_path, 12, 8)
    took = spent(recipe, tmp_path / "out")
    assert 1 < took.cpu_s < time.process_time() - before
    assert took.minutes == took.cpu_s / 120
    manifest = tmp_path / "shards" / "dataset.json"
    assert trained(recipe, manifest, tmp_path / "out") == took
    (tmp_path / "out" / SPENT).unlink()
    assert spent(recipe, tmp_path / "out").minutes == math.inf  # the time it took is not known


@pytest.mark.slow
def test_text_is_obeyed_after_half_a_minute(tmp_path: Path) -> None:
    data = load_training("puppets").data.model_copy(update={"batch": 4})
    network, recipe = taught(tmp_path, 150, 250, data=data, ema=0.95)
    puppets = unseen(20)
    begin, captions = np.stack([reference(p.identity) for p in puppets])[:, None], [p.caption for p in puppets]
    sounds = [heard(p.sound, FRAMES) for p in puppets]
    made = replace(sampler(recipe), steps=8).clips(network, begin, sounds, captions, None, 0)
    angles = [[arm[FRAMES // 2 :].mean() for arm in arms] for arms in (map(read_arm, made), [p.arm for p in puppets])]
    assert np.corrcoef(angles)[0, 1] > 0.6


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_sound_and_text_are_followed_after_eight_minutes(tmp_path: Path) -> None:
    """With bars for a part of the training. At half of it the arm swings half as far as it should."""
    network, recipe = taught(tmp_path, 1000, 1500)
    made = sampler(recipe)
    found = follow(network, replace(made, pseudo_last=best_distance(network, made)), cases=20)
    assert found.mouth > 0.8 and 0.7 < found.mouth_amplitude < 1.3
    assert found.muted < 0.3 and found.muted_amplitude < 0.5
    assert found.gestures >= 0.7 and 0.7 < found.arm_swing < 1.4
