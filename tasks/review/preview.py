"""Small stills and videos of clips, for pages that people look at."""

import io
from fractions import Fraction

import numpy as np

from tasks.media.clip import SAMPLE_RATE, Clip

_CRF = 30  # small files in which faults of image and movement still show
_AUDIO_BITRATE = 48_000  # bits a second, for one channel


def still(clip: Clip, short_side: int) -> bytes:
    """The last key frame in the first half of a clip, as WebP.

    short_side: pixels; a larger frame is scaled down to it. Raises ValueError when the clip has no key frame.
    """
    import cv2

    middle = clip.record.frames / 2
    best: np.ndarray | None = None
    for index, image in clip.keyframes(_scaled(clip, short_side)):
        if best is not None and index > middle:
            break
        best = image
    if best is None:
        raise ValueError(f"{clip.record.clip_id} has no key frame")
    done, data = cv2.imencode(".webp", cv2.cvtColor(best, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_WEBP_QUALITY, 65])
    assert done
    return data.tobytes()


def video(clip: Clip, short_side: int) -> bytes:
    """The whole clip with its audio as a small MP4 (H.264, AAC) that any browser plays.

    short_side: pixels; larger frames are scaled down to it.
    """
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        options = {"preset": "veryfast", "crf": str(_CRF), "x264-params": "threads=1"}
        stream = container.add_stream("libx264", rate=clip.record.fps, options=options)
        stream.width, stream.height = _scaled(clip, short_side)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        samples = clip.samples()
        audio = None
        if samples is not None:
            audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
            audio.bit_rate = _AUDIO_BITRATE
            audio.codec_context.flags |= av.codec.context.Flags.bitexact
        for image in clip.frames(size=(stream.width, stream.height)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
        if audio is not None and samples is not None:
            frame = av.AudioFrame.from_ndarray(samples[None, :], format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return buffer.getvalue()


def _scaled(clip: Clip, short_side: int) -> tuple[int, int]:
    """Even (width, height) of the clip's frames, scaled down to a short side. Smaller frames keep their size."""
    width, height = clip.record.width, clip.record.height
    factor = min(1.0, short_side / min(width, height))
    return max(2, 2 * round(width * factor / 2)), max(2, 2 * round(height * factor / 2))
