"""Films of talkers without a fault, and of talkers with one fault each, in several variants.

No two films look alike. Place, furniture, person, framing, voice and words are drawn at random, with the file name as
the seed.
"""

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tasks.synthetic.encode import VideoFormat
from tasks.synthetic.film import Film
from tasks.synthetic.scene import PLACES, Appearance
from tasks.synthetic.speech import VOICES

VARIANTS = "abcdef"  # variant a is in the group "faults", the others are in "faults_more"
SECONDS = 7.0
QUALITY = ("blur", "motion blur", "dark", "bright", "noise", "blocks")  # faults of image quality
SCRIPTS = ("latin", "cyrillic", "greek", "han")


def talker(name: str, variant: int, framing: str = "upper body", look: Mapping[str, Any] = {}, **more: Any) -> Film:
    """A person who talks, in sync, in a place full of things.

    variant: index into VARIANTS. look: fields of `Appearance` to set, more: fields of `Film` to set; the others are
    drawn at random, seeded by the name.
    """
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    drawn: dict[str, Any] = {
        "place": PLACES[rng.integers(len(PLACES))],
        "hue": int(rng.integers(36)) * 10,
        "mirror": bool(rng.integers(2)),
        "x": float(rng.uniform(0.42, 0.6)),
        "zoom": float(rng.uniform(1.0, 1.25)),
        "decor": int(rng.integers(1, 10_000)),
        "stretch": float(rng.uniform(0.92, 1.1)),
        "lively": True,
    }
    speech: dict[str, Any] = {
        "voice": VOICES[rng.integers(len(VOICES))],
        "first_sentence": int(rng.integers(3)),
        "pause_s": float(rng.uniform(0.35, 0.6)),
    }
    groups = ("faults",) if variant == 0 else ("faults_more",)
    return Film(name, groups, ((SECONDS, Appearance(framing, **(drawn | dict(look)))),), **(speech | more))


def faults() -> list[Film]:
    """The films of all variants."""
    return [film for variant in range(len(VARIANTS)) for film in _variant(variant)]


def _variant(v: int) -> list[Film]:
    """The films of one variant: a film or a few of each fault, and films without a fault."""
    clean = talker(f"clean_{VARIANTS[v]}.mp4", v)
    clean_medium = talker(f"clean_medium_{VARIANTS[v]}.mp4", v, "medium", width=848, height=480)
    return [clean, clean_medium, *_text(v), *_quality(v), *_people(v), *_sound(v), *_copies(v, clean)]


def _faulty(v: int, kind: str, fault: str, strength: float = 0.0, **more: Any) -> Film:
    return talker(f"{kind}_{VARIANTS[v]}.mp4", v, fault=fault, strength=strength, **more)


def _text(v: int) -> list[Film]:
    """Subtitles, a watermark, and a sign in the scene."""
    script = SCRIPTS[v % len(SCRIPTS)]
    height, low = (0.07, 0.08, 0.1)[v % 3], (0.9, 0.86)[v % 2]
    starts = (0.4, 2.5, 4.6)
    spoken = tuple((t, t + 1.8, f"{script}_{n + 1}") for n, t in enumerate(starts))
    all_along = ((0.0, SECONDS, f"{script}_{1 + v % 3}"),)
    speed = _pan_speed(v)
    sign = {"sign": ("library", "bakery", "platform")[v % 3], "pan_speed": speed, "pan_from": 0.6}
    # the pan moves the person through the frame too, so the person stands where the camera looks at half time
    sides = {"x": 0.6 + 0.74, "sign_x": 0.42} if v % 2 == 0 else {"x": 0.6 + 0.28, "sign_x": 0.6}
    return [
        _faulty(v, "subtitles", "subtitles", height, subtitles=spoken, text_height=height, text_y=low),
        _faulty(v, "caption", "subtitles", height, subtitles=all_along, text_height=height, text_y=low),
        _faulty(v, "watermark", "watermark", 0.06, watermark=("rooftop", "pier", "kanal")[v % 3]),
        _faulty(v, "sign", "scene text", abs(speed), look=sign | sides | {"sign_y": 0.2, "zoom": 1.0}),
    ]


def _pan_speed(v: int) -> float:
    """Frame widths a second."""
    return (0.035, -0.035)[v % 2]


def _quality(v: int) -> list[Film]:
    """The faults of image quality, as in QUALITY."""
    coarse = (46, 48, 44)[v % 3]
    blocky = VideoFormat(options={"crf": str(coarse), "x264-params": "no-deblock=1"})
    return [
        _faulty(v, "blur", "blur", (2.5, 4.0, 3.0)[v % 3]),
        _faulty(v, "smear", "motion blur", (13, 19, 25)[v % 3]),
        _faulty(v, "dark", "dark", (0.2, 0.15, 0.25)[v % 3]),
        # in front of a light wall, which burns out before the face does
        _faulty(v, "bright", "bright", (0.45, 0.55, 0.5)[v % 3], look={"place": "office"}),
        _faulty(v, "noise", "noise", (22, 30, 26)[v % 3]),
        _faulty(v, "blocks", "blocks", coarse, video=blocky),
    ]


def _people(v: int) -> list[Film]:
    """More than one person, nobody, no movement, and a shaken camera."""
    beside = Appearance("medium", hue=200, mirror=v % 2 == 0, x=0.78, stretch=1.05, zoom=1.0)
    left = {"x": 0.3, "zoom": 1.0, "beside": beside}
    since = (1.0, 2.5, 0.0)[v % 3]
    until = since + (3.0, 3.5, 2.6)[v % 3]
    second_face = left | {"beside_s": ((since, until),)}
    turning = {"pan_from": 0.6, "pan_speed": _pan_speed(v)}  # without a person, a fixed camera would see no movement
    shaken = ((1.0, 4.0), (2.0, 6.0), (0.5, 3.5))[v % 3]
    return [
        _faulty(v, "two_people", "two people", look=left),
        _faulty(v, "second_face", "second face", (until - since) / SECONDS, look=second_face),
        talker(f"nobody_{VARIANTS[v]}.mp4", v, "", turning, fault="nobody"),
        _faulty(v, "static", "static", 1.0, look={"frozen_s": ((0.0, SECONDS),)}, lips="closed"),
        _faulty(v, "shake", "shake", (shaken[1] - shaken[0]) / SECONDS, look={"shake_s": (shaken,)}),
    ]


def _sound(v: int) -> list[Film]:
    """Sound that is late or early, of another speaker, missing or music; and a clean film with faint music."""
    films = []
    for late_s in (0.2, 0.4, 1.0):
        films.append(_faulty(v, f"late_{late_s:.1f}", "offset", late_s, late_s=late_s))
        films.append(_faulty(v, f"early_{late_s:.1f}", "offset", -late_s, late_s=-late_s))
    return [
        *films,
        _faulty(v, "other_speech", "other speech", lips="other"),
        _faulty(v, "voice_over", "voice-over", lips="closed"),
        _faulty(v, "silence", "silence", voice=""),
        _faulty(v, "music", "music", music=1.0, voice=""),
        talker(f"clean_music_{VARIANTS[v]}.mp4", v, music=0.12),
    ]


def _copies(v: int, clean: Film) -> list[Film]:
    """Copies of the clean film: coarser, smaller and lighter."""
    copy: dict[str, Any] = {"groups": clean.groups, "fault": "copy", "like": clean.name}
    return [
        replace(clean, name=f"copy_coded_{VARIANTS[v]}.mp4", video=VideoFormat(options={"crf": "34"}), **copy),
        replace(clean, name=f"copy_small_{VARIANTS[v]}.mp4", width=480, height=270, **copy),
        replace(clean, name=f"copy_lighter_{VARIANTS[v]}.mp4", light=1.08, **copy),
    ]
