"""One clip as a person can judge it: the picture with what was found in it, the sound beside the lips, the scores."""

import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks import overlay
from tasks.clip import SAMPLE_RATE, Clip
from tasks.keypoints import PARTS, decode
from tasks.stage import Measurement

if TYPE_CHECKING:
    from PIL.Image import Image

WIDTH, HEIGHT = 1840, 900  # pixels of the card
_EDGE = 24
_PICTURE = (_EDGE, 88, 872, 490)  # x, y, width, height of what the parts may fill
_KEPT = (912, 88, 408, 408)
_LEGEND = (912, 512)
_SCORES = (1344, 88, 472, 788)
_SCORE_COLUMNS, _SCORE_GAP = 2, 16
_LINE, _LEAST_LINE = 17, 11  # pixels of a line of the scores, fewer where there are many
_STRIP = (_EDGE, 604, 1296, 56)
_WAVE = (_EDGE, 686, 1296, 76)
_LIPS = (_EDGE, 790, 1296, 66)
_FLOW_SIDE = 180  # pixels of the short side at which the flow is found, as in tasks.motion
_RANGE_DB = 45.0  # from the loudest down, shown of the loudness
_VERDICTS = {"kept": overlay.GOOD, "dropped": overlay.BAD}


def show_clip(clip: Clip, row: Mapping[str, Any], out_path: Path) -> None:
    """Draw what was found in a clip: a film with its sound (".mp4"), or one picture of its middle (".png").

    clip: as it was cut, with what the stages found in it; whatever is missing is left out. Key points are taken to
        be of the picture that the stage crop leaves, where there is one.
    row: "verdict" ("kept" or "dropped", anything else is shown as it is), "reason", and "scores", values by
        "stage.column".

    Raises ValueError for another kind of file.
    """
    if out_path.suffix not in (".mp4", ".png"):
        raise ValueError(
            f"{out_path}: a clip can be shown as .mp4, a film, or .png, a picture; not as {out_path.suffix!r}"
        )
    card = _Card(clip, row)
    beside = out_path.with_name(f".{out_path.name}.part{out_path.suffix}")
    try:
        if out_path.suffix == ".png":
            from PIL import Image

            Image.fromarray(card.picture(clip.record.frames // 2)).save(beside)
        else:
            _film(card, beside)
        beside.replace(out_path)
    finally:
        beside.unlink(missing_ok=True)


def _film(card: "_Card", path: Path) -> None:
    import av

    fps = card.clip.record.fps
    flags = {"movflags": "+faststart", "fflags": "+bitexact"}
    with av.open(str(path), "w", format="mp4", options=flags) as container:
        video = container.add_stream("libx264", rate=fps, options={"preset": "veryfast", "crf": "21"})
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        sound = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono") if card.samples is not None else None
        for image in card.pictures():
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(video.encode(None))
        if sound is not None and card.samples is not None:
            frame = av.AudioFrame.from_ndarray(card.samples[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
            container.mux(sound.encode(frame))
            container.mux(sound.encode(None))


@dataclass
class _Card:
    """The layout of a clip's card, with all that does not change from frame to frame drawn once."""

    clip: Clip
    row: Mapping[str, Any]

    def _array(self, stage: str, name: str) -> np.ndarray | None:
        found = self.clip.found.get(stage)
        return found.arrays[name] if found is not None and name in found.arrays else None

    @cached_property
    def samples(self) -> np.ndarray | None:
        """The sound that training hears: [samples] float32, shifted where crop has shifted it; None without sound."""
        crop = self.clip.found.get("crop", Measurement({}))
        if "flac" not in crop.files:
            return self.clip.samples()
        import soundfile

        samples, _ = soundfile.read(io.BytesIO(crop.files["flac"]), dtype="float32")
        return samples

    def pictures(self) -> Iterator[np.ndarray]:
        """The card at each frame: [HEIGHT, WIDTH, 3] uint8 RGB."""
        before = None
        for number, frame in enumerate(self.clip.frames()):
            small = self._small(frame)
            yield self._at(number, frame, small, before)
            before = small

    def picture(self, number: int) -> np.ndarray:
        """The card at one frame."""
        before = None
        for index, frame in enumerate(self.clip.frames()):
            if index == number:
                return self._at(number, frame, self._small(frame), before)
            if index == number - 1:
                before = self._small(frame)
        raise ValueError(f"the clip has no frame {number}")

    def _small(self, frame: np.ndarray) -> np.ndarray:
        import cv2

        scale = _FLOW_SIDE / min(frame.shape[:2])
        size = (max(16, round(frame.shape[1] * scale)), max(16, round(frame.shape[0] * scale)))
        return cv2.resize(frame, size, interpolation=cv2.INTER_AREA)

    @cached_property
    def _flow(self) -> Any:
        from tasks.flow import DisFlow

        return DisFlow()

    @cached_property
    def _points(self) -> dict[str, np.ndarray] | None:
        tokens = self._array("pose", "pose")
        # where there are boxes, the tokens are a network's own and no key points
        return None if tokens is None or self._part_boxes else decode(tokens)

    @cached_property
    def _part_boxes(self) -> dict[str, np.ndarray]:
        boxes = self._array("pose", "pose_box")
        return {} if boxes is None else dict(zip(PARTS, np.moveaxis(boxes, 1, 0), strict=True))

    def _at(self, number: int, frame: np.ndarray, small: np.ndarray, before: np.ndarray | None) -> np.ndarray:
        import cv2

        record = self.clip.record
        card = self._still.copy()
        x, y, width, height = _fit(_PICTURE, record.width, record.height)
        scale = (width / record.width, height / record.height) * 2
        main = cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)
        if before is not None:
            overlay.arrows(main, next(self._flow.flows((before, small))), record.fps)
        window = self._window(number)
        if window is not None:
            overlay.box(main, window * scale, overlay.WINDOW)
        faces = self._array("identity", "face_box")
        if faces is not None:
            overlay.box(main, faces[number] * ((width, height) * 2), overlay.FACE_BOX)
        card[y : y + height, x : x + width] = main
        if self._has_second:
            self._draw_kept(card, number, frame, window)
        self._draw_cursor(card, number)
        return card

    @property
    def _has_second(self) -> bool:
        return any(self._array(*which) is not None for which in (("pose", "pose"), ("crop", "crop_box")))

    def _window(self, number: int) -> np.ndarray | None:
        """The crop window of a frame in pixels of the clip, None where it is all of the picture."""
        windows = self._array("crop", "crop_box")
        if windows is None or (windows[number] == (0, 0, self.clip.record.width, self.clip.record.height)).all():
            return None
        return windows[number]

    def _draw_kept(self, card: np.ndarray, number: int, frame: np.ndarray, window: np.ndarray | None) -> None:
        """What training sees, with the key points in it, or the boxes of the parts."""
        import cv2

        x0, y0, x1, y1 = (0, 0, frame.shape[1], frame.shape[0]) if window is None else map(float, window)
        x, y, width, height = _fit(_KEPT, x1 - x0, y1 - y0)
        scale_x, scale_y = (x1 - x0) / width, (y1 - y0) / height
        place = np.array([[scale_x, 0, x0 + scale_x / 2 - 0.5], [0, scale_y, y0 + scale_y / 2 - 0.5]])
        how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        kept = cv2.warpAffine(frame, place, (width, height), flags=how, borderMode=cv2.BORDER_REPLICATE)
        if self._points is not None:
            kept = (kept * 0.7).astype(np.uint8)
            overlay.key_points(kept, {part: values[number] for part, values in self._points.items()})
        for part, boxes in self._part_boxes.items():
            overlay.box(kept, boxes[number] * ((width, height) * 2), overlay.PART_COLOURS[part])
        card[y : y + height, x : x + width] = kept

    def _draw_cursor(self, card: np.ndarray, number: int) -> None:
        x = _STRIP[0] + min(_STRIP[2] - 2, round((number + 0.5) / self.clip.record.frames * _STRIP[2]))
        card[_STRIP[1] - 4 : _LIPS[1] + _LIPS[3] + 4, x : x + 2] = overlay.TEXT

    # ---- what stands still ----

    @cached_property
    def _still(self) -> np.ndarray:
        from PIL import Image, ImageDraw

        image = Image.new("RGB", (WIDTH, HEIGHT), overlay.GROUND)
        draw = ImageDraw.Draw(image)
        self._draw_head(draw)
        for x, y, width, height in (_PICTURE, _WAVE, _LIPS, _SCORES, *((_KEPT,) if self._has_second else ())):
            draw.rounded_rectangle((x - 6, y - 6, x + width + 5, y + height + 5), 6, fill=overlay.PANEL)
        self._draw_legend(draw)
        self._draw_scores(draw)
        self._draw_strip(image)
        self._draw_labels(draw)
        card = np.array(image)
        self._draw_sound(card)
        return card

    def _draw_head(self, draw: Any) -> None:
        record = self.clip.record
        verdict, reason = str(self.row.get("verdict") or ""), str(self.row.get("reason") or "")
        x = _EDGE
        if verdict:
            text, wide = overlay.fitted(draw, verdict, 22, 200)
            wide += 28
            colour = _VERDICTS.get(verdict, overlay.DOUBT)
            draw.rounded_rectangle((x, 22, x + wide, 60), 8, fill=colour)
            overlay.write(draw, (x + 14, 27), text, 22, overlay.GROUND)
            x += wide + 18
        about = f"{record.width} x {record.height}, {record.fps} frames/s, {record.duration_s:.2f} s"
        span = f"{record.start_s:.2f} to {record.end_s:.2f} s of the source"
        overlay.write(draw, (x, 16), f"{record.clip_id} · {about} · {span}", 17, overlay.TEXT, WIDTH - _EDGE - x)
        overlay.write(draw, (x, 42), reason, 17, overlay.MUTED, WIDTH - _EDGE - x)

    def _draw_legend(self, draw: Any) -> None:
        x0, y = _LEGEND
        for line in self._legends():
            x = x0
            for name, colour in line:
                draw.rectangle((x, y + 6, x + 14, y + 10), fill=colour)
                x += 22 + overlay.write(draw, (x + 20, y - 2), name, 14, overlay.MUTED) + 20
            y += 22

    def _legends(self) -> Iterator[list[tuple[str, overlay.Colour]]]:
        """What is drawn over the pictures of this clip, by lines."""
        faces, windows = self._array("identity", "face_box"), self._array("crop", "crop_box")
        over = [("face", overlay.FACE_BOX)] if faces is not None and np.isfinite(faces).any() else []
        if windows is not None and any(self._window(number) is not None for number in range(len(windows))):
            over.append(("crop window", overlay.WINDOW))
        yield [*over, ("movement", overlay.ARROW)]
        seen = {part for part, places in (self._points or self._part_boxes).items() if np.isfinite(places).any()}
        colours = overlay.PART_COLOURS | ({"face": overlay.LIPS} if self._points else {})
        of_face = "lips" if self._points else "face"
        for parts in (("body", "face"), ("left_hand", "right_hand")):
            named = [(of_face if part == "face" else part.replace("_", " "), part) for part in parts]
            if seen & set(parts):
                yield [(name, colours[part]) for name, part in named if part in seen]

    def _draw_scores(self, draw: Any) -> None:
        x0, y0, width, height = _SCORES
        wide = (width - (_SCORE_COLUMNS - 1) * _SCORE_GAP) // _SCORE_COLUMNS
        lines = list(_score_lines(self.row.get("scores") or {}))
        step = max(_LEAST_LINE, min(_LINE, height // max(1, math.ceil(len(lines) / _SCORE_COLUMNS))))
        rows = height // step
        if len(lines) > rows and lines[rows - 1][1] is None:
            lines.insert(rows - 1, ("", ""))  # a stage's name goes where its scores are
        if len(lines) > _SCORE_COLUMNS * rows:
            kept = _SCORE_COLUMNS * rows - 1
            lines = [*lines[:kept], (f"and {len(lines) - kept} lines more", "")]
        size = max(9, step - 4)
        for number, (name, value) in enumerate(lines):
            x, y = x0 + number // rows * (wide + _SCORE_GAP), y0 + number % rows * step
            if value is None:
                overlay.write(draw, (x + 4, y), name, size, overlay.FACE_BOX, wide - 8)
            else:
                taken = overlay.write(draw, (x + 14, y), name, size, overlay.MUTED, wide - 90)
                value, long = overlay.fitted(draw, value, size, wide - 26 - taken)
                overlay.write(draw, (x + wide - 4 - long, y), value, size, overlay.TEXT)

    def _draw_strip(self, image: "Image") -> None:
        """Small frames along the time axis, side by side, each of the middle of its time."""
        from PIL import Image

        x, y, width, height = _STRIP
        record = self.clip.record
        count = max(1, min(width // 8, round(width / (height * record.width / record.height))))
        edges = [x + round(number * width / count) for number in range(count + 1)]
        wide = min(width, 2 * math.ceil(width / count / 2))
        frames = self.clip.frames(count / record.duration_s, (wide, height))
        for (left, right), frame in zip(pairwise(edges), frames, strict=False):
            image.paste(Image.fromarray(frame[:, : right - left]), (left, y))

    def _draw_labels(self, draw: Any) -> None:
        x, y, width, height = _LIPS
        sync = self.clip.found.get("sync", Measurement({})).columns
        lips = "" if self._array("identity", "lips") is None else "lip opening"
        taken = overlay.write(draw, (x, y - 26), lips, 14, overlay.LIPS)
        if self.samples is not None:
            taken += overlay.write(draw, (x + taken + 16 * bool(taken), y - 26), "loudness", 14, overlay.FACE_BOX) + 16
        if sync:
            overlay.write(draw, (x + taken + 24, y - 26), _about_sync(sync), 14, overlay.MUTED, width - taken - 24)
        heard = "sound, with speech shaded" if self.samples is not None else "no sound"
        shift = self.clip.found.get("crop", Measurement({})).columns.get("sound_shift_s")
        if isinstance(shift, float) and shift:
            heard += f", moved {abs(shift):.3f} s {'later' if shift > 0 else 'earlier'}"
        overlay.write(draw, (_WAVE[0], _WAVE[1] - 26), heard, 14, overlay.MUTED)
        duration = self.clip.record.duration_s
        every = next((s for s in (0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0) if duration / s <= 20), 3600.0)
        for number in range(math.floor(duration / every) + 1):
            at = x + round(number * every / duration * (width - 1))
            draw.line((at, y + height + 6, at, y + height + 10), fill=overlay.GRID)
            if at + 38 <= x + width:  # where it does not fit, it would cover the one before
                overlay.write(draw, (at + 4, y + height + 8), f"{number * every:g} s", 12, overlay.MUTED)

    def _draw_sound(self, card: np.ndarray) -> None:
        lips, samples, frames = self._array("identity", "lips"), self.samples, self.clip.record.frames
        wave, below = (card[y : y + h, x : x + w] for x, y, w, h in (_WAVE, _LIPS))
        if samples is not None and len(samples):
            from tasks.speech import VoiceDetector

            for start, end in VoiceDetector().spans(samples):
                first, last = (round(at / len(samples) * _WAVE[2]) for at in (start, end))
                wave[:, first:last] = below[:, first:last] = overlay.SPEECH
            overlay.waveform(wave, samples, overlay.SOUND)
            edges = np.linspace(0, len(samples), frames + 1).astype(int)
            power = [float(np.mean(np.square(samples[a : max(b, a + 1)]))) for a, b in pairwise(edges)]
            decibels = 10 * np.log10(np.maximum(power, 1e-6))
            loud = float(np.percentile(decibels, 99))
            overlay.curve(below, (decibels - loud) / _RANGE_DB + 0.95, overlay.FACE_BOX)
        if lips is not None and np.isfinite(lips[:, 0]).any():
            low, high = np.nanpercentile(lips[:, 0], (1, 99))
            overlay.curve(below, (lips[:, 0] - low) / max(float(high - low), 1e-6) * 0.9 + 0.05, overlay.LIPS)


def _fit(place: tuple[int, int, int, int], width: float, height: float) -> tuple[int, int, int, int]:
    """The largest x, y, width, height inside `place` with the aspect of `width` to `height`, in its middle."""
    x, y, wide, high = place
    scale = min(wide / width, high / height)
    fitted = max(2, round(width * scale)), max(2, round(height * scale))
    return x + (wide - fitted[0]) // 2, y + (high - fitted[1]) // 2, *fitted


def _score_lines(scores: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    """Lines to write: (stage, None) above (column, value) of each."""
    stage = ""
    for score, value in scores.items():
        of, _, column = score.partition(".")
        if of != stage:
            stage = of
            yield stage, None
        yield column, _text(value)


def _text(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        return f"{float(value):.3g}" if abs(float(value)) < 1000 else f"{float(value):.0f}"
    return str(value)


def _about_sync(sync: Mapping[str, Any]) -> str:
    offset_s, confidence = sync.get("offset_s"), sync.get("confidence")
    if not isinstance(offset_s, float) or not isinstance(confidence, float):
        return f"sync cannot be told: {sync.get('reason') or 'no reason given'}"
    when = "in time" if abs(offset_s) < 0.005 else f"{abs(offset_s):.2f} s {'late' if offset_s > 0 else 'early'}"
    return f"sound {when}, confidence {confidence:.2f}"
