"""Writes images and sound to a media file, each frame with exactly the given timestamp."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class VideoFormat:
    """How the video stream is coded."""

    codec: str = "libx264"
    """FFmpeg's name of the encoder."""
    pix_fmt: str = "yuv420p"
    """FFmpeg's name of the coded pixel format."""
    rate: Fraction = Fraction(25)
    """Nominal frames a second."""
    time_base: Fraction | None = None
    """Seconds a tick of the timestamps. 1 / rate when None."""
    gop: int = 50
    """Frames from one key frame to the next, at most."""
    b_frames: int = 0
    """B-frames in a row, at most."""
    options: dict[str, str] = field(default_factory=dict)
    """Further options of the encoder."""
    sample_aspect_ratio: Fraction | None = None
    """Width of a pixel divided by its height. Square pixels when None."""
    rotation: int = 0
    """Degrees by which a player has to turn the frame counter-clockwise."""
    interlaced: bool = False
    """Whether two images are woven into one frame of two fields, the upper field first."""
    full_range: bool = False
    """Whether luma uses 0 to 255 rather than 16 to 235."""


@dataclass(frozen=True)
class AudioFormat:
    """How the sound stream is coded."""

    codec: str = "aac"
    """FFmpeg's name of the encoder."""
    rate: int = 48_000
    """Sample rate in Hz."""
    layout: str = "mono"
    """Channel layout: "mono", "stereo" or "5.1"."""
    sample_format: str = "fltp"
    """FFmpeg's name of the sample format that the encoder takes."""
    bit_rate: int = 96_000
    """Bits a second."""
    delay: int = 0
    """Samples that the encoder adds at the start, for containers that cannot tell a player about them. The sound is
    written so much earlier."""


FAST = {
    "aac": {"aac_coder": "fast"},
    "libx264": {"preset": "ultrafast", "crf": "24"},
    "libx265": {"preset": "ultrafast", "crf": "26", "x265-params": "log-level=none:pools=none:frame-threads=1"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "crf": "34", "b": "0"},
    "libsvtav1": {"preset": "10", "crf": "40", "svtav1-params": "lp=1"},
    "mpeg4": {"qscale": "4"},
    "mpeg2video": {"qscale": "4"},
}


def _video_stream(container: Any, form: VideoFormat, width: int, height: int) -> Any:
    os.environ.setdefault("SVT_LOG", "1")  # otherwise the encoder prints a page about itself
    options = FAST[form.codec] | {"flags": "+bitexact+ildct+ilme" if form.interlaced else "+bitexact"} | form.options
    stream = container.add_stream(form.codec, rate=form.rate, options=options)
    context = stream.codec_context
    context.width, context.height, context.pix_fmt = width, height, form.pix_fmt
    context.thread_count = 1  # gives the same bytes on any machine
    context.gop_size, context.max_b_frames = form.gop, form.b_frames
    context.time_base = stream.time_base = form.time_base or 1 / form.rate
    if "qscale" in options:
        context.qscale, context.global_quality = True, 118 * int(options["qscale"])
    if form.sample_aspect_ratio is not None:
        context.sample_aspect_ratio = form.sample_aspect_ratio
    if form.full_range:
        context.color_range = 2
    if form.rotation:
        stream.set_display_rotation(form.rotation)
    return stream


def _audio_stream(container: Any, form: AudioFormat) -> Any:
    stream = container.add_stream(form.codec, rate=form.rate, options=FAST.get(form.codec, {}) | {"flags": "+bitexact"})
    context = stream.codec_context
    context.layout, context.format, context.bit_rate = form.layout, form.sample_format, form.bit_rate
    context.thread_count = 1
    stream.time_base = Fraction(1, form.rate)
    return stream


def _video_frame(picture: np.ndarray, form: VideoFormat) -> Any:
    """One image in the coded pixel format."""
    import av
    import cv2

    if form.pix_fmt == "yuv420p" and not any(n % 2 for n in picture.shape[:2]):
        # several times faster than reformat()
        planes: Any = cv2.cvtColor(picture, cv2.COLOR_RGB2YUV_I420)
        return av.VideoFrame.from_ndarray(planes, format="yuv420p")
    frame: Any = av.VideoFrame.from_ndarray(picture, format="rgb24")
    return frame.reformat(format=form.pix_fmt, dst_color_range=2 if form.full_range else 1)


def _video_frames(form: VideoFormat, pictures: Iterable[tuple[int, np.ndarray]]) -> Iterator[Any]:
    """Yield video frames in the coded pixel format, with their timestamps."""
    weave = _weave(form) if form.interlaced else None
    for pts, picture in pictures:
        frame = _video_frame(np.ascontiguousarray(picture), form)
        frame.pts, frame.time_base = pts, form.time_base or 1 / form.rate
        if weave is not None:
            frame = weave(frame)
        if frame is not None:
            yield frame


def _weave(form: VideoFormat) -> Callable[[Any], Any]:
    """A function that weaves two images into one frame of two fields. The first image gives the upper field.

    Returns: a function to call with one frame after another. It returns None for the first of two frames, and the woven
    frame for the second.
    """
    import av
    from av.filter import Graph

    first: Any = None
    mark: Any = None

    def push(second: Any) -> Any:
        nonlocal first, mark
        if first is None:
            first = second
            return None
        above, below = first.to_ndarray(), second.to_ndarray()
        height, width = second.height, second.width
        for start, rows, columns in (  # the planes of yuv420p
            (0, height, width),
            (height * width, height // 2, width // 2),
            (height * width * 5 // 4, height // 2, width // 2),
        ):
            upper, lower = (
                p.reshape(-1)[start : start + rows * columns].reshape(rows, columns) for p in (above, below)
            )
            upper[1::2] = lower[1::2]
        frame = av.VideoFrame.from_ndarray(above, format="yuv420p")
        frame.pts, frame.time_base = first.pts, first.time_base
        first = None
        if mark is None:  # only a filter can set the interlaced flags of a frame
            mark = Graph()
            mark.link_nodes(
                mark.add_buffer(width=width, height=height, format=frame.format, time_base=frame.time_base),
                mark.add("setfield", "tff"),
                mark.add("buffersink"),
            ).configure()
        mark.push(frame)
        return mark.pull()

    return push


def write_media(
    path: Path,
    container_format: str,
    video: VideoFormat | None,
    size: tuple[int, int],
    pictures: Iterable[tuple[int, np.ndarray]],
    audio: AudioFormat | None,
    sound: np.ndarray | None,
    sound_start: Fraction = Fraction(0),
    options: Mapping[str, str] | None = None,
) -> None:
    """Write one file.

    container_format: FFmpeg's name of the muxer. video, audio: None for a file without that stream.
    size: width and height in pixels, as coded.
    pictures: (timestamp in ticks of the video's time base, [height, width, 3] uint8 RGB), in order of time.
    sound: [channels, samples] float32 in -1..1. Its first sample is at `sound_start` seconds.
    options: further options of the muxer.
    """
    import av

    options = {"fflags": "+bitexact", **(options or {})}
    with av.open(str(path), "w", format=container_format, container_options=options) as container:
        video_stream: Any = _video_stream(container, video, *size) if video else None
        audio_stream: Any = _audio_stream(container, audio) if audio else None
        sounds = _audio_frames(audio, sound, sound_start) if audio and sound is not None else iter(())
        waiting: Any = next(sounds, None)
        if video and video_stream:
            for frame in _video_frames(video, pictures):
                while waiting and waiting[0] <= frame.pts * frame.time_base:
                    container.mux(audio_stream.encode(waiting[1]))
                    waiting = next(sounds, None)
                container.mux(video_stream.encode(frame))
        while waiting:
            container.mux(audio_stream.encode(waiting[1]))
            waiting = next(sounds, None)
        for stream in filter(None, (video_stream, audio_stream)):
            container.mux(stream.encode(None))


def _audio_frames(audio: AudioFormat, sound: np.ndarray, start: Fraction) -> Iterator[tuple[Fraction, Any]]:
    """Yield pieces of the sound in the encoder's format, each with the time of its first sample in seconds."""
    import av

    first = round(start * audio.rate)
    step = 1024
    for at in range(audio.delay, sound.shape[1], step):
        part = np.clip(sound[:, at : at + step], -1, 1)
        if audio.sample_format.startswith("s16"):
            part = np.round(part * 32767).astype(np.int16)
        packed = not audio.sample_format.endswith("p")
        part = np.ascontiguousarray(part.T.reshape(1, -1) if packed else part)
        frame = av.AudioFrame.from_ndarray(part, format=audio.sample_format, layout=audio.layout)
        frame.sample_rate, frame.pts, frame.time_base = audio.rate, first + at, Fraction(1, audio.rate)
        yield Fraction(first + at, audio.rate), frame
