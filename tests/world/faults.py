"""Talkers with nothing wrong, and talkers with one fault each, in several variants.

No two files share their look: place, furniture, person, framing, voice and words are drawn from the file's name.
"""

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tests.world.encode import VideoFormat
from tests.world.film import Film
from tests.world.scene import PLACES, Look
from tests.world.speech import VOICES

VARIANTS = "abcdef"  # the first in the group "faults", the others in "faults_more"
SECONDS = 7.0
QUALITY = ("blur", "motion blur", "dark", "bright", "noise", "blocks")  # faults of the picture itself
SCRIPTS = ("latin", "cyrillic", "greek", "han")


def talker(name: str, variant: int, framing: str = "upper body", look: Mapping[str, Any] = {}, **more: Any) -> Film:
    """Somebody who talks, in sync, before a place full of things."""
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
    said: dict[str, Any] = {
        "voice": VOICES[rng.integers(len(VOICES))],
        "first_sentence": int(rng.integers(3)),
        "pause_s": float(rng.uniform(0.35, 0.6)),
    }
    groups = ("faults",) if variant == 0 else ("faults_more",)
    return Film(name, groups, ((SECONDS, Look(framing, **(drawn | dict(look)))),), **(said | more))


def faults() -> list[Film]:
    """All of them."""
    return [film for variant in range(len(VARIANTS)) for film in _variant(variant)]


def _variant(v: int) -> list[Film]:
    """One file, or a few, of each fault."""
    films: list[Film] = []

    def add(kind: str, fault: str, strength: float = 0.0, **more: Any) -> None:
        films.append(talker(f"{kind}_{VARIANTS[v]}.mp4", v, fault=fault, strength=strength, **more))

    clean = talker(f"clean_{VARIANTS[v]}.mp4", v)
    films += [clean, talker(f"clean_medium_{VARIANTS[v]}.mp4", v, "medium", width=848, height=480)]

    script = SCRIPTS[v % len(SCRIPTS)]
    height, low = (0.07, 0.08, 0.1)[v % 3], (0.9, 0.86)[v % 2]
    starts = (0.4, 2.5, 4.6)
    spoken = tuple((t, t + 1.8, f"{script}_{n + 1}") for n, t in enumerate(starts))
    add("subtitles", "subtitles", height, subtitles=spoken, text_height=height, text_y=low)
    all_along = ((0.0, SECONDS, f"{script}_{1 + v % 3}"),)
    add("caption", "subtitles", height, subtitles=all_along, text_height=height, text_y=low)
    add("watermark", "watermark", 0.06, watermark=("rooftop", "pier", "kanal")[v % 3])
    speed = (0.035, -0.035)[v % 2]
    sign = {"sign": ("library", "bakery", "platform")[v % 3], "pan_speed": speed, "pan_from": 0.6}
    # the camera turns over the person too, so the person stands where the middle of the turn is
    sides = {"x": 0.6 + 0.74, "sign_x": 0.42} if v % 2 == 0 else {"x": 0.6 + 0.28, "sign_x": 0.6}
    add("sign", "scene text", abs(speed), look=sign | sides | {"sign_y": 0.2, "zoom": 1.0})

    add("blur", "blur", (2.5, 4.0, 3.0)[v % 3])
    add("smear", "motion blur", (13, 19, 25)[v % 3])
    add("dark", "dark", (0.2, 0.15, 0.25)[v % 3])
    # before a light wall, which burns out before the face does
    add("bright", "bright", (0.45, 0.55, 0.5)[v % 3], look={"place": "office"})
    add("noise", "noise", (22, 30, 26)[v % 3])
    coarse = (46, 48, 44)[v % 3]
    add("blocks", "blocks", coarse, video=VideoFormat(options={"crf": str(coarse), "x264-params": "no-deblock=1"}))

    beside = Look("medium", hue=200, mirror=v % 2 == 0, x=0.78, stretch=1.05, zoom=1.0)
    left = {"x": 0.3, "zoom": 1.0, "beside": beside}
    add("two_people", "two people", look=left)
    since = (1.0, 2.5, 0.0)[v % 3]
    until = since + (3.0, 3.5, 2.6)[v % 3]
    add("second_face", "second face", (until - since) / SECONDS, look=left | {"beside_s": ((since, until),)})
    turning = {"pan_from": 0.6, "pan_speed": speed}  # with nobody there, a fixed camera would see nothing move
    films.append(talker(f"nobody_{VARIANTS[v]}.mp4", v, "", turning, fault="nobody"))
    add("static", "static", 1.0, look={"frozen_s": ((0.0, SECONDS),)}, lips="closed")
    shaken = ((1.0, 4.0), (2.0, 6.0), (0.5, 3.5))[v % 3]
    add("shake", "shake", (shaken[1] - shaken[0]) / SECONDS, look={"shake_s": (shaken,)})

    for late_s in (0.2, 0.4, 1.0):
        add(f"late_{late_s:.1f}", "offset", late_s, late_s=late_s)
        add(f"early_{late_s:.1f}", "offset", -late_s, late_s=-late_s)
    add("other_speech", "other speech", lips="other")
    add("voice_over", "voice-over", lips="closed")
    add("silence", "silence", voice="")
    add("music", "music", music=1.0, voice="")
    films.append(talker(f"clean_music_{VARIANTS[v]}.mp4", v, music=0.12))

    again: dict[str, Any] = {"groups": clean.groups, "fault": "copy", "like": clean.name}
    films += [
        replace(clean, name=f"copy_coded_{VARIANTS[v]}.mp4", video=VideoFormat(options={"crf": "34"}), **again),
        replace(clean, name=f"copy_small_{VARIANTS[v]}.mp4", width=480, height=270, **again),
        replace(clean, name=f"copy_lighter_{VARIANTS[v]}.mp4", light=1.08, **again),
    ]  # fmt: skip
    return films
