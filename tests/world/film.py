"""A film: shots, sound and events, how they are coded, and the truth that follows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np

from tests.world import lines
from tests.world.atoms import hide_start
from tests.world.encode import AudioFormat, VideoFormat, write_media
from tests.world.scene import EVENT_BOX, Look, Shot, draw_event_box
from tests.world.speech import BEEP_S, Speech, speak, track
from tests.world.spoil import spoil
from tests.world.truth import Box, Span, Truth

EVENT_GAPS = (2.31, 2.87, 2.59, 3.07, 2.43, 2.75)  # seconds between events, so that they meet a frame grid anywhere
FADE_S = 0.5  # from full light to black
WATERMARK_AT, WATERMARK_HEIGHT = (0.85, 0.08), 0.06  # fractions of the picture
BLACK_S = 0.05  # black lasts this long on each side of its middle


@dataclass(frozen=True)
class Film:
    """One generated file. Its own clock ("stage time") starts with the shots; containers may show it later.

    shots: (seconds, what is seen). joins: "cut" or "fade" between neighbouring shots; all cuts when empty.
    timing: "constant"; "irregular" frame intervals; "drops": constant with frames missing.
    start: what the container's clock shows at stage time zero. hidden: frames before stage time zero, which an edit
        list hides; hidden_sound: as much sound too (audio_from is as much before zero then).
    video_from, audio_from, audio_to: stage times at which the streams begin and end; audio_to is the picture's end
        when None.
    first_sentence: which of the voice's sentences is said first.
    lips: "own"; "other": the mouth forms what another voice says; "closed". late_s: by how much the sound comes later
        than in sync, earlier when negative. music: its loudness, 0 to 1.
    subtitles: (from, to, line of tests.world.lines); text_y, text_height: of subtitles, as fractions of the picture.
    watermark: a line in the upper right corner.
    fault, strength: as in `Truth`; those of picture quality are put to each picture (tests.world.spoil). like: the
        file that this one is a copy of; light: factor on its brightness.
    """

    name: str
    groups: tuple[str, ...]
    shots: tuple[tuple[float, Look], ...]
    joins: tuple[str, ...] = ()
    width: int = 640  # as coded
    height: int = 360
    container: str = "mp4"
    container_options: dict[str, str] = field(default_factory=dict)
    video: VideoFormat = field(default_factory=VideoFormat)
    audio: AudioFormat | None = field(default_factory=AudioFormat)
    voice: str = "ada"
    pause_s: float = 0.45
    events: bool = False
    timing: str = "constant"
    start: Fraction = Fraction(0)
    hidden: int = 0
    hidden_sound: bool = False
    video_from: Fraction = Fraction(0)
    audio_from: Fraction = Fraction(0)
    audio_to: Fraction | None = None
    first_sentence: int = 0
    lips: str = "own"
    late_s: float = 0.0
    music: float = 0.0
    subtitles: tuple[tuple[float, float, str], ...] = ()
    text_y: float = 0.9
    text_height: float = 0.08
    watermark: str = ""
    fault: str = ""
    strength: float = 0.0
    like: str = ""
    light: float = 1.0
    notes: str = ""

    @cached_property
    def length_s(self) -> Fraction:
        return sum((Fraction(seconds).limit_denominator(1000) for seconds, _ in self.shots), Fraction(0))

    @cached_property
    def times(self) -> tuple[Fraction, ...]:
        """The stage time of each frame, those hidden included, each a whole number of ticks."""
        step = 1 / self.video.rate
        tick = self.video.time_base or step
        first = -self.hidden if self.hidden else -(-self.video_from // step)
        times = [k * step for k in range(int(first), int(self.length_s / step))]
        rng = np.random.default_rng(len(self.name))
        if self.timing == "drops":  # single frames, and some 0.2 s at a time
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
        """When the last picture leaves the display."""
        return self.times[-1] + (self.times[-1] - self.times[-2] if self.timing == "irregular" else 1 / self.video.rate)

    @cached_property
    def sound_end_s(self) -> Fraction:
        return self.end_s if self.audio_to is None else self.audio_to

    @cached_property
    def event_times(self) -> tuple[Fraction, ...]:
        """Stage times of the events, each that of a frame."""
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
        """How shot `number` goes over into the next."""
        return self.joins[number] if self.joins else "cut"

    @property
    def display_size(self) -> tuple[int, int]:
        """Width and height as shown: square pixels, upright."""
        width = round(self.width * (self.video.sample_aspect_ratio or 1))
        return (self.height, width) if self.video.rotation % 180 else (width, self.height)

    def pictures(self) -> Iterator[tuple[int, np.ndarray]]:
        """The coded pictures with their timestamps in the video's time base."""
        show_width, show_height = self.display_size
        turns = self.video.rotation // 90 % 4

        tick = self.video.time_base or 1 / self.video.rate
        shots: dict[int, Shot] = {}
        fields = 2 if self.video.interlaced else 1
        for time in self.times:
            number = max((n for n, start in enumerate(self.boundaries) if start <= time), default=0)
            if number not in shots:  # one at a time: a film keeps no more than it shows
                look, start = self.shots[number][1], float(self.boundaries[number])
                # tall pixels are drawn at the coded size, stretched
                shots = {number: Shot(look, show_width, show_height, self._mouth(look), start)}
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
        """1 in full light, 0 in the black between shots."""
        light = 1.0
        for number, start in enumerate(self.boundaries[1:]):
            if self.join(number) == "fade":
                light = min(light, max(0.0, (abs(time_s - float(start)) - BLACK_S) / FADE_S))
        return light

    @cached_property
    def speech(self) -> Speech | None:
        """What is heard being said, in stage time; None where nobody speaks."""
        if not self.voice:
            return None
        if not self.late_s:
            return self._said(self.voice, 0.0)
        ahead = abs(self.late_s)
        return self._said(self.voice, ahead).part(ahead - self.late_s, float(self.end_s))

    def _said(self, voice: str, ahead_s: float, slowly: bool = False) -> Speech:
        """What a voice says, from `ahead_s` before stage time zero to as long after the end."""
        events, length = tuple(map(float, self.event_times)), float(self.end_s) + 2 * ahead_s
        return speak(length, voice, events, self.pause_s + 0.3 * slowly, self.first_sentence)

    def _mouth(self, look: Look) -> Callable[[float], tuple[float, float]]:
        """What the mouth of the person in a shot does, by stage time."""
        speech = self.speech
        if speech is None or self.lips == "closed":
            return lambda time_s: (0.0, 0.0)
        if not look.lively:
            return lambda time_s: (speech.loudness(time_s, 0.05), 0.0)
        # what another says is out of step too, so that not even the pauses fall together
        others = {"ada": "ben", "ben": "cleo", "cleo": "dan", "dan": "ada"}
        ahead = 1.3 if self.lips == "other" else abs(self.late_s)
        said = self._said(others[self.voice] if self.lips == "other" else self.voice, ahead, self.lips == "other")
        return lambda time_s: said.mouth(time_s + ahead)

    def _burn_in(self, picture: np.ndarray, time_s: float) -> np.ndarray:
        """The picture with the text that stands on it at a time."""
        if self.watermark:
            lines.burn_in(picture, self.watermark, WATERMARK_AT, WATERMARK_HEIGHT, opacity=0.85)
        for start, end, line in self.subtitles:
            if start <= time_s < end:
                lines.burn_in(picture, line, (0.5, self.text_y), self.text_height)
        return picture

    def _text_box(self, names: list[str], at: tuple[float, float], height: float) -> Box | None:
        """Around all of some lines, as fractions of the picture; None without any."""
        if not names:
            return None
        boxes = np.array([lines.box(name, at, height, self.width, self.height) for name in names])
        size = np.array([self.width, self.height] * 2)
        x0, y0, x1, y1 = np.r_[boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)] / size
        return float(x0), float(y0), float(x1), float(y1)

    def write(self, path: Path) -> Truth:
        """Write the file and say what is true of it."""
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
        """Stage times moved to the source clock, which the container of the written file sets."""
        shown = [t for t in self.times if t >= 0]
        shift = first_picture_s(path) - shown[0]
        end = float(self.end_s + shift)

        def moved(times: tuple[Fraction, ...]) -> tuple[float, ...]:
            return tuple(float(t + shift) for t in times)

        def spans(parts: list[Span] | tuple[Span, ...]) -> tuple[Span, ...]:
            clipped = ((max(0.0, a + float(shift)), min(end, b + float(shift))) for a, b in parts)
            return tuple((a, b) for a, b in clipped if b > a)

        starts = self.boundaries
        ends = (*starts[1:], self.end_s)
        seen = [(float(a), float(b), look) for a, b, (_, look) in zip(starts, ends, self.shots, strict=True)]
        joined: list[Span] = []
        for a, b, look in seen:
            if look.framing:
                joined = [*joined[:-1], (joined[-1][0], b)] if joined and joined[-1][1] == a else [*joined, (a, b)]
        looks = [look for _, look in self.shots]
        people = max(bool(look.framing) + (look.beside is not None) for look in looks)
        second = [s for a, b, look in seen if look.beside for s in look.beside_s or ((a, b),)]
        framings = {look.framing for _, look in self.shots}
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
            person_s=spans(joined),
            frozen_s=spans([span for _, look in self.shots for span in look.frozen_s]),
            shake_s=spans([span for _, look in self.shots for span in look.shake_s]),
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
            second_s=spans(second),
            lips=self.lips if people and spoken else "",
            sound_offset_s=self.late_s,
            music_s=spans([heard]) if self.music else (),
            fault=self.fault,
            strength=self.strength,
            notes=self.notes,
        )


def first_picture_s(path: Path) -> Fraction:
    """When the first picture is shown, on the source clock."""
    import av

    with av.open(str(path)) as container:
        frame = next(container.decode(container.streams.video[0]))
        assert frame.pts is not None and frame.time_base is not None
        return frame.pts * frame.time_base - Fraction(container.start_time or 0, 1_000_000)
