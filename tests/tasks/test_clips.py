"""Clips: whole frames of one shot, within the bounds, sound with picture, the same bytes each time."""

import gc
import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from data_manifests.storage import Storage
from data_manifests.strict import RecipeError, validate
from tasks.clip import ClipRecord
from tasks.clip_frames import Decoded, images
from tasks.clips import ClipSettings, Skipped, clip_size, clips_of, first_clips, plan
from tasks.cut import is_written, write_clips
from tasks.ingest import SourceInfo, ingest
from tasks.media import MediaError
from tasks.one_pass import find_and_cut
from tasks.scenes import ScenesSettings, Shot, Span, find_shots
from tasks.sound import _Chunk, _fit, _runs
from tests.world import Truth, catalogue, make, measure_events

# ---- what is planned ----

SOURCE = SourceInfo(
    container="mov", duration_s=100.0, start_s=0.0, video_codec="h264", pix_fmt="yuv420p", width=1920, height=1080,
    fps=25.0, rotation=0, interlaced=False, video_start_s=0.0, audio_codec="aac", audio_rate=48000, audio_channels=2,
    audio_start_s=0.0, video_streams=1, audio_streams=1, uri="a.mp4", source_id="0123456789abcdef", sha256="0" * 64,
    size_bytes=1, signature="1-1",
)  # fmt: skip


@st.composite
def _shots(draw: st.DrawFn) -> list[Shot]:
    lengths = draw(st.lists(st.integers(1, 2400), min_size=1, max_size=6))
    edges = [0.0, *(round(frame / 30, 6) for frame in itertools.accumulate(lengths))]
    shots = []
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        dark = draw(st.sampled_from([0.0, 0.0, 0.4]))
        clear = (start + dark, end - dark) if end - start > 2 * dark else (end, end)
        shots.append(Shot(start, end, *clear, number > 0, number < len(lengths) - 1))
    return shots


@given(
    shots=_shots(),
    fps=st.sampled_from([24, 25, 30]),
    bounds=st.sampled_from([(5.0, 20.0), (3.0, 15.0), (8.0, 10.0), (2.5, 2.6), (1.0, 1.0)]),
    trim_s=st.sampled_from([0.0, 0.12, 0.5]),
)
def test_clips_are_whole_frames_within_the_bounds_and_inside_one_shot(
    shots: list[Shot], fps: int, bounds: tuple[float, float], trim_s: float
) -> None:
    settings = ClipSettings(fps=fps, min_s=bounds[0], max_s=bounds[1], trim_s=trim_s)
    clips, skipped = plan(SOURCE, shots, [], settings)
    assert len({clip.clip_id for clip in clips}) == len(clips)
    for clip in clips:
        assert bounds[0] - 1e-6 <= clip.duration_s <= bounds[1] + 1e-6
        assert clip.end_s - clip.start_s == pytest.approx(clip.frames / fps, abs=3e-6)
        (shot,) = (shot for shot in shots if shot.start_s <= clip.start_s < shot.end_s)
        first, last = clip.start_s + 0.5 / fps, clip.end_s - 0.5 / fps
        assert shot.clear_from_s <= first
        assert last < shot.clear_to_s
        if shot.cut_before and shot.clear_from_s == shot.start_s:
            assert clip.start_s >= shot.start_s + trim_s - 1e-6
        if shot.cut_after and shot.clear_to_s == shot.end_s:
            assert clip.end_s <= shot.end_s - trim_s + 0.1 / fps + 1e-6
    for one, other in itertools.pairwise(clips):
        assert one.end_s <= other.start_s
    # nothing is left out without a word, but for the part of a frame at the end of a shot
    told = sum(c.end_s - c.start_s for c in clips) + sum(s.end_s - s.start_s for s in skipped)
    assert told == pytest.approx(shots[-1].end_s, abs=3 * len(shots) / fps)


@given(frames=st.integers(1, 20_000), seconds=st.sampled_from([(5.0, 20.0), (3.0, 15.0), (2.0, 10.0)]))
def test_longer_shots_are_split_and_leave_no_stub(frames: int, seconds: tuple[float, float]) -> None:
    settings = ClipSettings(fps=25, min_s=seconds[0], max_s=seconds[1])
    end = frames / 25
    clips, skipped = plan(SOURCE, [Shot(0.0, end, 0.0, end, False, False)], [], settings)
    lengths = [clip.frames for clip in clips]
    if end < seconds[0]:
        assert not clips
        assert skipped == [Skipped(0.0, end, f"shorter than min_s {seconds[0]:g}")]
    else:
        assert sum(lengths) == frames
        assert len(lengths) == -(-frames // settings.max_frames)
        assert not skipped
        *full, first, last = [settings.max_frames, *lengths]
        assert set(full) <= {settings.max_frames}
        assert first == settings.max_frames or 0 <= first - last <= 1


@given(
    frames=st.integers(1, 2000),
    more=st.integers(0, 2000),
    bounds=st.tuples(st.integers(1, 60), st.integers(0, 60)),
    cut=st.booleans(),
)
def test_how_a_shot_begins_does_not_hang_on_how_long_it_is(
    frames: int, more: int, bounds: tuple[int, int], cut: bool
) -> None:
    low, high = bounds[0], sum(bounds)
    settings = ClipSettings(fps=25, min_s=low / 25, max_s=high / 25)
    seen, whole = (Shot(0.0, n / 25, 0.0, n / 25, False, after) for n, after in ((frames, True), (frames + more, cut)))
    begins, clips = first_clips(SOURCE, seen, settings), clips_of(SOURCE, whole, settings)
    assert clips[: len(begins)] == begins
    # and as much of a shot is in clips as by an even split of it
    usable = frames + more - 3 * cut
    parts = -(-usable // high)
    even = usable if usable >= low and usable // parts >= low else high * (parts - 1)
    assert sum(clip.frames for clip in clips) == (even if usable >= low else 0)


def test_what_no_clip_shows_is_said_with_the_reason() -> None:
    shots = [
        Shot(0.0, 8.0, 0.0, 7.5, False, True),
        Shot(8.0, 10.0, 8.5, 10.0, True, True),
        Shot(10.0, 12.0, 11.0, 11.0, True, False),
    ]
    clips, skipped = plan(SOURCE, shots, [Span(12.0, 13.0)], ClipSettings(min_s=5, max_s=20))
    assert [(clip.start_s, clip.end_s) for clip in clips] == [(0.0, 7.48)]
    assert [(s.start_s, s.end_s, s.reason) for s in skipped] == [
        (7.5, 8.0, "black or fading"),
        (8.0, 8.5, "black or fading"),
        (8.5, 10.0, "shorter than min_s 5"),
        (10.0, 11.0, "black or fading"),
        (11.0, 12.0, "black or fading"),
        (12.0, 13.0, "cannot be decoded"),
    ]


def test_a_clip_is_called_by_what_makes_its_bytes() -> None:
    shot = [Shot(0.0, 10.0, 0.0, 10.0, False, False)]

    def name(**changed: object) -> str:
        return plan(SOURCE, shot, [], ClipSettings(**changed))[0][0].clip_id  # type: ignore[arg-type]

    assert name() == name(min_s=3.0) == name(max_s=15.0) == name(trim_s=0.5)
    names = [name(), name(fps=24), name(short_side=360), name(qp=22), name(preset="medium"), name(max_s=6.0)]
    assert len(set(names)) == len(names)


@given(width=st.integers(2, 8000), height=st.integers(2, 8000), side=st.sampled_from([256, 480, 720]))
def test_clips_are_even_and_never_enlarged(width: int, height: int, side: int) -> None:
    w, h = clip_size(width, height, side)
    assert w % 2 == h % 2 == 0
    assert 2 <= w <= max(width, 2)
    assert 2 <= h <= max(height, 2)
    assert min(w, h) == (side if min(width, height) >= side else min(width, height) // 2 * 2)


def test_bounds_between_which_no_frame_fits_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"no whole number of frames lies between min_s 5\.01 and max_s 5\.02"):
        validate(ClipSettings, {"min_s": 5.01, "max_s": 5.02}, "a.yaml")


# ---- what is written ----

SMALL = ClipSettings(short_side=180, min_s=2, max_s=20)


def _cut(path: Path, storage: Storage, settings: ClipSettings = SMALL) -> list[ClipRecord]:
    source = ingest(str(path))
    scenes = find_shots(path, ScenesSettings())
    clips, _ = plan(source, scenes.shots, scenes.holes, settings)
    return write_clips(source, path, clips, settings, storage)


@dataclass(frozen=True)
class Seen:
    """Of one file: picture minus sound, picture minus truth, sound minus truth, for each event, in milliseconds."""

    file: str
    apart: list[float]
    picture: list[float]
    sound: list[float]


def _see(folder: Path, truth: Truth, settings: ClipSettings, out: Path) -> Seen:
    storage, path = Storage(str(out / f"{settings.fps}-{truth.file.encode().hex()[-80:]}")), folder / truth.file
    seen, source = Seen(truth.file, [], [], []), ingest(str(path))
    scenes, _ = find_and_cut(source, path, ScenesSettings(), settings, storage, keep_bytes=640_000_000)
    clips, _ = plan(source, scenes.shots, scenes.holes, settings)
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


@pytest.fixture(scope="module")
def seen(world, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Seen]:
    """Every awkward file cut to 25 frames a second, and some to 24."""
    truths = [t for t in make(world.folder, AWKWARD) if t.has_audio and t.events_s]
    out = tmp_path_factory.mktemp("cut")
    at_24 = ("fps_25.mp4", "fps_60.mp4", "vfr_irregular.mp4", "fps_23976.mp4")
    todo = [(t, 25) for t in truths] + [(t, 24) for t in truths if t.file in at_24]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        jobs = {
            (t.file, fps): pool.submit(_see, world.folder, t, SMALL.model_copy(update={"fps": fps}), out)
            for t, fps in todo
        }
        return {key: job.result() for key, job in jobs.items()}


@pytest.mark.parametrize("name", AWKWARD)
def test_sound_stays_with_picture_after_cutting(seen: dict[tuple[str, int], Seen], name: str) -> None:
    for fps, bound in ((25, 20.0), (24, 1000 / 48)):
        if (name, fps) in seen:
            found = seen[name, fps]
            assert len(found.apart) >= 2, "too few events to tell"
            # a lossy sound codec smears a beep's onset by a part of a millisecond
            assert max(map(abs, found.apart)) <= bound + 1
            assert max(map(abs, found.sound)) <= 1


def test_all_awkward_timings_were_measured(seen: dict[tuple[str, int], Seen]) -> None:
    assert {name for name, _ in seen} == set(AWKWARD)
    apart = [abs(a) for (_, fps), found in seen.items() if fps == 25 for a in found.apart]
    assert max(apart) <= 21
    assert np.mean(apart) <= 5  # most files' frames fall onto the clip's


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
    # a run that was killed before the last clip, and the sound of the one before it was only half the work
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
    # nothing is read when nothing is missing
    source = ingest(str(path))
    assert write_clips(source, tmp_path / "not there.mp4", clips, settings, two) == clips


def test_clips_go_to_an_object_store(world, tmp_path: Path, s3_folder: str) -> None:
    path = world.path("fps_25.mp4")
    there, here = Storage(s3_folder), Storage(str(tmp_path))
    clips = _cut(path, there)
    assert clips == _cut(path, here)
    assert all(there.read_bytes(clip.video) == here.read_bytes(clip.video) for clip in clips)


def test_a_clip_is_never_bridged_over_damage(world, tmp_path: Path) -> None:
    path = world.path("corrupt_frames.mp4")
    source, storage = ingest(str(path)), Storage(str(tmp_path))
    settings = SMALL.model_copy(update={"min_s": 5.0})
    # as if nobody had seen the hole
    clips, _ = plan(source, [Shot(0.0, 14.0, 0.0, 14.0, False, False)], [], settings)
    with pytest.raises(MediaError, match=r"no picture at 6\.420 s"):
        write_clips(source, path, clips, settings, storage)
    # as if the file were longer than it is
    short, _ = plan(source, [Shot(8.0, 15.0, 8.0, 15.0, False, False)], [], settings)
    with pytest.raises(MediaError, match="ends before"):
        write_clips(source, path, short, settings, storage)
    assert not list(tmp_path.rglob("*.mp4"))


def _film(path: Path, pix_fmt: str, matrix: int, full: bool, size: tuple[int, int] = (320, 240)) -> Path:
    """Four fields of plain colour, for two seconds."""
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
    picture = next(images(Decoded(Path(storage.path(clip.video))).frames(), 25))
    height, width = picture.shape[:2]
    found = [picture[y, x] for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    assert np.abs(np.array(found, int) - [(200, 30, 40), (40, 180, 60), (30, 50, 190), (128, 128, 128)]).max() <= 6


# ---- where sound is put ----


def _chunks(strays_ms: list[float], rate: int = 48000, length: int = 1024, true_rate: float = 48000) -> list[_Chunk]:
    silence = np.zeros((1, length), np.float32)
    times = [5 + k * length / true_rate + stray / 1000 for k, stray in enumerate(strays_ms)]
    return [_Chunk(time, rate, "fltp", "mono", silence, length, 0.0, 0.0) for time in times]


@given(st.lists(st.floats(-4.5, 4.5), min_size=50, max_size=400))
def test_jitter_of_time_stamps_makes_no_gaps_in_the_sound(strays: list[float]) -> None:
    (run,) = _runs(_chunks(strays))
    start, rate = _fit(run)
    assert start == pytest.approx(5, abs=0.0046)
    assert rate == pytest.approx(48000, rel=0.01)


def test_gaps_part_the_sound_and_drift_bends_it() -> None:
    gap = _chunks([0.0] * 20 + [21.0] * 20)
    assert [len(run) for run in _runs(gap)] == [20, 20]
    (drifting,) = _runs(_chunks([0.0] * 400, true_rate=47900))
    start, rate = _fit(drifting)
    assert (start, rate) == (pytest.approx(5, abs=1e-4), pytest.approx(47900, abs=2))
    steady = _fit(_runs(_chunks([0.0] * 400))[0])
    assert steady == (5.0, 48000)


@pytest.mark.parametrize(
    ("codec", "layout", "rate"),
    [
        ("pcm_s16le", "stereo", 44100),
        ("pcm_u8", "mono", 8000),
        ("pcm_s24le", "5.1", 48000),
        ("pcm_f32le", "mono", 16000),
    ],
)
def test_any_sound_comes_out_at_16_khz_mono_where_it_was(tmp_path: Path, codec: str, layout: str, rate: int) -> None:
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
    clips, _ = plan(source, [Shot(0.4, 3.0, 0.4, 3.0, False, False)], [], SMALL)
    (clip,) = write_clips(source, path, clips, SMALL, storage)
    samples, found = soundfile.read(storage.path(clip.audio), dtype="float32")
    assert (found, samples.shape) == (16000, (round(clip.frames * 16000 / 25),))
    due = np.arange(len(samples)) / 16000 + 0.4
    expected = np.where(due >= 1.0, np.sin(2 * np.pi * 440 * (due - 1.0)), 0.0)
    inner = slice(round(0.8 * 16000), round(2.3 * 16000))
    gain = float(np.dot(samples[inner], expected[inner]) / np.dot(expected[inner], expected[inner]))
    assert gain == pytest.approx(0.5, abs=0.01)  # channels are averaged, not added up until they clip
    # Matroska rounds time stamps to milliseconds; together they are worth more
    assert np.abs(samples[inner] - gain * expected[inner]).max() < 0.05
    assert np.abs(samples[: round(0.59 * 16000)]).max() < 0.02


def test_memory_does_not_grow_with_the_number_of_clips(world, tmp_path: Path) -> None:
    """An encoder or a picture that only Python's collector lets go of costs megabytes a clip until it comes round."""
    path = world.path("talk_3s.mp4")
    source = ingest(str(path))
    settings = ClipSettings(min_s=0.48, max_s=0.6, trim_s=0.0)
    clips, _ = plan(source, [Shot(0.0, 3.0, 0.0, 3.0, False, False)], [], settings)
    used = []
    gc.disable()
    try:
        for number in range(12):
            write_clips(source, path, clips, settings, Storage(str(tmp_path / str(number))))
            used.append(psutil.Process().memory_info().rss)
    finally:
        gc.enable()
    assert used[-1] - used[3] < 8e6
