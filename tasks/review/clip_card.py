"""The card of a clip: its frames with the stages' results drawn over them, its audio beside the lips, its scores.

A person looks at the card to judge whether the results are right.
"""

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

from tasks.media.clip import SAMPLE_RATE, Clip, Measurement
from tasks.review import overlay
from tasks.stages.pose.keypoints import PARTS, decode

if TYPE_CHECKING:
    from PIL.Image import Image

WIDTH, HEIGHT = 1840, 900
"""Size of the card in pixels."""
_EDGE = 24
# areas of the card: x, y, width, height in pixels
_FRAME = (_EDGE, 88, 872, 490)  # the whole frame
_CROP = (912, 88, 408, 408)  # the part of the frame that training sees
_SCORES = (1344, 88, 472, 788)
_STRIP = (_EDGE, 604, 1296, 56)  # small frames along the time axis
_WAVE = (_EDGE, 686, 1296, 76)  # the waveform
_CURVES = (_EDGE, 790, 1296, 66)  # lip opening and loudness
_LEGEND = (912, 512)  # x, y of its first line
_SCORE_COLUMNS, _SCORE_GAP = 2, 16
_LINE, _MIN_LINE = 17, 11  # pixels of a line of scores; smaller where there are many lines
_FLOW_SIDE = 180  # pixels of the short side at which optical flow is computed, as in tasks.stages.motion.stage
_RANGE_DB = 45.0  # of loudness, shown below the loudest
_VERDICTS = {"kept": overlay.GOOD, "dropped": overlay.BAD}


def show_clip(clip: Clip, row: Mapping[str, Any], out_path: Path) -> None:
    """Draw the card of a clip into a file: as a video with the clip's audio (.mp4), or as an image of the clip's middle
    frame (.png).

    clip: the clip as it was cut, with the results of stages in `found`. A result that is missing is left out. If the
        clip has a crop, key points are fractions of the cropped frame.
    row: "verdict", "reason" and "scores". The verdicts "kept" and "dropped" have colours of their own; any other text
        is shown, too. Scores are values by "stage.column".

    The file appears whole or not at all. Raises ValueError for a file name with another ending, MediaError when the
    clip cannot be decoded.
    """
    if out_path.suffix not in (".mp4", ".png"):
        raise ValueError(
            f"{out_path}: a clip is shown as .mp4 (a video) or .png (an image), not as {out_path.suffix!r}; "
            "give a name with one of these endings"
        )
    card = _Card(clip, row)
    partial = out_path.with_name(f".{out_path.name}.part{out_path.suffix}")
    try:
        if out_path.suffix == ".png":
            from PIL import Image

            Image.fromarray(card.image(clip.record.frames // 2)).save(partial)
        else:
            _write_video(card, partial)
        partial.replace(out_path)
    finally:
        partial.unlink(missing_ok=True)


def _write_video(card: "_Card", path: Path) -> None:
    import av

    fps = card.clip.record.fps
    flags = {"movflags": "+faststart", "fflags": "+bitexact"}
    with av.open(str(path), "w", format="mp4", options=flags) as container:
        video = container.add_stream("libx264", rate=fps, options={"preset": "veryfast", "crf": "21"})
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono") if card.samples is not None else None
        for image in card.images():
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(video.encode(None))
        if audio is not None and card.samples is not None:
            frame = av.AudioFrame.from_ndarray(card.samples[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))


@dataclass
class _Card:
    """Draws the card of a clip, frame by frame. The parts that do not change from frame to frame are drawn once."""

    clip: Clip
    row: Mapping[str, Any]

    def _array(self, stage: str, name: str) -> np.ndarray | None:
        """An array of a stage's result; None where the clip has none."""
        found = self.clip.found.get(stage)
        return found.arrays[name] if found is not None and name in found.arrays else None

    @cached_property
    def samples(self) -> np.ndarray | None:
        """The audio that training hears: [samples] float32 at 16 kHz. None for a clip without audio.

        Where the stage crop has shifted the audio, this is the shifted audio.
        """
        crop = self.clip.found.get("crop", Measurement({}))
        if "flac" not in crop.files:
            return self.clip.samples()
        import soundfile

        samples, _ = soundfile.read(io.BytesIO(crop.files["flac"]), dtype="float32")
        return samples

    def images(self) -> Iterator[np.ndarray]:
        """The card at each frame: [HEIGHT, WIDTH, 3] uint8 RGB."""
        previous = None
        for number, frame in enumerate(self.clip.frames()):
            small = self._small(frame)
            yield self._at(number, frame, small, previous)
            previous = small

    def image(self, number: int) -> np.ndarray:
        """The card at one frame: [HEIGHT, WIDTH, 3] uint8 RGB."""
        previous = None
        for index, frame in enumerate(self.clip.frames()):
            if index == number:
                return self._at(number, frame, self._small(frame), previous)
            if index == number - 1:
                previous = self._small(frame)
        raise ValueError(f"the clip has no frame {number}")

    def _small(self, frame: np.ndarray) -> np.ndarray:
        """The frame at the size at which optical flow is computed."""
        import cv2

        scale = _FLOW_SIDE / min(frame.shape[:2])
        size = (max(16, round(frame.shape[1] * scale)), max(16, round(frame.shape[0] * scale)))
        return cv2.resize(frame, size, interpolation=cv2.INTER_AREA)

    @cached_property
    def _flow(self) -> Any:
        from tasks.stages.motion.optical_flow import DisFlow

        return DisFlow()

    @cached_property
    def _points(self) -> dict[str, np.ndarray] | None:
        """Key points by part, [frames, points, 3]; None where the clip has none."""
        tokens = self._array("pose", "pose")
        # where there are boxes, the tokens are embeddings of a network, not key points
        return None if tokens is None or self._part_boxes else decode(tokens)

    @cached_property
    def _part_boxes(self) -> dict[str, np.ndarray]:
        """The boxes of body, face and hands by part, [frames, 4] in fractions of the cropped frame."""
        boxes = self._array("pose", "pose_box")
        return {} if boxes is None else dict(zip(PARTS, np.moveaxis(boxes, 1, 0), strict=True))

    def _at(self, number: int, frame: np.ndarray, small: np.ndarray, previous: np.ndarray | None) -> np.ndarray:
        """The card at a frame. small, previous: this frame and the one before it, as `_small` returns them."""
        import cv2

        record = self.clip.record
        card = self._background.copy()
        x, y, width, height = _fit(_FRAME, record.width, record.height)
        scale = (width / record.width, height / record.height) * 2
        main = cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)
        if previous is not None:
            overlay.arrows(main, next(self._flow.flows((previous, small))), record.fps)
        window = self._window(number)
        if window is not None:
            overlay.box(main, window * scale, overlay.WINDOW)
        faces = self._array("identity", "face_box")
        if faces is not None:
            overlay.box(main, faces[number] * ((width, height) * 2), overlay.FACE_BOX)
        card[y : y + height, x : x + width] = main
        if self._shows_crop:
            self._draw_crop(card, number, frame, window)
        self._draw_cursor(card, number)
        return card

    @property
    def _shows_crop(self) -> bool:
        return any(self._array(*which) is not None for which in (("pose", "pose"), ("crop", "crop_box")))

    def _window(self, number: int) -> np.ndarray | None:
        """The crop window of a frame, x0, y0, x1, y1 in pixels of the clip; None where it is the whole frame."""
        windows = self._array("crop", "crop_box")
        if windows is None or (windows[number] == (0, 0, self.clip.record.width, self.clip.record.height)).all():
            return None
        return windows[number]

    def _draw_crop(self, card: np.ndarray, number: int, frame: np.ndarray, window: np.ndarray | None) -> None:
        """Draw the part of a frame that training sees, with key points over it, or the boxes of the body's parts."""
        import cv2

        x0, y0, x1, y1 = (0, 0, frame.shape[1], frame.shape[0]) if window is None else map(float, window)
        x, y, width, height = _fit(_CROP, x1 - x0, y1 - y0)
        scale_x, scale_y = (x1 - x0) / width, (y1 - y0) / height
        from_crop = np.array([[scale_x, 0, x0 + scale_x / 2 - 0.5], [0, scale_y, y0 + scale_y / 2 - 0.5]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        crop = cv2.warpAffine(frame, from_crop, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)
        if self._points is not None:
            crop = (crop * 0.7).astype(np.uint8)  # darker, so that the points stand out
            overlay.key_points(crop, {part: values[number] for part, values in self._points.items()})
        for part, boxes in self._part_boxes.items():
            overlay.box(crop, boxes[number] * ((width, height) * 2), overlay.PART_COLOURS[part])
        card[y : y + height, x : x + width] = crop

    def _draw_cursor(self, card: np.ndarray, number: int) -> None:
        """Draw the line that shows where the frame lies in time."""
        x = _STRIP[0] + min(_STRIP[2] - 2, round((number + 0.5) / self.clip.record.frames * _STRIP[2]))
        card[_STRIP[1] - 4 : _CURVES[1] + _CURVES[3] + 4, x : x + 2] = overlay.TEXT

    # ---- the parts that do not change from frame to frame ----

    @cached_property
    def _background(self) -> np.ndarray:
        from PIL import Image, ImageDraw

        image = Image.new("RGB", (WIDTH, HEIGHT), overlay.GROUND)
        draw = ImageDraw.Draw(image)
        self._draw_head(draw)
        for x, y, width, height in (_FRAME, _WAVE, _CURVES, _SCORES, *((_CROP,) if self._shows_crop else ())):
            draw.rounded_rectangle((x - 6, y - 6, x + width + 5, y + height + 5), 6, fill=overlay.PANEL)
        self._draw_legend(draw)
        self._draw_scores(draw)
        self._draw_strip(image)
        self._draw_labels(draw)
        card = np.array(image)
        self._draw_audio(card)
        return card

    def _draw_head(self, draw: Any) -> None:
        """Draw the verdict, its reason, and what is known of the clip as a whole."""
        record = self.clip.record
        verdict, reason = str(self.row.get("verdict") or ""), str(self.row.get("reason") or "")
        x = _EDGE
        if verdict:
            text, width = overlay.fitted(draw, verdict, 22, 200)
            width += 28
            colour = _VERDICTS.get(verdict, overlay.DOUBT)
            draw.rounded_rectangle((x, 22, x + width, 60), 8, fill=colour)
            overlay.write(draw, (x + 14, 27), text, 22, overlay.GROUND)
            x += width + 18
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
        """The lines of the legend: names and colours of what is drawn over the frames of this clip."""
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
        """Draw the scores, stage by stage. Scores that do not fit are counted in the last line."""
        x0, y0, area_width, height = _SCORES
        width = (area_width - (_SCORE_COLUMNS - 1) * _SCORE_GAP) // _SCORE_COLUMNS
        lines = list(_score_lines(self.row.get("scores") or {}))
        step = max(_MIN_LINE, min(_LINE, height // max(1, math.ceil(len(lines) / _SCORE_COLUMNS))))
        rows = height // step
        if len(lines) > rows and lines[rows - 1][1] is None:
            lines.insert(rows - 1, ("", ""))  # the stage's name moves to the next column, where its scores are
        if len(lines) > _SCORE_COLUMNS * rows:
            kept = _SCORE_COLUMNS * rows - 1
            lines = [*lines[:kept], (f"and {len(lines) - kept} more lines", "")]
        size = max(9, step - 4)
        for number, (name, value) in enumerate(lines):
            x, y = x0 + number // rows * (width + _SCORE_GAP), y0 + number % rows * step
            if value is None:
                overlay.write(draw, (x + 4, y), name, size, overlay.FACE_BOX, width - 8)
            else:
                taken = overlay.write(draw, (x + 14, y), name, size, overlay.MUTED, width - 90)
                value, value_width = overlay.fitted(draw, value, size, width - 26 - taken)
                overlay.write(draw, (x + width - 4 - value_width, y), value, size, overlay.TEXT)

    def _draw_strip(self, image: "Image") -> None:
        """Draw small frames side by side along the time axis. Each shows the middle of the time that it stands for."""
        from PIL import Image

        x, y, width, height = _STRIP
        record = self.clip.record
        count = max(1, min(width // 8, round(width / (height * record.width / record.height))))
        edges = [x + round(number * width / count) for number in range(count + 1)]
        frame_width = min(width, 2 * math.ceil(width / count / 2))
        frames = self.clip.frames(count / record.duration_s, (frame_width, height))
        for (left, right), frame in zip(pairwise(edges), frames, strict=False):
            image.paste(Image.fromarray(frame[:, : right - left]), (left, y))

    def _draw_labels(self, draw: Any) -> None:
        """Draw the labels above the waveform and the curves, and the time axis."""
        x, y, width, height = _CURVES
        sync = self.clip.found.get("sync", Measurement({})).columns
        lips = "" if self._array("identity", "lips") is None else "lip opening"
        taken = overlay.write(draw, (x, y - 26), lips, 14, overlay.LIPS)
        if self.samples is not None:
            taken += overlay.write(draw, (x + taken + 16 * bool(taken), y - 26), "loudness", 14, overlay.FACE_BOX) + 16
        if sync:
            overlay.write(draw, (x + taken + 24, y - 26), _about_sync(sync), 14, overlay.MUTED, width - taken - 24)
        label = "audio, with speech shaded" if self.samples is not None else "no audio"
        shift = self.clip.found.get("crop", Measurement({})).columns.get("sound_shift_s")
        if isinstance(shift, float) and shift:
            label += f", moved {abs(shift):.3f} s {'later' if shift > 0 else 'earlier'}"
        overlay.write(draw, (_WAVE[0], _WAVE[1] - 26), label, 14, overlay.MUTED)
        duration = self.clip.record.duration_s
        every_s = next((s for s in (0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0) if duration / s <= 20), 3600.0)
        for number in range(math.floor(duration / every_s) + 1):
            at = x + round(number * every_s / duration * (width - 1))
            draw.line((at, y + height + 6, at, y + height + 10), fill=overlay.GRID)
            if at + 38 <= x + width:  # a label without room would cover the one before it
                overlay.write(draw, (at + 4, y + height + 8), f"{number * every_s:g} s", 12, overlay.MUTED)

    def _draw_audio(self, card: np.ndarray) -> None:
        """Draw the waveform, and the curves of loudness and lip opening."""
        lips, samples, frames = self._array("identity", "lips"), self.samples, self.clip.record.frames
        wave, curves = (card[y : y + h, x : x + w] for x, y, w, h in (_WAVE, _CURVES))
        if samples is not None and len(samples):
            from tasks.stages.voice_activity import VoiceDetector

            for start, end in VoiceDetector().spans(samples):
                first, last = (round(at / len(samples) * _WAVE[2]) for at in (start, end))
                wave[:, first:last] = curves[:, first:last] = overlay.SPEECH
            overlay.waveform(wave, samples, overlay.SOUND)
            edges = np.linspace(0, len(samples), frames + 1).astype(int)
            power = [float(np.mean(np.square(samples[a : max(b, a + 1)]))) for a, b in pairwise(edges)]
            decibels = 10 * np.log10(np.maximum(power, 1e-6))
            loudest = float(np.percentile(decibels, 99))
            overlay.curve(curves, (decibels - loudest) / _RANGE_DB + 0.95, overlay.FACE_BOX)
        if lips is not None and np.isfinite(lips[:, 0]).any():
            low, high = np.nanpercentile(lips[:, 0], (1, 99))
            overlay.curve(curves, (lips[:, 0] - low) / max(float(high - low), 1e-6) * 0.9 + 0.05, overlay.LIPS)


def _fit(area: tuple[int, int, int, int], width: float, height: float) -> tuple[int, int, int, int]:
    """The largest rectangle (x, y, width, height) with the aspect ratio `width` to `height`, centred in an area."""
    x, y, area_width, area_height = area
    scale = min(area_width / width, area_height / height)
    fitted = max(2, round(width * scale)), max(2, round(height * scale))
    return x + (area_width - fitted[0]) // 2, y + (area_height - fitted[1]) // 2, *fitted


def _score_lines(scores: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    """The lines to write: (stage, None), then (column, value) for each of its scores."""
    last = ""
    for score, value in scores.items():
        stage, _, column = score.partition(".")
        if stage != last:
            last = stage
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
        return f"sync not measured: {sync.get('reason') or 'no reason given'}"
    when = "in sync" if abs(offset_s) < 0.005 else f"{abs(offset_s):.2f} s {'late' if offset_s > 0 else 'early'}"
    return f"audio {when}, confidence {confidence:.2f}"
