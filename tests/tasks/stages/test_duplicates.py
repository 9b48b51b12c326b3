"""Duplicates: copies of a clip are found, however they were encoded. Other clips of its speaker are not copies."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_manifests.storage import Storage
from tasks.cutting.clip_plan import ClipSettings, plan_clips
from tasks.cutting.clip_writer import write_clips
from tasks.cutting.ingest import ingest
from tasks.cutting.shots import Shot
from tasks.media.clip import Clip
from tasks.policy.copies import copies
from tasks.stages.duplicates import PICTURE_BITS, SOUND_BITS, Duplicates, DuplicatesSettings

WITHIN = {"picture_bits": 48, "sound_bits": 32}  # as in the recipes


FILM_S = 20  # of a longer film


def copy_of(source: Path, target: Path, size: tuple[int, int], brighter: int, crf: int) -> Path:
    """Encode a film's beginning again: smaller, brighter, with more loss, its sound as MP3."""
    import av

    with av.open(str(source)) as given, av.open(str(target), "w") as made:
        pictures, sound = given.streams.video[0], given.streams.audio[0]
        video = made.add_stream("libx264", rate=pictures.average_rate, options={"crf": str(crf), "preset": "veryfast"})
        video.width, video.height, video.pix_fmt = *size, "yuv420p"
        audio = made.add_stream("mp3", rate=44_100)
        resampler = av.AudioResampler("fltp", "stereo", 44_100)
        for frame in given.decode(pictures, sound):
            if (frame.time or 0) > FILM_S + 1:
                break
            if isinstance(frame, av.AudioFrame):
                for part in resampler.resample(frame):
                    made.mux(audio.encode(part))
                continue
            assert isinstance(frame, av.VideoFrame)
            image = frame.to_ndarray(format="rgb24", width=size[0], height=size[1]).astype(np.int16) + brighter
            made.mux(video.encode(av.VideoFrame.from_ndarray(image.clip(0, 255).astype(np.uint8), format="rgb24")))
        made.mux(video.encode(None))
        made.mux(audio.encode(None))
    return target


@pytest.fixture
def hashes_of(tmp_path: Path) -> Callable[[Path], pd.DataFrame]:
    """Cuts a film's beginning into clips of 5 s and hashes each."""

    def hashes(path: Path) -> pd.DataFrame:
        storage, source = Storage(str(tmp_path / "out")), ingest(str(path))
        spans = [Shot(0.0, FILM_S, 0.0, FILM_S, False, False)]
        how = ClipSettings.model_validate({"fps": 24, "short_side": 256, "min_s": 2, "max_s": 5, "trim_s": 0})
        clips = write_clips(source, path, plan_clips(source, spans, [], how)[0], how, storage)
        stage = Duplicates(DuplicatesSettings())
        rows = [
            stage.measure(Clip(c, Path(storage.path(c.video)), Path(storage.path(c.audio)))).columns
            | {"duration_s": c.duration_s, "source_id": c.source_id}
            for c in clips
        ]
        return pd.DataFrame(rows)

    return hashes


def test_copies_are_found_and_other_clips_of_the_speaker_are_not(
    world: Any, tmp_path: Path, hashes_of: Callable[[Path], pd.DataFrame]
) -> None:
    film = world.path("talk_45s.mp4")
    originals = hashes_of(film)
    assert len(originals) == 4
    assert (copies(originals.assign(source_id=range(len(originals))), **WITHIN) == -1).all()
    small = hashes_of(copy_of(film, tmp_path / "small.mp4", (320, 180), brighter=12, crf=36))
    found = copies(pd.concat([originals, small], ignore_index=True), **WITHIN)
    assert list(found) == [-1] * len(originals) + list(range(len(small)))


def test_without_sound_the_picture_alone_decides(clip_of: Callable[..., Clip]) -> None:
    stage = Duplicates(DuplicatesSettings())
    rows = [stage.measure(clip_of(name)).columns for name in ("talk_office.mp4", "no_audio.mp4")]
    assert rows[0]["sound"] and not rows[1]["sound"]
    same_picture = pd.DataFrame([rows[1], rows[1], rows[1] | {"sound": rows[0]["sound"]}])
    same_picture = same_picture.assign(duration_s=6.0, source_id=["a", "b", "c"])
    assert list(copies(same_picture, **WITHIN)) == [-1, 0, -1]
    assert list(copies(same_picture.assign(source_id="a"), **WITHIN)) == [-1, -1, -1]


def flipped(digits: str, bits: set[int]) -> str:
    return f"{int(digits, 16) ^ sum(1 << bit for bit in bits):0{len(digits)}x}"


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_copy_leads_to_a_clip_that_is_kept(data: st.DataObject) -> None:
    """The result is that of a loop over all pairs. Sounds at most 6 bits apart always share 16 neighbouring bits."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    bases = [(rng.bytes(PICTURE_BITS // 8).hex(), rng.bytes(SOUND_BITS // 8).hex()) for _ in range(4)]
    rows = []
    for _ in range(data.draw(st.integers(0, 12))):
        picture, sound = data.draw(st.sampled_from(bases))
        picture = flipped(picture, data.draw(st.sets(st.integers(0, PICTURE_BITS - 1), max_size=6)))
        sound = flipped(sound, data.draw(st.sets(st.integers(0, SOUND_BITS - 1), max_size=3)))
        duration, source = data.draw(st.sampled_from([5.0, 5.4, 9.0])), data.draw(st.sampled_from("abc"))
        rows.append((picture, sound, duration, source))
    clips = pd.DataFrame(rows, columns=["picture", "sound", "duration_s", "source_id"])

    def differ(a: str, b: str) -> int:
        return (int(a, 16) ^ int(b, 16)).bit_count()

    expected: list[int] = []
    for at, (picture, sound, duration, source) in enumerate(rows):
        earlier = (
            other
            for other in range(at)
            if expected[other] < 0
            and differ(picture, rows[other][0]) <= 8
            and differ(sound, rows[other][1]) <= 4
            and abs(duration - rows[other][2]) <= 0.5
            and source != rows[other][3]
        )
        expected.append(next(earlier, -1))
    assert list(copies(clips, picture_bits=8, sound_bits=4)) == expected
