"""A film: its shots, sound and events, how they are coded, and what is true of the written file."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np

from tasks.synthetic import lines
from tasks.synthetic.atoms import hide_start
from tasks.synthetic.encode import AudioFormat, VideoFormat, write_media
from tasks.synthetic.scene import EVENT_BOX, Appearance, ScriptedShot, draw_event_box
from tasks.synthetic.speech import BEEP_S, Utterance, say, track
from tasks.synthetic.spoil import spoil
from tasks.synthetic.truth import Box, TimeRange, Truth

# Seconds between events. The gaps differ, so that events fall on different places of any frame grid.
EVENT_GAPS = (2.31, 2.87, 2.59, 3.07, 2.43, 2.75)
FADE_S = 0.5  # seconds from full light to black
BLACK_S = 0.05  # seconds of black on each side of the middle of a fade
WATERMARK_AT, WATERMARK_HEIGHT = (0.85, 0.08), 0.06  # fractions of the frame


@dataclass(frozen=True)
class Film:
    """One generated file.

    Times are in stage time unless stated otherwise: seconds on the film's own clock, which starts with the first shot.
    The container's clock may show another time.
    """

    name: str
    """The file name. Its length seeds random choices."""
    groups: tuple[str, ...]
    """The sets that the file belongs to."""
    shots: tuple[tuple[float, Appearance], ...]
    """For each shot its seconds and what it shows."""
    joins: tuple[str, ...] = ()
    """How each shot goes over into the next: "cut" or "fade". All are cuts when empty."""
    width: int = 640
    """Pixels, as coded."""
    height: int = 360
    """Pixels, as coded."""
    container: str = "mp4"
    """FFmpeg's name of the muxer."""
    container_options: dict[str, str] = field(default_factory=dict)
    """Further options of the muxer."""
    video: VideoFormat = field(default_factory=VideoFormat)
    audio: AudioFormat | None = field(default_factory=AudioFormat)
    """None for a file without a sound stream."""
    voice: str = "ada"
    """The speaker, one of tasks.synthetic.speech.VOICES; "" for no speech."""
    pause_s: float = 0.45
    """Seconds between sentences."""
    events: bool = False
    """Whether the film has events: flashes of the box in the corner, each with a beep."""
    timing: str = "constant"
    """The frame intervals: "constant", "irregular", or "drops", which is constant with frames missing."""
    start: Fraction = Fraction(0)
    """What the container's clock shows at stage time zero."""
    hidden: int = 0
    """Frames before stage time zero, which an edit list hides."""
    hidden_sound: bool = False
    """Whether the edit list hides as much sound. `audio_from` then lies as far before zero."""
    video_from: Fraction = Fraction(0)
    """When the video stream begins."""
    audio_from: Fraction = Fraction(0)
    """When the sound stream begins."""
    audio_to: Fraction | None = None
    """When the sound stream ends. With the video when None."""
    first_sentence: int = 0
    """Which of the voice's sentences is said first."""
    lips: str = "own"
    """How the mouth moves: "own" as the voice that is heard, "other" as another voice, or "closed"."""
    late_s: float = 0.0
    """Seconds by which the sound is later than in sync, negative for earlier."""
    music: float = 0.0
    """Loudness of the music, 0 to 1."""
    subtitles: tuple[tuple[float, float, str], ...] = ()
    """(from, to, name of a line in tasks.synthetic.lines)."""
    text_y: float = 0.9
    """Height of the middle of the subtitles in the frame, 0 at the top to 1."""
    text_height: float = 0.08
    """Height of a subtitle's row, as a fraction of the frame's height."""
    watermark: str = ""
    """The line that stands in the upper right corner; "" for none."""
    fault: str = ""
    """As in `Truth`. Faults of image quality are applied to each frame (tasks.synthetic.spoil)."""
    strength: float = 0.0
    """As in `Truth`."""
    like: str = ""
    """The name of the film that this one is a copy of; "" for none."""
    light: float = 1.0
    """A factor on the brightness."""
    notes: str = ""
    """For readers of the table."""

    @cached_property
    def length_s(self) -> Fraction:
        return sum((Fraction(seconds).limit_denominator(1000) for seconds, _ in self.shots), Fraction(0))

    @cached_property
    def times(self) -> tuple[Fraction, ...]:
        """The stage time of each frame, hidden frames included. Each is a whole number of ticks."""
        step = 1 / self.video.rate
        tick = self.video.time_base or step
        first = -self.hidden if self.hidden else -(-self.video_from // step)
        times = [k * step for k in range(int(first), int(self.length_s / step))]
        rng = np.random.default_rng(len(self.name))
        if self.timing == "drops":  # single frames, and gaps of some 0.2 s
            lost = rng.random(len(times)) < 0.12
            lost[0] = False
            for k in np.flatnonzero(rng.random(len(times)) < 0.008):
                lost[k + 1 : k + 7] = True
            times = [t for t, gone in zip(times, lost, strict=True) if not gone]
        elif self.timing == "irregular":
            steps = rng.choice([0.017, 0.025, 0.033, 0.04, 0.047, 0.066, 0.09], len(times))
            ends = np.cumsum(np.r_[0, steps])
            times = [round(Fraction(float(t)) / tick) * tick for t in ends if t < self.length_s]
        return tuple(times)

    @cached_property
    def end_s(self) -> Fraction:
        """When the last frame leaves the display."""
        return self.times[-1] + (self.times[-1] - self.times[-2] if self.timing == "irregular" else 1 / self.video.rate)

    @cached_property
    def sound_end_s(self) -> Fraction:
        return self.end_s if self.audio_to is None else self.audio_to

    @cached_property
    def event_times(self) -> tuple[Fraction, ...]:
        """Stage times of the events. Each is the time of a frame."""
        if not self.events:
            return ()
        times, k = [], 0
        at = float(max(self.video_from, self.audio_from)) + 0.83
        while at < min(self.end_s, self.sound_end_s) - Fraction(1, 2):
            times.append(next(t for t in self.times if t >= at))
            at += EVENT_GAPS[k % len(EVENT_GAPS)]
            k += 1
        return tuple(times)

    @cached_property
    def boundaries(self) -> tuple[Fraction, ...]:
        """The stage time of the first frame of each shot."""
        nominal = np.cumsum([0] + [seconds for seconds, _ in self.shots[:-1]])
        return tuple(next(t for t in self.times if t >= start - 1e-9) for start in nominal)

    def join(self, number: int) -> str:
        """How shot `number` goes over into the next: "cut" or "fade"."""
        return self.joins[number] if self.joins else "cut"

    @property
    def display_size(self) -> tuple[int, int]:
        """Width and height as shown: upright, with square pixels."""
        width = round(self.width * (self.video.sample_aspect_ratio or 1))
        return (self.height, width) if self.video.rotation % 180 else (width, self.height)

    def pictures(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the images to code, each with its timestamp in ticks of the video's time base.

        An image is [height, width, 3] uint8 RGB. An interlaced film has two images a frame.
        """
        show_width, show_height = self.display_size
        turns = self.video.rotation // 90 % 4
        tick = self.video.time_base or 1 / self.video.rate
        shots: dict[int, ScriptedShot] = {}
        fields = 2 if self.video.interlaced else 1
        for time in self.times:
            number = max((n for n, start in enumerate(self.boundaries) if start <= time), default=0)
            if number not in shots:  # only the current shot is kept in memory
                look, start = self.shots[number][1], float(self.boundaries[number])
                shots = {number: ScriptedShot(look, show_width, show_height, self._mouth(look), start)}
            for part in range(fields):
                t = time + Fraction(part, 2) / self.video.rate
                picture = shots[number].render(float(t), float(1 / self.video.rate) / fields)
                light = self.light * self._light(float(t))
                if light != 1:
                    picture = np.minimum(picture * light, 255).astype(np.uint8)
                picture = self._burn_in(spoil(picture, self.fault, self.strength, float(t)), float(t))
                if self.events:
                    draw_event_box(picture, any(e <= t < e + Fraction(BEEP_S) for e in self.event_times))
                if turns:
                    picture = np.rot90(picture, -turns)
                if picture.shape[:2] != (self.height, self.width):
                    import cv2

                    picture = cv2.resize(picture, (self.width, self.height), interpolation=cv2.INTER_AREA)
                pts = (time + self.start) / tick + Fraction(self.hidden) / self.video.rate / tick
                yield round(pts), picture

    def _light(self, time_s: float) -> float:
        """The light at a time: 1 in full light, 0 in the black between shots."""
        light = 1.0
        for number, start in enumerate(self.boundaries[1:]):
            if self.join(number) == "fade":
                light = min(light, max(0.0, (abs(time_s - float(start)) - BLACK_S) / FADE_S))
        return light

    @cached_property
    def speech(self) -> Utterance | None:
        """The speech that is heard, in stage time; None without speech."""
        if not self.voice:
            return None
        if not self.late_s:
            return self._spoken(self.voice, 0.0)
        ahead = abs(self.late_s)
        return self._spoken(self.voice, ahead).part(ahead - self.late_s, float(self.end_s))

    def _spoken(self, voice: str, ahead_s: float, slowly: bool = False) -> Utterance:
        """The speech of a voice, from `ahead_s` before stage time zero to `ahead_s` after the end."""
        events, length = tuple(map(float, self.event_times)), float(self.end_s) + 2 * ahead_s
        return say(length, voice, events, self.pause_s + 0.3 * slowly, self.first_sentence)

    def _mouth(self, look: Appearance) -> Callable[[float], tuple[float, float]]:
        """The mouth of the person in a shot: a function from stage time to opening, 0 to 1, and spread, -1 to 1."""
        speech = self.speech
        if speech is None or self.lips == "closed":
            return lambda time_s: (0.0, 0.0)
        if not look.lively:
            return lambda time_s: (speech.loudness(time_s, 0.05), 0.0)
        # the other voice is also shifted in time, so that not even the pauses coincide
        others = {"ada": "ben", "ben": "cleo", "cleo": "dan", "dan": "ada"}
        ahead = 1.3 if self.lips == "other" else abs(self.late_s)
        formed = self._spoken(others[self.voice] if self.lips == "other" else self.voice, ahead, self.lips == "other")
        return lambda time_s: formed.mouth(time_s + ahead)

    def _burn_in(self, picture: np.ndarray, time_s: float) -> np.ndarray:
        """Draw the watermark and the subtitles of a time into an image. Returns the same image."""
        if self.watermark:
            lines.burn_in(picture, self.watermark, WATERMARK_AT, WATERMARK_HEIGHT, opacity=0.85)
        for start, end, line in self.subtitles:
            if start <= time_s < end:
                lines.burn_in(picture, line, (0.5, self.text_y), self.text_height)
        return picture

    def _text_box(self, names: list[str], at: tuple[float, float], height: float) -> Box | None:
        """The box around several lines, as fractions of the frame; None without any."""
        if not names:
            return None
        boxes = np.array([lines.box(name, at, height, self.width, self.height) for name in names])
        size = np.array([self.width, self.height] * 2)
        x0, y0, x1, y1 = np.r_[boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)] / size
        return float(x0), float(y0), float(x1), float(y1)

    def write(self, path: Path) -> Truth:
        """Write the file. Returns what is true of it."""
        hidden = self.hidden / self.video.rate
        sound = None
        if self.audio is not None:
            form = self.audio
            between = self.audio_from, self.sound_end_s
            music = self.music, len(self.name)
            sound = track(self.speech, self.event_times, form.rate, form.layout, *between, *music)
        write_media(
            path,
            self.container,
            self.video,
            (self.width, self.height),
            self.pictures(),
            self.audio,
            sound,
            self.audio_from + self.start + (hidden if self.hidden_sound else 0),
            self.container_options,
        )
        if self.hidden:
            hide_start(path, "vide", hidden)
        if self.hidden_sound:
            hide_start(path, "soun", hidden)
        return self._truth(path)

    def _truth(self, path: Path) -> Truth:
        """What is true of the written file: stage times become times on the source clock, which its container sets."""
        shown = [t for t in self.times if t >= 0]
        shift = first_picture_s(path) - shown[0]
        end = float(self.end_s + shift)

        def moved(times: tuple[Fraction, ...]) -> tuple[float, ...]:
            return tuple(float(t + shift) for t in times)

        def spans(parts: list[TimeRange] | tuple[TimeRange, ...]) -> tuple[TimeRange, ...]:
            clipped = ((max(0.0, a + float(shift)), min(end, b + float(shift))) for a, b in parts)
            return tuple((a, b) for a, b in clipped if b > a)

        starts = self.boundaries
        seen = self._seen()
        looks = [look for _, look in self.shots]
        people = max(bool(look.framing) + (look.beside is not None) for look in looks)
        framings = {look.framing for look in looks}
        heard = (float(self.audio_from), float(self.sound_end_s))
        spoken = self.speech.spans if self.speech and self.audio is not None else ()
        return Truth(
            file=self.name,
            groups=self.groups,
            duration_s=end,
            fps=float(len(shown) / (self.end_s - shown[0])),
            has_audio=self.audio is not None,
            cuts_s=moved(tuple(t for n, t in enumerate(starts[1:]) if self.join(n) == "cut")),
            fades_s=moved(tuple(t for n, t in enumerate(starts[1:]) if self.join(n) == "fade")),
            events_s=moved(self.event_times),
            event_box=EVENT_BOX if self.events else None,
            speech_s=spans([(max(a, heard[0]), min(b, heard[1])) for a, b in spoken if b > heard[0] and a < heard[1]]),
            person_s=spans(_with_person(seen)),
            frozen_s=spans([span for look in looks for span in look.frozen_s]),
            shake_s=spans([span for look in looks for span in look.shake_s]),
            pan_s=spans([(a, b) for a, b, look in seen if look.pan_speed]),
            framing=framings.pop() if len(framings) == 1 else "",
            display_width=self.display_size[0],
            display_height=self.display_size[1],
            like=self.like,
            subtitles_s=spans([(a, b) for a, b, _ in self.subtitles]),
            subtitle_box=self._text_box([n for *_, n in self.subtitles], (0.5, self.text_y), self.text_height),
            watermark_box=self._text_box([self.watermark] if self.watermark else [], WATERMARK_AT, WATERMARK_HEIGHT),
            scene_text_s=spans([(a, b) for a, b, look in seen if look.sign]),
            people=people,
            second_s=spans([s for a, b, look in seen if look.beside for s in look.beside_s or ((a, b),)]),
            lips=self.lips if people and spoken else "",
            sound_offset_s=self.late_s,
            music_s=spans([heard]) if self.music else (),
            fault=self.fault,
            strength=self.strength,
            notes=self.notes,
        )

    def _seen(self) -> list[tuple[float, float, Appearance]]:
        """When each shot begins and ends, in stage time, and what it shows."""
        ends = (*self.boundaries[1:], self.end_s)
        return [(float(a), float(b), look) for a, b, (_, look) in zip(self.boundaries, ends, self.shots, strict=True)]


def _with_person(seen: list[tuple[float, float, Appearance]]) -> list[TimeRange]:
    """The spans with a person in view, in stage time. Shots in a row make one span."""
    spans: list[TimeRange] = []
    for a, b, look in seen:
        if look.framing:
            spans = [*spans[:-1], (spans[-1][0], b)] if spans and spans[-1][1] == a else [*spans, (a, b)]
    return spans


def first_picture_s(path: Path) -> Fraction:
    """When the first frame is shown, in seconds on the source clock."""
    import av

    with av.open(str(path)) as container:
        frame = next(container.decode(container.streams.video[0]))
        assert frame.pts is not None and frame.time_base is not None
        return frame.pts * frame.time_base - Fraction(container.start_time or 0, 1_000_000)
