"""Measures of whether what is sampled follows its sound, on videos of which that is known."""

import numpy as np

from tests.world.puppets import FPS, Puppet, muted, shifted
from training.previews import picture_probe


def test_a_picture_goes_with_its_own_sound_more_than_with_any_other() -> None:
    for number in range(6):
        puppet = Puppet.of(0, number)
        own = picture_probe(puppet.pictures, FPS, puppet.sound)
        others = [shifted(puppet.sound, puppet.frames // 2), Puppet.of(0, number + 50).sound]
        told = [picture_probe(puppet.pictures, FPS, sound) for sound in others]
        assert own is not None and own > 0.9
        assert all(value is not None and value < own - 0.1 for value in told)


def test_where_nothing_changes_nothing_is_told() -> None:
    puppet = Puppet.of(0, 0)
    assert picture_probe(np.repeat(puppet.pictures[:1], puppet.frames, 0), FPS, puppet.sound) is None
    assert picture_probe(puppet.pictures, FPS, muted(puppet.sound)) is None
    assert picture_probe(puppet.pictures[:1], FPS, puppet.sound) is None
