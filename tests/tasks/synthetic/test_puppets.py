"""Puppets are drawn as their truth says, and the readers find it in their pixels."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data_manifests.dataset import load, verify
from data_manifests.storage import Storage
from tasks.media.frames import FrameCache, rgb_frames
from tasks.networks.log_mel import frame_windows
from tasks.stages.latents.codec import CosineCodec
from tasks.synthetic.puppet_readers import arm_error, colour_error, read_arm, read_gesture, read_mouth
from tasks.synthetic.puppet_shards import LATENTS, encode_video, make_puppets
from tasks.synthetic.puppets import (
    FPS,
    GESTURES,
    REST_DEGREES,
    Puppet,
    PuppetIdentity,
    draw,
    muted,
    opening_of,
    reference,
    shifted,
)

PUPPETS = [Puppet.of(11, number, moving_camera=True) for number in range(20)]


@pytest.mark.parametrize("size", [32, 48, 64])
def test_mouth_and_arm_are_read_from_pixels_as_they_were_drawn(size: int) -> None:
    for puppet in PUPPETS:
        puppet = replace(puppet, size=size)
        pictures = puppet.pictures
        np.testing.assert_allclose(read_mouth(pictures), puppet.opening, atol=0.01)
        np.testing.assert_allclose(read_arm(pictures), puppet.arm, atol=3.0 if puppet.camera != "still" else 1.0)
        assert read_gesture(pictures) == puppet.gesture


def test_the_truth_can_be_read_after_coding(tmp_path: Path) -> None:
    """After the two codings that training data go through: H.264, and the latent codec on top."""
    codec = CosineCodec(LATENTS.channels)
    for puppet in PUPPETS[:10]:
        encode_video(tmp_path / "puppet.mp4", puppet.pictures)
        coded = np.stack(list(rgb_frames(FrameCache(tmp_path / "puppet.mp4").frames(), FPS)))
        np.testing.assert_allclose(read_mouth(coded), puppet.opening, atol=0.08)
        latents = [encoded.latent for encoded in codec.encode(coded)]
        decoded = np.stack(list(codec.decode(latents, puppet.size, puppet.size)))
        assert np.corrcoef(read_mouth(decoded), puppet.opening)[0, 1] > 0.99
        assert 0.9 < read_mouth(decoded).std() / puppet.opening.std() < 1.1
        assert np.abs(read_arm(decoded) - puppet.arm).mean() < 4.0
        assert read_gesture(decoded) == puppet.gesture
        assert colour_error(decoded, reference(puppet.identity)).max() < 0.06


def test_every_puppet_begins_as_its_reference_image_with_mouth_closed_and_arm_at_rest() -> None:
    for puppet in (Puppet.of(12, number) for number in range(20)):
        np.testing.assert_array_equal(puppet.pictures[0], reference(puppet.identity))
    assert read_mouth(reference(puppet.identity)[None])[0] == pytest.approx(0, abs=0.01)


def test_the_mouth_follows_the_sound_and_only_the_sound() -> None:
    for puppet in PUPPETS:
        assert not opening_of(muted(puppet.sound), puppet.frames).any()
        later = opening_of(shifted(puppet.sound, 3), puppet.frames)
        np.testing.assert_array_equal(later[3:], puppet.opening[:-3])
        loudness = 10 ** (4 * frame_windows(puppet.sound, puppet.frames, FPS).max(axis=(1, 2)).astype(float) - 4)
        assert np.corrcoef(loudness**0.3, puppet.opening)[0, 1] > 0.9
        assert puppet.opening.std() > 0.15 and 0.5 < puppet.opening.max() <= 1
    a, b = PUPPETS[0], PUPPETS[1]
    assert abs(np.corrcoef(a.opening, b.opening)[0, 1]) < 0.9


def test_gestures_are_far_apart_on_average_and_begin_at_rest() -> None:
    means = sorted(gesture.angles(33)[9:].mean() for gesture in GESTURES.values())
    assert len(means) >= 4
    assert min(b - a for a, b in pairwise(means)) > 30
    assert {gesture.angles(33)[0] for gesture in GESTURES.values()} == {REST_DEGREES}
    assert {puppet.gesture for puppet in PUPPETS} == set(GESTURES)
    assert all(puppet.gesture in puppet.caption for puppet in PUPPETS)


def test_a_smeared_arm_counts_as_an_error() -> None:
    """All positions of the arm at once. The difference over the whole frame would hardly show it; `arm_error` does."""
    puppet = replace(PUPPETS[0], gesture="waves", camera="still")
    arms = [draw(puppet.identity, puppet.opening, puppet.arm + turn) for turn in range(-60, 61, 10)]
    smeared = np.mean(arms, axis=0).astype(np.uint8)
    codec = CosineCodec(LATENTS.channels)
    latents = [encoded.latent for encoded in codec.encode(puppet.pictures)]
    decoded = np.stack(list(codec.decode(latents, puppet.size, puppet.size)))
    assert arm_error(smeared, puppet.pictures) > 2 * arm_error(decoded, puppet.pictures) > 0
    assert arm_error(puppet.pictures, puppet.pictures) == 0


def test_another_identity_shows_in_the_colours() -> None:
    random = np.random.default_rng(1)
    identities = [PuppetIdentity.of(random) for _ in range(20)]
    for one, other in pairwise(identities):
        assert colour_error(draw(one, np.ones(3), np.full(3, 120.0)), reference(one)).max() < 0.01
        assert colour_error(reference(one)[None], reference(other))[0] > 0.04


def test_each_of_two_puppets_has_its_own_sound_and_region() -> None:
    puppet = Puppet.of(3, 0, two=True)
    partner = puppet.partner
    assert partner is not None and puppet.pictures.shape == (33, 32, 64, 3)
    left, right = puppet.pictures[:, :, :32], puppet.pictures[:, :, 32:]
    np.testing.assert_allclose(read_mouth(left), puppet.opening, atol=0.01)
    np.testing.assert_allclose(read_mouth(right), partner.opening, atol=0.01)
    np.testing.assert_allclose(puppet.sound, (puppet.own_sound + partner.own_sound) / 2, atol=1e-6)
    assert np.abs(np.corrcoef(puppet.opening, partner.opening)[0, 1]) < 0.9
    assert puppet.masks.shape == (33, 2, 4, 8) and (puppet.masks.sum(axis=1) == 1).all()


def test_puppets_are_packed_in_the_schema_of_the_curation(tmp_path: Path) -> None:
    manifest = make_puppets(tmp_path / "a", 12, 5, two=True, latents=None, unusable=0.4, hq=0.3, samples_a_shard=4)
    report = verify(str(tmp_path / "a" / "dataset.json"))
    assert not report.faults and report.samples == 12
    assert load(str(tmp_path / "a" / "dataset.json")) == manifest
    assert {name: tier.samples for name, tier in manifest.tiers.items()} == {"hq": 3, "main": 9}
    again = make_puppets(tmp_path / "b", 12, 5, two=True, latents=None, unusable=0.4, hq=0.3, samples_a_shard=4)
    assert again == manifest
    stored = Storage(str(tmp_path / "a"))
    assert stored.folders() == ["shards"]  # no files that only the packing needed
