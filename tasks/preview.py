"""Small pictures and videos of clips, for pages that people look at."""

import io
from fractions import Fraction

import numpy as np

from tasks.clip import SAMPLE_RATE, Clip

_CRF = 30  # small files; faults of picture and movement still show
_AUDIO_BITS = 48_000  # a second, one channel


def still(clip: Clip, short_side: int) -> bytes:
    """The last key frame up to a clip's middle, scaled down to this short side at most, as WebP."""
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
    """The whole clip with its sound as a small MP4 (H.264, AAC) that any browser plays."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        options = {"preset": "veryfast", "crf": str(_CRF), "x264-params": "threads=1"}
        picture = container.add_stream("libx264", rate=clip.record.fps, options=options)
        picture.width, picture.height = _scaled(clip, short_side)
        picture.pix_fmt = "yuv420p"
        picture.codec_context.thread_count = 1
        picture.codec_context.flags |= av.codec.context.Flags.bitexact
        samples = clip.samples()
        sound = None
        if samples is not None:
            sound = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
            sound.bit_rate = _AUDIO_BITS
            sound.codec_context.flags |= av.codec.context.Flags.bitexact
        for image in clip.frames(size=(picture.width, picture.height)):
            container.mux(picture.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(picture.encode(None))
        if sound is not None and samples is not None:
            frame = av.AudioFrame.from_ndarray(samples[None, :], format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
            container.mux(sound.encode(frame))
            container.mux(sound.encode(None))
    return buffer.getvalue()


def _scaled(clip: Clip, short_side: int) -> tuple[int, int]:
    """(width, height), even, of the clip's picture scaled down to this short side; a smaller picture stays."""
    width, height = clip.record.width, clip.record.height
    factor = min(1.0, short_side / min(width, height))
    return max(2, 2 * round(width * factor / 2)), max(2, 2 * round(height * factor / 2))
