"""Puppets: tiny videos made by program, of which everything is known.

The mouth opens with the loudness of the sound, the arm does what the text says, colours and shape are the identity. All
of it is a function of a seed and a number, so what a shard holds can be had again beside what was made of it.

Pictures are square, `size` pixels each way; places are fractions of that. Two puppets stand side by side in a picture
twice as wide. Edges are drawn by the share of a pixel that they cover; the mouth is a rectangle, so that its area is
the opening exactly.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from tasks.clip import SAMPLE_RATE

FPS = 25
FRAMES = 33  # 4n + 1
SIZE = 32

HEAD, HEAD_RADIUS = (0.34, 0.34), 0.24  # centre x, y
EYES, EYE_SIDE = ((0.25, 0.25), (0.43, 0.25)), 0.05
MOUTH, MOUTH_WIDTH, MOUTH_HEIGHT = (0.34, 0.41), 0.20, 0.16  # the height when it is wide open
BODY_TOP = 0.61
SHOULDER, ARM_LENGTH, ARM_RADIUS = (0.61, 0.68), 0.26, 0.06
DARK = np.array([24.0, 8.0, 16.0])  # of mouth and eyes, of every puppet
PAN = 0.025  # how far the camera turns to a side, at most

REST_DEGREES = 25.0  # the arm's angle: 0 hangs down, 90 points to the side, 180 up
ONSET_S, RAMP_S = 0.12, 0.24  # when a gesture begins, and how long the arm takes to get there
THERE = round((ONSET_S + RAMP_S) * FPS)  # the first frame in which it is there


@dataclass(frozen=True)
class Gesture:
    """Around which angle the arm moves, how far to each side, and how often a second."""

    mean: float
    swing: float = 0.0
    hertz: float = 0.0

    def angles(self, frames: int) -> np.ndarray:
        """[frames] degrees. The phase counts from the onset, so that text alone says where the arm is."""
        seconds = np.arange(frames) / FPS - ONSET_S
        there = np.clip(seconds / RAMP_S, 0.0, 1.0)
        there = there * there * (3.0 - 2.0 * there)
        target = self.mean + self.swing * np.sin(2 * np.pi * self.hertz * (seconds - RAMP_S))
        angles: np.ndarray = REST_DEGREES + there * (target - REST_DEGREES)
        return angles


GESTURES = {
    "rests": Gesture(REST_DEGREES),
    "beckons": Gesture(60.0, 12.0, 2.0),
    "points": Gesture(95.0),
    "waves": Gesture(130.0, 15.0, 2.0),
    "salutes": Gesture(165.0),
}
CAMERAS = {"still": 0.0, "left": -1.0, "right": 1.0}


@dataclass(frozen=True)
class Identity:
    """skin, shirt, wall: RGB 0..255. corners: of the head, 2 a circle, more is squarer. body: width of the body."""

    skin: tuple[float, float, float]
    shirt: tuple[float, float, float]
    wall: tuple[float, float, float]
    corners: float
    body: float

    @classmethod
    def of(cls, random: np.random.Generator) -> "Identity":
        """Skin always much lighter than the wall, and the mouth darker than both."""
        return cls(
            skin=_colour(random.uniform(), random.uniform(0.2, 0.55), random.uniform(0.85, 1.0)),
            shirt=_colour(random.uniform(), random.uniform(0.5, 0.9), random.uniform(0.5, 0.9)),
            wall=_colour(random.uniform(), random.uniform(0.2, 0.5), random.uniform(0.3, 0.45)),
            corners=random.uniform(2.0, 4.0),
            body=random.uniform(0.34, 0.46),
        )


def _colour(hue: float, saturation: float, value: float) -> tuple[float, float, float]:
    import colorsys

    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return 255 * red, 255 * green, 255 * blue


@dataclass(frozen=True)
class Puppet:
    """One puppet's video and sound.

    gesture: of GESTURES. camera: of CAMERAS. size: pixels of a side. pitch_hz: of its voice. voice: seed of what it
    says. silent: it says nothing. partner: who stands to its right, with a sound of their own; who has no partner in
    turn.
    """

    identity: Identity
    gesture: str
    camera: str = "still"
    size: int = SIZE
    frames: int = FRAMES
    pitch_hz: float = 150.0
    voice: int = 0
    silent: bool = False
    partner: "Puppet | None" = None

    @classmethod
    def of(
        cls,
        seed: int,
        number: int,
        *,
        size: int = SIZE,
        frames: int = FRAMES,
        two: bool = False,
        moving_camera: bool = False,
    ) -> "Puppet":
        """The puppet of a number; those of different seeds have nothing in common. Gestures take turns.

        two: with a partner. moving_camera: the camera turns in two of three.
        """
        random = np.random.default_rng([seed, number])
        puppet = cls(
            identity=Identity.of(random),
            gesture=list(GESTURES)[number % len(GESTURES)],
            camera=list(CAMERAS)[number // len(GESTURES) % 3] if moving_camera else "still",
            size=size,
            frames=frames,
            pitch_hz=random.uniform(100, 240),
            voice=int(random.integers(1 << 62)),
        )
        if not two:
            return puppet
        beside = replace(
            puppet,
            identity=replace(Identity.of(random), wall=puppet.identity.wall),
            gesture=list(GESTURES)[int(random.integers(len(GESTURES)))],
            pitch_hz=random.uniform(100, 240),
            voice=int(random.integers(1 << 62)),
        )
        return replace(puppet, partner=beside)

    @property
    def people(self) -> list["Puppet"]:
        return [self, self.partner] if self.partner else [self]

    @property
    def caption(self) -> str:
        if self.partner:
            doing = f"the left puppet {self.gesture}, the right puppet {self.partner.gesture}"
        else:
            doing = f"a puppet {self.gesture}"
        return doing if self.camera == "still" else f"{doing}, the camera turns {self.camera}"

    @cached_property
    def own_sound(self) -> np.ndarray:
        """[samples] float32 at 16 kHz: what this puppet says, its partner does not count."""
        said = speak(self.frames, self.voice, self.pitch_hz)
        return muted(said) if self.silent else said

    @property
    def sound(self) -> np.ndarray:
        """[samples] float32 at 16 kHz: all that is heard."""
        together = np.sum([puppet.own_sound for puppet in self.people], axis=0)
        return together / len(self.people) if self.partner else together

    @cached_property
    def opening(self) -> np.ndarray:
        """[frames] float64 in 0..1: how far its own mouth is open."""
        return opening_of(self.own_sound, self.frames)

    @cached_property
    def arm(self) -> np.ndarray:
        """[frames] float64: degrees of its own arm."""
        return GESTURES[self.gesture].angles(self.frames)

    @property
    def shift(self) -> np.ndarray:
        """[frames] float64: how far to the right the camera's turning moves all that stands there."""
        turned = np.linspace(0.0, 1.0, self.frames)
        return -CAMERAS[self.camera] * PAN * np.sin(np.pi / 2 * turned)

    @property
    def pictures(self) -> np.ndarray:
        """[frames, size, size or twice that, 3] uint8 RGB."""
        return np.concatenate([draw(p.identity, p.opening, p.arm, p.size, self.shift) for p in self.people], axis=2)

    @property
    def masks(self) -> np.ndarray:
        """[frames, speakers, size / 8, all sizes / 8] bool: the latent pixels of each."""
        side, count = self.size // 8, len(self.people)
        masks = np.zeros((self.frames, count, side, side * count), bool)
        for speaker in range(count):
            masks[:, speaker, :, side * speaker : side * (speaker + 1)] = True
        return masks


def reference(identity: Identity, size: int = SIZE) -> np.ndarray:
    """[size, size, 3] uint8 RGB: the mouth closed, the arm at rest."""
    picture: np.ndarray = draw(identity, np.zeros(1), np.full(1, REST_DEGREES), size)[0]
    return picture


# ---- sound ----

_FULL = 0.25  # root mean square at which the mouth is wide open
_STEVENS = 0.6  # loudness grows with this power of the pressure (Stevens 1957)


def speak(frames: int, seed: int, pitch_hz: float) -> np.ndarray:
    """Syllables of different loudness with pauses, silent at first: [samples] float32 at 16 kHz, in 16 bit steps."""
    random = np.random.default_rng(seed)
    total = round(frames * SAMPLE_RATE / FPS)
    seconds = np.arange(total) / SAMPLE_RATE
    envelope = np.zeros(total)
    at = random.uniform(0.06, 0.2)
    while at < seconds[-1]:
        length, peak = random.uniform(0.16, 0.32), random.uniform(0.1, 1.0)
        inside = (seconds >= at) & (seconds < at + length)
        envelope[inside] += peak * np.sin(np.pi * (seconds[inside] - at) / length)
        at += length + (random.uniform(0.2, 0.4) if random.uniform() < 0.25 else random.uniform(0.0, 0.08))
    phase = 2 * np.pi * np.cumsum(pitch_hz * (1 + 0.05 * np.sin(2 * np.pi * 1.3 * seconds))) / SAMPLE_RATE
    weights = 1.0 / np.arange(1, 9)
    tone = sum(weight * np.sin(k * phase) for k, weight in enumerate(weights, 1))
    tone = tone / np.sqrt(np.square(weights).sum() / 2)  # root mean square 1
    samples = np.round(np.clip(_FULL * envelope * tone, -1, 1) * 32767) / 32767
    return samples.astype(np.float32)


def opening_of(samples: np.ndarray, frames: int) -> np.ndarray:
    """How far a mouth opens that says this, frame by frame: [frames] float64, 0 for silence to 1.

    By the root mean square over each frame's 40 ms, to the 0.6th power.
    """
    each = SAMPLE_RATE // FPS
    sound = np.zeros(frames * each)
    sound[: min(len(sound), len(samples))] = samples[: len(sound)]
    loud = np.sqrt(np.square(sound).reshape(frames, each).mean(axis=1)) / _FULL
    opening: np.ndarray = np.minimum(1.0, loud**_STEVENS)
    return opening


def muted(samples: np.ndarray) -> np.ndarray:
    return np.zeros_like(samples)


def shifted(samples: np.ndarray, frames: int) -> np.ndarray:
    """The sound so many frames later, what goes out at the end coming in at the start: as much is heard as before."""
    return np.roll(samples, frames * SAMPLE_RATE // FPS)


# ---- picture ----


def draw(
    identity: Identity, opening: np.ndarray, arm: np.ndarray, size: int = SIZE, shift: np.ndarray | None = None
) -> np.ndarray:
    """A puppet in every state.

    opening: [frames] 0..1. arm: [frames] degrees. shift: [frames], to the right; none when None.
    Returns: [frames, size, size, 3] uint8 RGB.
    """
    frames = len(opening)
    x = (np.arange(size) + 0.5) / size - (np.zeros(frames) if shift is None else shift)[:, None]  # [frames, size]
    y = (np.arange(size) + 0.5) / size
    picture = np.broadcast_to(np.array(identity.wall, np.float32), (frames, size, size, 3)).copy()

    def paint(cover: np.ndarray, colour: object) -> None:
        nonlocal picture
        picture += cover.astype(np.float32)[..., None] * (np.asarray(colour, np.float32) - picture)

    # a beam on the wall, at the far left, by which the camera's turning is seen in an empty place
    beam = _inside(x, -0.2, 0.04, size)[:, None, :] * np.ones((size, 1))
    paint(beam, np.array(identity.wall) * 0.6)
    left = SHOULDER[0] - 0.02 - identity.body
    paint(
        _inside(x, left, left + identity.body, size)[:, None, :] * _inside(y, BODY_TOP, 2.0, size)[:, None],
        identity.shirt,
    )
    off_x, off_y = np.abs(x - HEAD[0]) / HEAD_RADIUS, np.abs(y - HEAD[1]) / HEAD_RADIUS
    radius = (off_x[:, None, :] ** identity.corners + off_y[:, None] ** identity.corners) ** (1 / identity.corners)
    paint(np.clip((1 - radius) * HEAD_RADIUS * size + 0.5, 0, 1), identity.skin)
    for eye_x, eye_y in EYES:
        half = EYE_SIDE / 2
        paint(
            _inside(x, eye_x - half, eye_x + half, size)[:, None, :]
            * _inside(y, eye_y - half, eye_y + half, size)[:, None],
            DARK,
        )
    lip = MOUTH_HEIGHT / 2 * opening
    paint(
        _inside(x, MOUTH[0] - MOUTH_WIDTH / 2, MOUTH[0] + MOUTH_WIDTH / 2, size)[:, None, :]
        * _inside(np.broadcast_to(y, (frames, size)), MOUTH[1] - lip, MOUTH[1] + lip, size)[:, :, None],
        DARK,
    )
    paint(arm_cover(arm, size, x), identity.skin)
    return np.rint(picture).astype(np.uint8)


def arm_cover(arm: np.ndarray, size: int, x: np.ndarray | None = None) -> np.ndarray:
    """What share of each pixel the arm covers: [frames, size, size] float64.

    arm: [frames] degrees. x: [frames, size], where the middles of the columns are; the pixels' own when None.
    """
    y = (np.arange(size) + 0.5) / size
    x = np.broadcast_to(y, (len(arm), size)) if x is None else x
    radians = np.deg2rad(arm)[:, None, None]
    to_x, to_y = np.sin(radians), np.cos(radians)  # along the arm
    off_x, off_y = x[:, None, :] - SHOULDER[0], (y - SHOULDER[1])[:, None]
    along = np.clip(off_x * to_x + off_y * to_y, 0, ARM_LENGTH)
    away = np.hypot(off_x - along * to_x, off_y - along * to_y)
    cover: np.ndarray = np.clip((ARM_RADIUS - away) * size + 0.5, 0, 1)
    return cover


def _inside(middles: np.ndarray, low: Any, high: Any, size: int) -> np.ndarray:
    """How much of each pixel lies between two places: like `middles`, 0 to 1. low, high: numbers, or one a row."""
    low, high = (np.asarray(edge)[..., None] if np.ndim(edge) else edge for edge in (low, high))
    covered: np.ndarray = np.clip(
        (np.minimum(middles + 0.5 / size, high) - np.maximum(middles - 0.5 / size, low)) * size, 0, 1
    )
    return covered
