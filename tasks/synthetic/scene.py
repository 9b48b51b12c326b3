"""Shots: a place, with a person or without, seen by a camera. A shot can be rendered at any time."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from tasks.synthetic import lines, portrait

FRAMINGS = ("upper body", "medium", "full", "long")
PLACES = ("office", "park", "studio", "night")
EVENT_BOX = (0.02, 0.03, 0.22, 0.27)  # x0, y0, x1, y1 as fractions of the frame: a fifth of the width, in a corner


@dataclass(frozen=True)
class Appearance:
    """What one shot shows. Times are in seconds on the film's own clock."""

    framing: str = "upper body"
    """One of FRAMINGS, "" for no person."""
    place: str = "office"
    """One of PLACES."""
    hue: int = 0
    """Degrees by which the hue of the suit turns."""
    mirror: bool = False
    """Whether the person is mirrored left to right."""
    x: float = 0.52
    """Where the person stands, as a fraction of the frame's width."""
    zoom: float = 1.0
    """By how much the whole frame is enlarged."""
    pan_from: float = 0.0
    """Where the camera looks at first, in frame widths to the right."""
    pan_speed: float = 0.0
    """How fast the camera turns, in frame widths a second."""
    shake_s: tuple[tuple[float, float], ...] = ()
    """Spans with a violently shaken camera."""
    frozen_s: tuple[tuple[float, float], ...] = ()
    """Spans in which the frame stands still."""
    decor: int = 0
    """Seed of the things that stand in the place. 0: no things."""
    stretch: float = 1.0
    """The person's width, relative to the photograph."""
    lively: bool = False
    """Whether the mouth also rounds and spreads (tasks.synthetic.speech). Otherwise it only opens."""
    sign: str = ""
    """The line (tasks.synthetic.lines) on a sign that stands in the place. "": no sign."""
    sign_x: float = 0.8
    """x of the sign's middle, as a fraction of the frame as the camera sees it at first."""
    sign_y: float = 0.25
    """y of the sign's middle, likewise."""
    beside: "Appearance | None" = None
    """The look of a second, silent person. Only the fields that concern a person are used."""
    beside_s: tuple[tuple[float, float], ...] = ()
    """Spans in which the second person is there. All the time when empty."""


def _texture(height: int, width: int, seed: int, grain: float) -> np.ndarray:
    """Smooth noise of several sizes: [height, width] float32, mean 0, about -1..1."""
    import cv2

    rng = np.random.default_rng(seed)
    total = np.zeros((height, width), np.float32)
    for octave in range(4):
        cells = max(2, round(height / (grain * 2**-octave)))
        coarse = rng.uniform(-1, 1, (cells, max(2, round(cells * width / height)))).astype(np.float32)
        total += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) * 0.55**octave
    return total / 1.6


@cache
def _place(name: str, height: int, width: int) -> np.ndarray:
    """An empty place: [height, width, 3] uint8 RGB."""
    import cv2

    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    y, x = y / height, x / height  # in frame heights

    def paint(colour: tuple[int, int, int], x0: float, y0: float, x1: float, y1: float) -> None:
        left, top, right, bottom = (round(v * height) for v in (x0, y0, x1, y1))
        cv2.rectangle(picture, (left, top), (right, bottom), colour, -1)

    noise = _texture(height, width, PLACES.index(name), height / 3)
    aspect = width / height
    colours = {"office": (196, 190, 176), "park": (120, 170, 225), "studio": (52, 92, 110), "night": (26, 26, 48)}
    picture = np.clip(np.array(colours[name]) + noise[..., None] * 14, 0, 255).astype(np.uint8)
    if name == "office":
        for k in range(int(aspect / 0.9) + 1):
            at = 0.9 * k
            paint((150, 186, 214), at + 0.12, 0.12, at + 0.42, 0.5)
            paint((236, 236, 232), at + 0.26, 0.12, at + 0.28, 0.5)
            paint((104, 74, 52), at + 0.5, 0.56, at + 0.84, 0.58)
            for book in range(7):
                tall = 0.09 + 0.03 * ((book * 5 + k) % 3)
                colour = ((170, 60, 50), (50, 90, 140), (200, 170, 80), (70, 120, 80))[(book + k) % 4]
                paint(colour, at + 0.51 + 0.045 * book, 0.56 - tall, at + 0.545 + 0.045 * book, 0.56)
        paint((120, 104, 92), 0, 0.86, aspect, 1)
    elif name == "park":
        hills = 0.52 + 0.07 * np.sin(3.1 * x) + 0.03 * np.sin(7.7 * x + 1)
        grass = np.clip(np.array((86, 140, 62)) + noise[..., None] * 40, 0, 255).astype(np.uint8)
        picture = np.where((y > hills)[..., None], grass, picture)
        for k in range(int(aspect / 0.55) + 1):
            at, size = 0.28 + 0.55 * k, 0.13 + 0.04 * (k % 3)
            paint((92, 66, 44), at - 0.015, 0.42, at + 0.015, 0.66)
            leaves = (x - at) ** 2 + (y - 0.36) ** 2 < size**2 * (1 + 0.35 * noise)
            green = np.clip(np.array((40, 98, 44)) + noise[..., None] * 46, 0, 255).astype(np.uint8)
            picture = np.where(leaves[..., None], green, picture)
    elif name == "studio":
        for k in range(int(aspect / 0.3) + 1):
            paint((66, 116, 134) if k % 2 else (44, 78, 96), 0.3 * k, 0.1, 0.3 * k + 0.24, 0.78)
        paint((150, 120, 84), 0, 0.84, aspect, 0.88)
        paint((90, 70, 52), 0, 0.88, aspect, 1)
    else:
        rng = np.random.default_rng(11)
        for k in range(int(aspect / 0.16) + 1):
            top = 0.25 + 0.45 * rng.random()
            paint((38 + int(20 * rng.random()), 36, 60), 0.16 * k, top, 0.16 * k + 0.14, 1)
            for _ in range(10):
                wx, wy = 0.16 * k + 0.02 + 0.1 * rng.random(), top + 0.03 + (0.9 - top) * rng.random()
                paint((250, 214, 120), wx, wy, wx + 0.02, wy + 0.03)
    return picture


@cache
def _furnished(name: str, height: int, width: int, decor: int) -> np.ndarray:
    """A place with randomly drawn things in it: [height, width, 3] uint8 RGB."""
    import cv2

    if not decor:
        return _place(name, height, width)
    rng = np.random.default_rng(decor)
    picture = _place(name, height, width).astype(np.float32)
    turned = rng.integers(0, 2)
    picture = picture[:, ::-1] * rng.uniform(0.8, 1.1) if turned else picture * rng.uniform(0.8, 1.1)
    for _ in range(round(9 * width / height)):
        shape = np.zeros((height, width), np.float32)
        x, y = rng.uniform(0, width), rng.uniform(0.1, 0.95) * height
        half_x, half_y = rng.uniform(0.03, 0.16, 2) * height
        if rng.random() < 0.5:
            cv2.rectangle(shape, (int(x - half_x), int(y - half_y)), (int(x + half_x), int(y + half_y)), 1.0, -1)
        else:
            cv2.ellipse(shape, (int(x), int(y)), (int(half_x), int(half_y)), 0, 0, 360, 1.0, -1)
        cover = cv2.GaussianBlur(shape, (0, 0), height / 400)[..., None]
        grain = _texture(height, width, int(rng.integers(1000)), height / 6)[..., None] * 12
        picture = picture * (1 - cover) + cover * (rng.uniform(40, 210) + rng.normal(0, 24, 3) + grain)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _with_sign(place: np.ndarray, look: Appearance, width: int) -> np.ndarray:
    """A place with a sign: dark letters on a light board. width: pixels of the frame."""
    import cv2

    height = place.shape[0]
    mask = lines.mask(look.sign, round(0.085 * height))
    rows, columns = mask.shape
    y, x = round(look.sign_y * height - rows / 2), round((look.sign_x + look.pan_from) * width - columns / 2)
    place, edge = place.copy(), rows // 3
    cv2.rectangle(place, (x - edge, y - edge), (x + columns + edge, y + rows + edge), (232, 228, 214), -1)
    part = place[y : y + rows, x : x + columns]
    cover = mask[: part.shape[0], : part.shape[1], None] / np.float32(255)
    part[:] = (part * (1 - cover) + cover * np.array((30, 34, 60), np.float32)).astype(np.uint8)
    return place


def _rows(framing: str) -> tuple[float, float, float]:
    """(height of the head's top in the frame, lowest row of the figure in view, height of that row in the frame).

    Heights are fractions of the frame's height, from the top.
    """
    return {
        "upper body": (0.07, portrait.CHEST, 1.0),
        "medium": (0.06, portrait.HIPS, 1.0),
        "full": (0.05, portrait.SOLES, 0.96),
        "long": (0.4, portrait.SOLES, 0.92),
    }[framing]


class ScriptedShot:
    """One shot, ready to be rendered."""

    def __init__(
        self,
        look: Appearance,
        width: int,
        height: int,
        mouth: Callable[[float], tuple[float, float]],
        start_s: float = 0.0,
    ) -> None:
        """
        width, height: pixels of the frame.
        mouth: a function from time in seconds to the opening of the person's mouth, 0 to 1, and its spread, -1 to 1.
        start_s: when the shot begins.
        """
        import cv2

        self.look, self.width, self.height, self.mouth, self.start_s = look, width, height, mouth, start_s
        self.still: tuple[np.ndarray, np.ndarray] | None = None  # the last camera matrix and its image without people
        wide = 3.0 if look.pan_speed else 1.0
        self.place = _furnished(look.place, height, round(width * wide), look.decor)
        if look.sign:
            self.place = _with_sign(self.place, look, width)
        self.beside = ScriptedShot(look.beside, width, height, lambda time_s: (0.0, 0.0)) if look.beside else None
        if not look.framing:
            return
        levels, opacity = portrait.figure(
            look.framing not in ("upper body",), look.hue, look.mirror, portrait.SPREADS if look.lively else (0.0,)
        )
        head_at, lowest, lowest_at = _rows(look.framing)
        scale = (lowest_at - head_at) * height / (lowest - portrait.HEAD_TOP)
        scale = min(scale, 1.6 * width / portrait.WIDTH)  # tall pictures
        self.scale = scale
        self.top = lowest_at * height - lowest * scale
        # shrink the figure once, so that rendering samples it at about its own size
        self.shrink = min(1.0, scale * look.zoom)
        size = (round(opacity.shape[1] * self.shrink), round(opacity.shape[0] * self.shrink))
        self.levels = [cv2.resize(level, size, interpolation=cv2.INTER_AREA) for level in levels]
        self.opacity = cv2.resize(opacity, size, interpolation=cv2.INTER_AREA)
        self.shrink = size[1] / opacity.shape[0]

    def render(self, time_s: float, frame_s: float) -> np.ndarray:
        """The frame on display from `time_s` for `frame_s` seconds: [height, width, 3] uint8 RGB."""
        import cv2

        for start, end in self.look.frozen_s:
            if start <= time_s < end:
                time_s = start
        camera = self._camera(time_s)
        if self.still is not None and np.array_equal(camera, self.still[0]):
            picture = self.still[1].copy()
        else:
            size, border = (self.width, self.height), cv2.BORDER_REFLECT
            picture = cv2.warpAffine(self.place, camera[:2], size, flags=cv2.INTER_LINEAR, borderMode=border)
            self.still = (camera, picture.copy())
        if self.beside and any(start <= time_s < end for start, end in self.look.beside_s or ((-1.0, 1e9),)):
            self.beside._add_person(picture, camera, time_s + 1.7, frame_s)  # out of step with the other
        if self.look.framing:
            self._add_person(picture, camera, time_s, frame_s)
        return picture

    def _camera(self, t: float) -> np.ndarray:
        """The matrix from pixels of the place to pixels of the frame: [3, 3]."""
        look = self.look
        dx = -(look.pan_from + look.pan_speed * (t - self.start_s)) * self.width
        dy = turn = 0.0
        if any(start <= t < end for start, end in look.shake_s):
            # an unrelated position in every frame, as of a camera in the hand of a runner
            rng = np.random.default_rng(round(t * 1000))
            dx, dy = dx + rng.uniform(-0.09, 0.09) * self.width, rng.uniform(-0.12, 0.12) * self.height
            turn = rng.uniform(-0.12, 0.12)
        middle_x, middle_y = self.width / 2, self.height * 0.42
        cos, sin = look.zoom * np.cos(turn), look.zoom * np.sin(turn)
        about = np.array([[cos, -sin, middle_x], [sin, cos, middle_y], [0, 0, 1]])
        move = np.array([[1, 0, dx - middle_x], [0, 1, dy - middle_y], [0, 0, 1]])
        return about @ move

    def _add_person(self, picture: np.ndarray, camera: np.ndarray, t: float, frame_s: float) -> None:
        """Draw the person into the image, as they are at time `t`."""
        import cv2

        loud, spread = self.mouth(t + frame_s / 2)
        opening = min(portrait.LEVELS - 1, round(loud * (portrait.LEVELS - 1)))
        width = round((spread + 1) / 2 * (len(self.levels) // portrait.LEVELS - 1))
        level = self.levels[width * portrait.LEVELS + opening]
        # the person sways a little about the hips
        lean = 0.016 * np.sin(1.9 * t + 0.4) + 0.008 * np.sin(4.3 * t + 1.1)
        breath = 1 + 0.006 * np.sin(1.5 * t)
        s = self.scale * breath / self.shrink
        cos, sin = s * np.cos(lean), s * np.sin(lean)
        middle = portrait.WIDTH - portrait.MIDDLE if self.look.mirror else portrait.MIDDLE
        pivot_x, pivot_y = middle * self.shrink, min(portrait.HIPS * self.shrink, self.opacity.shape[0])
        stand_x = self.look.x * self.width
        stand_y = self.top + pivot_y / self.shrink * self.scale
        stretch = self.look.stretch
        place = np.array([[cos * stretch, -sin, stand_x], [sin * stretch, cos, stand_y], [0, 0, 1]])
        place = camera @ place @ np.array([[1, 0, -pivot_x], [0, 1, -pivot_y], [0, 0, 1]])
        # draw only the part of the frame that the figure can reach
        h, w = self.opacity.shape
        corners = place[:2] @ np.array([[0, w, 0, w], [0, 0, h, h], [1, 1, 1, 1]])
        x0, y0 = (max(0, int(v) - 16) for v in corners.min(axis=1))
        x1, y1 = (min(a, int(v) + 16) for a, v in zip((self.width, self.height), corners.max(axis=1), strict=True))
        if x1 <= x0 or y1 <= y0:
            return
        back = np.linalg.inv(place).astype(np.float32)
        across, down = np.arange(x0, x1, dtype=np.float32)[None], np.arange(y0, y1, dtype=np.float32)[:, None]
        u = back[0, 0] * across + (back[0, 1] * down + back[0, 2])
        v = back[1, 0] * across + (back[1, 1] * down + back[1, 2])
        # the head turns and nods on the neck, more while speaking
        neck = portrait.NECK * self.shrink
        head = np.clip((neck * 1.3 - v) * np.float32(2.5 / neck), 0, 1)
        u += head * np.float32(self.shrink * (5 * np.sin(2.7 * t) + 3 * np.sin(6.1 * t + 0.7)))
        v += head * np.float32(self.shrink * (2.5 * np.sin(5.3 * t + 0.3) + 2.5 * loud * np.sin(11 * t)))
        person = cv2.remap(level, u, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        cover = cv2.remap(self.opacity, u, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=0)
        cover = cover.astype(np.float32) / 255
        part = picture[y0:y1, x0:x1]
        part[:] = cv2.blendLinear(person, part, cover, 1 - cover)


def draw_event_box(picture: np.ndarray, lit: bool) -> None:
    """Fill the corner box of a [height, width, 3] image: white while the beep sounds, black otherwise."""
    height, width = picture.shape[:2]
    x0, y0, x1, y1 = EVENT_BOX
    picture[round(y0 * height) : round(y1 * height), round(x0 * width) : round(x1 * width)] = 255 if lit else 0
