"""Written clips: audio in sync with video, exact files, the same bytes each time."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
import soundfile

from data_manifests.storage import Storage
from tasks.cutting.clip_plan import ClipSettings, plan_clips
from tasks.cutting.clip_writer import is_written, write_clips
from tasks.cutting.ingest import ingest
from tasks.cutting.shots import ScenesSettings, Shot, find_shots
from tasks.cutting.single_pass import find_and_cut
from tasks.media.clip import ClipRecord
from tasks.media.container import MediaError
from tasks.media.frames import FrameCache, rgb_frames
from tasks.synthetic import Truth, catalogue, measure_events

SMALL = ClipSettings(short_side=180, min_s=2, max_s=20)


def _cut(path: Path, storage: Storage, settings: ClipSettings = SMALL) -> list[ClipRecord]:
    source = ingest(str(path))
    scenes = find_shots(path, ScenesSettings())
    clips, _ = plan_clips(source, scenes.shots, scenes.holes, settings)
    return write_clips(source, path, clips, settings, storage)


@dataclass(frozen=True)
class Seen:
    """Deviations of each event in one file's clips, in milliseconds."""

    file: str
    apart: list[float]
    """Flash minus beep."""
    picture: list[float]
    """Flash minus truth."""
    sound: list[float]
    """Beep minus truth."""


def _see(folder: Path, truth: Truth, settings: ClipSettings, out: Path) -> Seen:
    storage, path = Storage(str(out / f"{settings.fps}-{truth.file.encode().hex()[-80:]}")), folder / truth.file
    seen, source = Seen(truth.file, [], [], []), ingest(str(path))
    scenes, _ = find_and_cut(source, path, ScenesSettings(), settings, storage, keep_bytes=640_000_000)
    clips, _ = plan_clips(source, scenes.shots, scenes.holes, settings)
    assert all(is_written(clip, storage) for clip in clips), "a second pass was needed"
    for clip in clips:
        flashes, beeps = measure_events(
            Path(storage.path(clip.video)), Path(storage.path(clip.audio)), truth.event_box or (0, 0, 1, 1)
        )
        for event in truth.events_s:
            due = event - clip.start_s
            if 0.05 < due < clip.duration_s - 0.2:
                flash, beep = (found[np.abs(found - due).argmin()] for found in (flashes, beeps))
                seen.apart.append(1000 * (flash - beep))
                seen.picture.append(1000 * (flash - due))
                seen.sound.append(1000 * (beep - due))
    return seen


AWKWARD = sorted(set(catalogue(["timing"])) | {"cuts_2997.mp4", "cuts_vfr.mp4", "corrupt_frames.mp4", "fades.mp4"})
# one file of each kind of time; the tests that are slow measure the others
KINDS = {
    *("audio_late.mp4", "corrupt_frames.mp4", "cuts_vfr.mp4", "edit_list_both.mp4", "fps_23976.mp4", "interlaced.ts"),
    *("vfr_irregular.mp4", "video_late.mkv", "wrap.ts"),
}
AT_24 = ("fps_25.mp4", "fps_60.mp4", "vfr_irregular.mp4", "fps_23976.mp4")  # cut to 24 frames a second, too
See = Callable[[str, int], Seen]


@pytest.fixture(scope="module")
def see(world: Any, tmp_path_factory: pytest.TempPathFactory) -> See:
    """Cuts a file to a rate. Returns the deviations of its events."""
    out = tmp_path_factory.mktemp("cut")
    seen: dict[tuple[str, int], Seen] = {}

    def see(name: str, fps: int) -> Seen:
        if (name, fps) not in seen:
            settings = SMALL.model_copy(update={"fps": fps})
            seen[name, fps] = _see(world.folder, world.truth(name), settings, out)
        return seen[name, fps]

    return see


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in KINDS else pytest.mark.slow) for n in AWKWARD])
def test_sound_stays_with_picture_after_cutting(see: See, name: str) -> None:
    for fps, bound in ((25, 20.0), (24, 1000 / 48)):
        if fps == 25 or name in AT_24:
            found = see(name, fps)
            assert len(found.apart) >= 2, "too few events to tell"
            # a lossy audio codec blurs a beep's onset by a part of a millisecond
            assert max(map(abs, found.apart)) <= bound + 1
            assert max(map(abs, found.sound)) <= 1


@pytest.mark.slow
def test_sound_and_picture_are_together_on_average(see: See) -> None:
    apart = [abs(a) for name in AWKWARD for a in see(name, 25).apart]
    assert max(apart) <= 21
    assert np.mean(apart) <= 5  # in most files, source frames and output frames coincide


@pytest.mark.parametrize("name", ["cuts_plain.mp4", "cuts_2997.mp4", "fades.mp4", "fade_and_cut.mp4"])
def test_no_clip_contains_a_cut_or_black(world, tmp_path: Path, name: str) -> None:
    storage = Storage(str(tmp_path))
    clips = _cut(world.path(name), storage)
    truth = world.truth(name)
    assert len(clips) == len(truth.cuts_s) + len(truth.fades_s) + 1
    for clip in clips:
        scenes = find_shots(Path(storage.path(clip.video)), ScenesSettings())
        assert len(scenes.shots) == 1
        assert scenes.shots[0].clear_from_s == 0
        assert scenes.shots[0].clear_to_s == scenes.shots[0].end_s == pytest.approx(clip.duration_s)
        assert not any(clip.start_s <= cut <= clip.end_s for cut in (*truth.cuts_s, *truth.fades_s))


@pytest.mark.parametrize("name", ["fps_2997.mp4", "rotate_90.mp4", "anamorphic.mp4", "odd_size.avi", "no_audio.mp4"])
def test_clip_files_are_what_their_record_says(world, tmp_path: Path, name: str) -> None:
    storage = Storage(str(tmp_path))
    clips = _cut(world.path(name), storage)
    assert clips
    truth = world.truth(name)
    for clip in clips:
        with av.open(storage.path(clip.video)) as container:
            (stream,) = container.streams
            packets = [packet for packet in container.demux(stream) if packet.size]
            context = stream.codec_context
            assert (stream.average_rate, stream.start_time) == (clip.fps, 0)
            assert (context.width, context.height) == (clip.width, clip.height)
            assert (context.pix_fmt, context.color_range) == ("yuv420p", 1)
            assert not stream.codec_context.has_b_frames
            assert not container.metadata.keys() - {"major_brand", "minor_version", "compatible_brands"}
        assert [i for i, p in enumerate(packets) if p.is_keyframe] == list(range(0, clip.frames, clip.fps))
        assert len(packets) == clip.frames
        assert clip.width / clip.height == pytest.approx(truth.display_width / truth.display_height, rel=0.02)
        assert bool(clip.audio) == truth.has_audio
        if clip.audio:
            about = soundfile.info(storage.path(clip.audio))
            assert (about.samplerate, about.channels, about.subtype) == (16000, 1, "PCM_16")
            assert about.frames == round(clip.frames * 16000 / clip.fps)
        assert clip.bytes == sum(storage.size(part) for part in (clip.video, clip.audio) if part)
        data = storage.read_bytes(clip.video)
        assert data.index(b"moov") < data.index(b"mdat")


def test_the_same_clips_have_the_same_bytes_and_are_not_written_twice(world, tmp_path: Path) -> None:
    path = world.path("fps_2997.mp4")
    one, two = Storage(str(tmp_path / "1")), Storage(str(tmp_path / "2"))
    settings = SMALL.model_copy(update={"max_s": 3.0})
    clips = _cut(path, one, settings)
    assert len(clips) >= 3
    # as a killed run leaves it: one clip is complete, of the next one only the audio has been written
    for clip in clips[:1]:
        two.write_bytes(clip.video, one.read_bytes(clip.video))
        two.write_bytes(clip.audio, one.read_bytes(clip.audio))
    two.write_bytes(clips[1].audio, b"to be written again")
    kept = Path(two.path(clips[0].video)).stat().st_mtime_ns
    assert _cut(path, two, settings) == clips
    assert Path(two.path(clips[0].video)).stat().st_mtime_ns == kept
    for clip in clips:
        assert one.read_bytes(clip.video) == two.read_bytes(clip.video)
        assert one.read_bytes(clip.audio) == two.read_bytes(clip.audio)
    # the source is not read when no clip is missing
    source = ingest(str(path))
    assert write_clips(source, tmp_path / "not there.mp4", clips, settings, two) == clips


def test_clips_go_to_an_object_store(world, tmp_path: Path, s3_folder: str) -> None:
    path = world.path("fps_25.mp4")
    there, here = Storage(s3_folder), Storage(str(tmp_path))
    clips = _cut(path, there)
    assert clips == _cut(path, here)
    assert all(there.read_bytes(clip.video) == here.read_bytes(clip.video) for clip in clips)


def test_no_clip_spans_damage(world, tmp_path: Path) -> None:
    path = world.path("corrupt_frames.mp4")
    source, storage = ingest(str(path)), Storage(str(tmp_path))
    settings = SMALL.model_copy(update={"min_s": 5.0})
    # as if the hole had not been found
    clips, _ = plan_clips(source, [Shot(0.0, 14.0, 0.0, 14.0, False, False)], [], settings)
    with pytest.raises(MediaError, match=r"no frame at 6\.420 s"):
        write_clips(source, path, clips, settings, storage)
    # as if the file were longer than it is
    short, _ = plan_clips(source, [Shot(8.0, 15.0, 8.0, 15.0, False, False)], [], settings)
    with pytest.raises(MediaError, match="ends before"):
        write_clips(source, path, short, settings, storage)
    assert not list(tmp_path.rglob("*.mp4"))


def _film(path: Path, pix_fmt: str, matrix: int, full: bool, size: tuple[int, int] = (320, 240)) -> Path:
    """Two seconds of four plain coloured quarters."""
    picture = np.zeros((size[1], size[0], 3), np.uint8)
    rows, columns = size[1] // 2, size[0] // 2
    picture[:rows, :columns], picture[:rows, columns:] = (200, 30, 40), (40, 180, 60)
    picture[rows:, :columns], picture[rows:, columns:] = (30, 50, 190), (128, 128, 128)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
        for _ in range(50):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(
                format=pix_fmt, dst_colorspace={1: 1, 6: 5}[matrix], dst_color_range=2 if full else 1
            )
            frame.pts = None
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("pix_fmt", "matrix", "full"),
    [
        ("yuv420p", 6, False),
        ("yuv420p", 1, False),
        ("yuvj420p", 6, True),
        ("yuv420p", 1, True),
        ("yuv422p10le", 1, False),
    ],
)
def test_colours_survive_full_range_other_matrices_and_ten_bits(
    tmp_path: Path, pix_fmt: str, matrix: int, full: bool
) -> None:
    storage = Storage(str(tmp_path))
    (clip,) = _cut(_film(tmp_path / "a.mp4", pix_fmt, matrix, full), storage, SMALL.model_copy(update={"min_s": 1.0}))
    picture = next(rgb_frames(FrameCache(Path(storage.path(clip.video))).frames(), 25))
    height, width = picture.shape[:2]
    found = [picture[y, x] for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    assert np.abs(np.array(found, int) - [(200, 30, 40), (40, 180, 60), (30, 50, 190), (128, 128, 128)]).max() <= 6


@pytest.mark.parametrize(
    ("codec", "layout", "rate"),
    [
        ("pcm_s16le", "stereo", 44100),
        ("pcm_u8", "mono", 8000),
        ("pcm_s24le", "5.1", 48000),
        ("pcm_f32le", "mono", 16000),
    ],
)
def test_any_audio_becomes_16_khz_mono_at_the_same_time(tmp_path: Path, codec: str, layout: str, rate: int) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        picture = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        picture.width, picture.height, picture.pix_fmt = 64, 64, "yuv420p"
        sound = container.add_stream(codec, rate=rate, layout=layout)
        for _ in range(75):
            container.mux(picture.encode(av.VideoFrame(64, 64, "yuv420p")))
        container.mux(picture.encode())
        time = np.arange(3 * rate) / rate
        tone = np.where(time >= 1.0, 0.5 * np.sin(2 * np.pi * 440 * (time - 1.0)), 0.0).astype(np.float32)
        channels = len(sound.codec_context.layout.channels)
        frame = av.AudioFrame.from_ndarray(np.tile(tone, (channels, 1)), "fltp", layout)
        frame.sample_rate = rate
        convert = av.AudioResampler(sound.codec_context.format, layout, rate, sound.codec_context.frame_size or 1024)
        for part in (*convert.resample(frame), *convert.resample(None)):
            container.mux(sound.encode(part))
        container.mux(sound.encode())
    storage = Storage(str(tmp_path / "out"))
    source = ingest(str(path))
    clips, _ = plan_clips(source, [Shot(0.4, 3.0, 0.4, 3.0, False, False)], [], SMALL)
    (clip,) = write_clips(source, path, clips, SMALL, storage)
    samples, found = soundfile.read(storage.path(clip.audio), dtype="float32")
    assert (found, samples.shape) == (16000, (round(clip.frames * 16000 / 25),))
    due = np.arange(len(samples)) / 16000 + 0.4
    expected = np.where(due >= 1.0, np.sin(2 * np.pi * 440 * (due - 1.0)), 0.0)
    inner = slice(round(0.8 * 16000), round(2.3 * 16000))
    gain = float(np.dot(samples[inner], expected[inner]) / np.dot(expected[inner], expected[inner]))
    assert gain == pytest.approx(0.5, abs=0.01)  # channels are averaged; adding them up would clip
    # Matroska rounds time stamps to milliseconds; the average of all of them is more exact
    assert np.abs(samples[inner] - gain * expected[inner]).max() < 0.05
    assert np.abs(samples[: round(0.59 * 16000)]).max() < 0.02


def test_memory_does_not_grow_with_the_number_of_clips(world, tmp_path: Path) -> None:
    """An encoder or a frame that only Python's garbage collector frees would cost megabytes a clip until it runs."""
    path = world.path("talk_3s.mp4")
    source = ingest(str(path))
    settings = ClipSettings(min_s=0.48, max_s=0.6, trim_s=0.0)
    clips, _ = plan_clips(source, [Shot(0.0, 3.0, 0.0, 3.0, False, False)], [], settings)
    used = []
    gc.disable()
    try:
        for number in range(12):
            write_clips(source, path, clips, settings, Storage(str(tmp_path / str(number))))
            used.append(psutil.Process().memory_info().rss)
    finally:
        gc.enable()
    assert used[-1] - used[3] < 8e6
