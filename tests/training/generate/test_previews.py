"""The measure of how well a sampled video follows its sound, on videos where the answer is known."""

import numpy as np

from tasks.synthetic.puppets import FPS, Puppet, muted, shifted
from training.generate.previews import brightness_probe


def test_a_picture_goes_with_its_own_sound_more_than_with_any_other() -> None:
    for number in range(6):
        puppet = Puppet.of(0, number)
        own = brightness_probe(puppet.pictures, FPS, puppet.sound)
        others = [shifted(puppet.sound, puppet.frames // 2), Puppet.of(0, number + 50).sound]
        told = [brightness_probe(puppet.pictures, FPS, sound) for sound in others]
        assert own is not None and own > 0.9
        assert all(value is not None and value < own - 0.1 for value in told)


def test_a_still_video_or_silence_cannot_be_measured() -> None:
    puppet = Puppet.of(0, 0)
    assert brightness_probe(np.repeat(puppet.pictures[:1], puppet.frames, 0), FPS, puppet.sound) is None
    assert brightness_probe(puppet.pictures, FPS, muted(puppet.sound)) is None
    assert brightness_probe(puppet.pictures[:1], FPS, puppet.sound) is None
