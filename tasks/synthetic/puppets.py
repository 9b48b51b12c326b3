"""Puppets: tiny videos made by program, with known truth.

The mouth opens with the loudness of the sound. The arm does what the text says. Colours and shape are the identity. All
of this is a function of a seed and a number, so the truth about a sample in a shard can be made again at any time.

Frames are square, `size` pixels each way. Positions and lengths are fractions of `size`, x to the right and y down. Two
puppets stand side by side in a frame twice as wide. At an edge, a pixel is mixed by the share that is covered. The
mouth is a rectangle, so its area is exactly proportional to its opening.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from tasks.media.clip import SAMPLE_RATE

FPS = 25
FRAMES = 33  # frames of a clip, 4n + 1 as the codec takes
SIZE = 32  # pixels of a side

HEAD, HEAD_RADIUS = (0.34, 0.34), 0.24  # x and y of the centre
EYES, EYE_SIDE = ((0.25, 0.25), (0.43, 0.25)), 0.05
MOUTH, MOUTH_WIDTH, MOUTH_HEIGHT = (0.34, 0.41), 0.20, 0.16  # the height when the mouth is wide open
BODY_TOP = 0.61
SHOULDER, ARM_LENGTH, ARM_RADIUS = (0.61, 0.68), 0.26, 0.06
DARK = np.array([24.0, 8.0, 16.0])  # RGB of the mouth's inside and the eyes, the same for every puppet
PAN = 0.025  # by how much the camera moves the scene to a side, at most

REST_DEGREES = 25.0  # the arm's angle: 0 hangs down, 90 points to the side, 180 up
ONSET_S, RAMP_S = 0.12, 0.24  # when a gesture begins, and how long the arm takes to reach it
THERE = round((ONSET_S + RAMP_S) * FPS)  # the first frame in which the arm has reached it


@dataclass(frozen=True)
class Gesture:
    """How the arm moves."""

    mean: float
    """The angle around which the arm swings, in degrees."""
    swing: float = 0.0
    """How far it swings to each side, in degrees."""
    hertz: float = 0.0
    """How often it swings, per second."""

    def angles(self, frames: int) -> np.ndarray:
        """The arm's angle: [frames] float64 degrees. The phase counts from the onset, so the text determines it."""
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
class PuppetIdentity:
    """The colours and the shape of a puppet."""

    skin: tuple[float, float, float]
    """RGB, 0 to 255."""
    shirt: tuple[float, float, float]
    """RGB, 0 to 255."""
    wall: tuple[float, float, float]
    """RGB of the wall behind the puppet, 0 to 255."""
    corners: float
    """The shape of the head: 2 is a circle, larger values are squarer."""
    body: float
    """Width of the body."""

    @classmethod
    def of(cls, random: np.random.Generator) -> "PuppetIdentity":
        """A random identity. The skin is always much lighter than the wall, and the mouth is darker than both."""
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
    """One puppet's video and sound."""

    identity: PuppetIdentity
    gesture: str
    """A key of GESTURES."""
    camera: str = "still"
    """A key of CAMERAS."""
    size: int = SIZE
    """Pixels of a side."""
    frames: int = FRAMES
    """Frames of the clip."""
    pitch_hz: float = 150.0
    """Pitch of the voice."""
    voice: int = 0
    """Seed of the speech."""
    silent: bool = False
    """Whether the puppet says nothing."""
    partner: "Puppet | None" = None
    """A second puppet to the right, with its own sound. It has no partner itself."""

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
        """The puppet of a seed and a number. Puppets of different seeds have nothing in common. Gestures take turns.

        size: pixels of a side. frames: frames of the clip. two: with a partner. moving_camera: the camera turns in two
        of three clips.
        """
        random = np.random.default_rng([seed, number])
        puppet = cls(
            identity=PuppetIdentity.of(random),
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
            identity=replace(PuppetIdentity.of(random), wall=puppet.identity.wall),
            gesture=list(GESTURES)[int(random.integers(len(GESTURES)))],
            pitch_hz=random.uniform(100, 240),
            voice=int(random.integers(1 << 62)),
        )
        return replace(puppet, partner=beside)

    @property
    def people(self) -> list["Puppet"]:
        """The puppet and its partner, if there is one, from left to right."""
        return [self, self.partner] if self.partner else [self]

    @property
    def caption(self) -> str:
        """The text that says what the arm and the camera do."""
        if self.partner:
            doing = f"the left puppet {self.gesture}, the right puppet {self.partner.gesture}"
        else:
            doing = f"a puppet {self.gesture}"
        return doing if self.camera == "still" else f"{doing}, the camera turns {self.camera}"

    @cached_property
    def own_sound(self) -> np.ndarray:
        """The speech of this puppet, without its partner: [samples] float32 at 16 kHz."""
        said = speak(self.frames, self.voice, self.pitch_hz)
        return muted(said) if self.silent else said

    @property
    def sound(self) -> np.ndarray:
        """The sound of the clip, the mean of both puppets: [samples] float32 at 16 kHz."""
        together = np.sum([puppet.own_sound for puppet in self.people], axis=0)
        return together / len(self.people) if self.partner else together

    @cached_property
    def opening(self) -> np.ndarray:
        """How far this puppet's mouth is open: [frames] float64, 0 to 1."""
        return opening_of(self.own_sound, self.frames)

    @cached_property
    def arm(self) -> np.ndarray:
        """The angle of this puppet's arm: [frames] float64 degrees."""
        return GESTURES[self.gesture].angles(self.frames)

    @property
    def shift(self) -> np.ndarray:
        """How far the camera's turn moves the scene to the right: [frames] float64."""
        turned = np.linspace(0.0, 1.0, self.frames)
        return -CAMERAS[self.camera] * PAN * np.sin(np.pi / 2 * turned)

    @property
    def pictures(self) -> np.ndarray:
        """The frames: [frames, size, size, 3] uint8 RGB; [frames, size, 2 size, 3] with a partner."""
        return np.concatenate([draw(p.identity, p.opening, p.arm, p.size, self.shift) for p in self.people], axis=2)

    @property
    def masks(self) -> np.ndarray:
        """The latent pixels of each speaker: [frames, speakers, size / 8, speakers size / 8] bool."""
        side, count = self.size // 8, len(self.people)
        masks = np.zeros((self.frames, count, side, side * count), bool)
        for speaker in range(count):
            masks[:, speaker, :, side * speaker : side * (speaker + 1)] = True
        return masks


def reference(identity: PuppetIdentity, size: int = SIZE) -> np.ndarray:
    """An image of the puppet with the mouth closed and the arm at rest: [size, size, 3] uint8 RGB."""
    picture: np.ndarray = draw(identity, np.zeros(1), np.full(1, REST_DEGREES), size)[0]
    return picture


# ---- sound ----

_FULL = 0.25  # root mean square at which the mouth is wide open
_STEVENS = 0.6  # loudness grows with this power of the pressure (Stevens 1957)


def speak(frames: int, seed: int, pitch_hz: float) -> np.ndarray:
    """Syllables of different loudness with pauses, after a silent start.

    Returns: [samples] float32 at 16 kHz, rounded to steps of 16 bit.
    """
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
    """How far the mouth opens for a sound: [frames] float64, 0 (silence) to 1.

    It is the root mean square over the 40 ms of each frame, to the power 0.6.
    """
    each = SAMPLE_RATE // FPS
    sound = np.zeros(frames * each)
    sound[: min(len(sound), len(samples))] = samples[: len(sound)]
    loud = np.sqrt(np.square(sound).reshape(frames, each).mean(axis=1)) / _FULL
    opening: np.ndarray = np.minimum(1.0, loud**_STEVENS)
    return opening


def muted(samples: np.ndarray) -> np.ndarray:
    """Silence of the same length."""
    return np.zeros_like(samples)


def shifted(samples: np.ndarray, frames: int) -> np.ndarray:
    """The sound so many frames later. What leaves at the end comes in at the start, so no sound is lost."""
    return np.roll(samples, frames * SAMPLE_RATE // FPS)


# ---- picture ----


def draw(
    identity: PuppetIdentity, opening: np.ndarray, arm: np.ndarray, size: int = SIZE, shift: np.ndarray | None = None
) -> np.ndarray:
    """Draw a puppet, one frame for each state.

    opening: [frames] of the mouth, 0 to 1. arm: [frames] degrees. shift: [frames], to the right; no shift when None.

    Returns: [frames, size, size, 3] uint8 RGB.
    """
    frames = len(opening)
    x = (np.arange(size) + 0.5) / size - (np.zeros(frames) if shift is None else shift)[:, None]  # [frames, size]
    y = (np.arange(size) + 0.5) / size
    picture = np.broadcast_to(np.array(identity.wall, np.float32), (frames, size, size, 3)).copy()

    def paint(cover: np.ndarray, colour: object) -> None:
        nonlocal picture
        picture += cover.astype(np.float32)[..., None] * (np.asarray(colour, np.float32) - picture)

    # a beam on the wall at the far left, so that the turn of the camera is visible
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
    """The share of each pixel that the arm covers: [frames, size, size] float64.

    arm: [frames] degrees. x: [frames, size], the position of the middle of each column; without a shift when None.
    """
    y = (np.arange(size) + 0.5) / size
    x = np.broadcast_to(y, (len(arm), size)) if x is None else x
    radians = np.deg2rad(arm)[:, None, None]
    to_x, to_y = np.sin(radians), np.cos(radians)  # the unit vector along the arm
    off_x, off_y = x[:, None, :] - SHOULDER[0], (y - SHOULDER[1])[:, None]
    along = np.clip(off_x * to_x + off_y * to_y, 0, ARM_LENGTH)
    away = np.hypot(off_x - along * to_x, off_y - along * to_y)
    cover: np.ndarray = np.clip((ARM_RADIUS - away) * size + 0.5, 0, 1)
    return cover


def _inside(middles: np.ndarray, low: Any, high: Any, size: int) -> np.ndarray:
    """The share of each pixel that lies between two positions: 0 to 1, shaped like `middles`.

    middles: positions of the pixels' middles. low, high: numbers, or one number for each row of `middles`.
    """
    low, high = (np.asarray(edge)[..., None] if np.ndim(edge) else edge for edge in (low, high))
    covered: np.ndarray = np.clip(
        (np.minimum(middles + 0.5 / size, high) - np.maximum(middles - 0.5 / size, low)) * size, 0, 1
    )
    return covered
