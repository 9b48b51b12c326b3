"""The single pass writes the same clips as a second decoding would, in little memory."""

import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from data_manifests.storage import Storage, StoreError
from tasks.cutting.clip_plan import ClipSettings, plan_clips
from tasks.cutting.clip_writer import write_clips
from tasks.cutting.ingest import ingest
from tasks.cutting.shots import Scenes, ScenesSettings, ShotFinder, find_shots
from tasks.cutting.single_pass import find_and_cut
from tasks.execution.jobs import CutSource, Source, SourceToCut, WriteClips
from tasks.media.clip import ClipRecord
from tasks.media.container import MediaError
from tasks.media.decode import read_video
from tasks.media.encode import ClipEncoder

SCENES = ScenesSettings()
CLIPS = ClipSettings(fps=24, short_side=180, min_s=1.0, max_s=2.5)
FRAME = 320 * 180 * 3 // 2  # bytes of one of these clips' frames
ENOUGH = 640_000_000


def afterwards(path: Path, folder: Path, settings: ClipSettings = CLIPS) -> tuple[Scenes, list[ClipRecord]]:
    source, scenes = ingest(str(path)), find_shots(path, SCENES)
    clips, _ = plan_clips(source, scenes.shots, scenes.holes, settings)
    return scenes, write_clips(source, path, clips, settings, Storage(str(folder)))


def written(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


@pytest.mark.parametrize(
    "name",
    [
        *("interlaced.ts", "vfr_irregular.mp4", "corrupt_frames.mp4", "edit_list_both.mp4", "no_audio.mp4"),
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("fps_60.mp4", "rotate_90.mp4", "wrap.ts", "video_late.mkv")
        ),
    ],
)
def test_the_single_pass_writes_the_clips_of_two_passes(world: Any, tmp_path: Path, name: str) -> None:
    path = world.path(name)
    scenes, clips = afterwards(path, tmp_path / "two")
    assert clips
    found, _ = find_and_cut(ingest(str(path)), path, SCENES, CLIPS, Storage(str(tmp_path / "one")), ENOUGH)
    assert found == scenes
    assert written(tmp_path / "one") == written(tmp_path / "two")


@pytest.mark.parametrize("frames", [0, 30, pytest.param(70, marks=pytest.mark.slow)])
def test_clips_that_take_too_much_memory_are_left_for_a_second_pass(world: Any, tmp_path: Path, frames: int) -> None:
    path, storage = world.path("cuts_plain.mp4"), Storage(str(tmp_path / "one"))
    scenes, clips = afterwards(path, tmp_path / "two")
    source = ingest(str(path))
    assert find_and_cut(source, path, SCENES, CLIPS, storage, frames * FRAME)[0] == scenes
    assert len(written(tmp_path / "one")) < len(written(tmp_path / "two"))
    assert write_clips(source, path, clips, CLIPS, storage) == clips
    assert written(tmp_path / "one") == written(tmp_path / "two")


def test_clips_that_exist_are_left_alone(world: Any, tmp_path: Path) -> None:
    path, storage = world.path("cuts_plain.mp4"), Storage(str(tmp_path))
    _, clips = afterwards(path, tmp_path)
    before = {clip.video: Path(storage.path(clip.video)).stat().st_mtime_ns for clip in clips}
    storage.remove(clips[1].video)
    find_and_cut(ingest(str(path)), path, SCENES, CLIPS, storage, ENOUGH)
    after = {clip.video: Path(storage.path(clip.video)).stat().st_mtime_ns for clip in clips}
    assert {name for name in before if before[name] != after[name]} == {clips[1].video}


def test_the_clips_of_a_file_that_turns_out_to_be_broken_are_removed(world: Any, tmp_path: Path) -> None:
    path, strict = world.path("corrupt_frames.mp4"), SCENES.model_copy(update={"max_bad_frames": 0.01})
    settings = CLIPS.model_copy(update={"max_s": 1.0})
    seen = []

    class Watched(Storage):
        def write(self, name: str, produce: Any) -> None:
            seen.append(name)
            super().write(name, produce)

    with pytest.raises(MediaError, match="cannot be decoded"):
        find_and_cut(ingest(str(path)), path, strict, settings, Watched(str(tmp_path)), ENOUGH)
    assert seen
    assert not written(tmp_path)


def film(path: Path, pictures: list[np.ndarray], rate: int = 30, sound: np.ndarray | None = None) -> Path:
    """sound: [samples] float32, 16 kHz; none when None."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=rate, options={"preset": "ultrafast", "qp": "0"})
        video.height, video.width = pictures[0].shape[:2]
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=16000, layout="mono") if sound is not None else None
        for picture in pictures:
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(video.encode())
        if audio is not None and sound is not None:
            for at in range(0, len(sound), 1024):
                frame = av.AudioFrame.from_ndarray(sound[None, at : at + 1024], "fltp", "mono")
                frame.sample_rate, frame.pts = 16000, at
                container.mux(audio.encode(frame))
            container.mux(audio.encode())
    return path


def pictures(seed: int, count: int, repeats: int = 1, size: tuple[int, int] = (320, 180)) -> list[np.ndarray]:
    """A pan over blurred noise. Each image is repeated `repeats` times."""
    import cv2

    width, height = size
    coarse = np.random.default_rng(seed).integers(0, 255, (12, 60, 3), dtype=np.uint8)
    wide = cv2.resize(coarse, (5 * width, height), interpolation=cv2.INTER_CUBIC)
    return [np.ascontiguousarray(wide[:, (x := 4 * (k // repeats) % (4 * width)) : x + width]) for k in range(count)]


def test_a_long_shot_takes_the_memory_of_one_clip(tmp_path: Path) -> None:
    """Plus the memory of the shortest clip after it, and of the longest fade."""
    path = film(tmp_path / "a.mp4", pictures(0, 315))
    keep = round((CLIPS.max_s + CLIPS.min_s + 3.5) * CLIPS.fps) * FRAME
    find_and_cut(ingest(str(path)), path, SCENES, CLIPS, Storage(str(tmp_path / "one")), keep)
    _, clips = afterwards(path, tmp_path / "two")
    assert [clip.frames for clip in clips] == [60, 60, 60, 36, 36]
    assert written(tmp_path / "one") == written(tmp_path / "two")


def test_black_takes_no_memory(tmp_path: Path) -> None:
    black = [np.zeros((180, 320, 3), np.uint8)] * 150
    path = film(tmp_path / "a.mp4", black + pictures(0, 60) + black + pictures(1, 60))
    _, clips = afterwards(path, tmp_path / "two")
    assert len(clips) == 2
    find_and_cut(ingest(str(path)), path, SCENES, CLIPS, Storage(str(tmp_path / "one")), 80 * FRAME)
    assert written(tmp_path / "one") == written(tmp_path / "two")


def test_audio_that_goes_on_after_the_video_does_not_fill_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "tasks.cutting.single_pass")
    small = CLIPS.model_copy(update={"short_side": 64})
    path = film(tmp_path / "a.mkv", pictures(0, 60, size=(96, 64)), sound=np.zeros(300 * 16000, np.float32))
    source, storage = ingest(str(path)), Storage(str(tmp_path / "one"))
    _, clips = afterwards(path, tmp_path / "two", small)
    find_and_cut(source, path, SCENES, small, storage, 5_000_000)
    assert "more memory" in caplog.text
    write_clips(source, path, clips, small, storage)
    assert written(tmp_path / "one") == written(tmp_path / "two")


@pytest.mark.parametrize(("repeats", "count"), [(5, 70), (4, 64), (4, 84)])
def test_a_cut_that_is_found_late_only_costs_a_second_pass(tmp_path: Path, repeats: int, count: int) -> None:
    """Repeated frames keep the detector waiting."""
    path = film(tmp_path / "a.mp4", [p for seed in range(3) for p in pictures(seed, count, repeats)], 60)
    settings = CLIPS.model_copy(update={"min_s": 0.5, "trim_s": 0.0})
    scenes, clips = afterwards(path, tmp_path / "two", settings)
    assert len(clips) == 3
    source, storage = ingest(str(path)), Storage(str(tmp_path / "one"))
    assert find_and_cut(source, path, SCENES, settings, storage, ENOUGH)[0] == scenes
    assert len(written(tmp_path / "one")) < len(clips)
    write_clips(source, path, clips, settings, storage)
    assert written(tmp_path / "one") == written(tmp_path / "two")


def test_a_slow_frame_may_be_on_display_in_two_clips(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", pictures(0, 33) + pictures(1, 60), rate=10)
    _, clips = afterwards(path, tmp_path / "two")
    assert len(clips) > 3
    find_and_cut(ingest(str(path)), path, SCENES, CLIPS, Storage(str(tmp_path / "one")), ENOUGH)
    assert written(tmp_path / "one") == written(tmp_path / "two")


def test_audio_whose_time_stamps_jump_back_is_the_same(tmp_path: Path) -> None:
    """As in two joined recordings: the audio of the second begins before that of the first ends."""
    path = tmp_path / "ab.ts"
    for name, seed, begins, heard_from in (("a.ts", 0, 0, 0), ("b.ts", 1, 82, 32)):
        with av.open(str(tmp_path / name), "w", format="mpegts") as container:
            video = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "qp": "10"})
            video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
            audio = container.add_stream("mp2", rate=48000, layout="mono")
            for number, picture in enumerate(pictures(seed, 82, size=(96, 64))):
                frame = av.VideoFrame.from_ndarray(picture, "rgb24")
                frame.pts, frame.time_base = begins + number, Fraction(1, 25)
                container.mux(video.encode(frame))
                tone = 8000 * np.sin(np.arange(1920) * (0.05 + 0.05 * seed))
                heard = av.AudioFrame.from_ndarray(tone.astype(np.int16)[None], "s16", "mono")
                heard.sample_rate, heard.time_base = 48000, Fraction(1, 48000)
                heard.pts = 1920 * (heard_from + number)
                container.mux(audio.encode(heard))
            container.mux([*video.encode(), *audio.encode()])
        with path.open("ab") as joined:
            joined.write((tmp_path / name).read_bytes())
    # in the second pass, the first clip is complete before the audio that jumps back is read
    small = CLIPS.model_copy(update={"short_side": 64})
    _, clips = afterwards(path, tmp_path / "two", small)
    assert [round(clip.start_s, 1) for clip in clips] == [0.0, 1.6, 3.3, 4.9]
    find_and_cut(ingest(str(path)), path, SCENES, small, Storage(str(tmp_path / "one")), ENOUGH)
    assert written(tmp_path / "one") == written(tmp_path / "two")


@pytest.mark.parametrize("seed", range(6))
def test_any_film_gives_the_same_clips_in_a_single_pass(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    shots: list[np.ndarray] = []
    rate = int(random.choice([10, 15, 25, 50, 60]))
    for number in range(random.integers(1, 6)):
        shown = pictures(10 * seed + number, int(random.integers(2, 3 * rate)), int(random.integers(1, 4)), (96, 64))
        ramp = int(random.integers(1, rate)) if random.random() < 0.4 else 1
        ends = [min(1.0, (k + 1) / ramp, (len(shown) - k) / ramp) for k in range(len(shown))]
        shots += [(picture * end).astype(np.uint8) for picture, end in zip(shown, ends, strict=True)]
        shots += [np.zeros((64, 96, 3), np.uint8)] * int(random.integers(0, rate) * (random.random() < 0.3))
    sound = random.normal(scale=0.1, size=16000 * len(shots) // rate).astype(np.float32)
    path = film(tmp_path / random.choice(["a.mp4", "a.mkv"]), shots, rate, sound)
    if random.random() < 0.4:
        data = bytearray(path.read_bytes())
        at = int(random.integers(len(data) // 5, len(data) * 4 // 5))
        data[at : at + 200] = random.bytes(200)
        path.write_bytes(data)
    settings = CLIPS.model_copy(
        update={
            "short_side": 48,
            "fps": int(random.choice([12, 24, 25])),
            "min_s": float(random.choice([0.25, 0.5, 1.0])),
            "max_s": float(random.choice([1.0, 1.5, 2.5])),
            "trim_s": float(random.choice([0.0, 0.12])),
        }
    )
    source, storage = ingest(str(path)), Storage(str(tmp_path / "one"))
    lenient = SCENES.model_copy(update={"max_bad_frames": 1.0})
    scenes = find_shots(path, lenient)
    clips, _ = plan_clips(source, scenes.shots, scenes.holes, settings)
    write_clips(source, path, clips, settings, Storage(str(tmp_path / "two")))
    assert find_and_cut(source, path, lenient, settings, storage, ENOUGH)[0] == scenes
    write_clips(source, path, clips, settings, storage)
    assert written(tmp_path / "one") == written(tmp_path / "two")


# ---- errors ----


def test_each_error_is_recorded_for_the_step_that_had_it(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = world.path("cuts_plain.mp4")
    unit = SourceToCut(Source(ingest(str(path)), {}))
    job = CutSource(SCENES, WriteClips(CLIPS, Storage(str(tmp_path))), ENOUGH)

    def statuses() -> dict[str, str]:
        return {step: made.row["error"] for step, made in job(unit).items()}

    def fails(error: Exception) -> Any:
        def add(*_: object) -> None:
            raise error

        return add

    with monkeypatch.context() as patch:
        patch.setattr(ClipEncoder, "add", fails(RuntimeError("no such preset")))
        assert statuses() == {"scenes": "", "clips": "RuntimeError: no such preset"}
    with monkeypatch.context() as patch:
        patch.setattr(ClipEncoder, "add", fails(OSError(28, "No space left on device")))
        with pytest.raises(StoreError):
            job(unit)
    assert statuses() == {"scenes": "", "clips": ""}
    shutil.rmtree(tmp_path / "clips")
    calls = iter(range(400))
    with monkeypatch.context() as patch:
        add = ShotFinder.add
        patch.setattr(ShotFinder, "add", lambda *a: add(*a) if next(calls) < 250 else fails(ValueError("odd size"))())
        assert statuses() == {"scenes": "ValueError: odd size"}
    assert not written(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        *("fade_and_cut.mp4", "cuts_quick.mp4"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("fades.mp4", "corrupt_frames.mp4")),
    ],
)
def test_what_is_certain_of_an_open_shot_stays_true(world: Any, name: str) -> None:
    finder = ShotFinder(SCENES)
    said = []
    for event in read_video(world.path(name)):
        finder.add(event)
        if finder.open_shot is not None:
            said.append((list(finder.shots), finder.open_shot))
    shots = finder.finish().shots
    told = 0
    for before, now in said:
        assert shots[: len(before)] == before
        shot = shots[len(before)]
        assert (now.start_s, now.cut_before) == (shot.start_s, shot.cut_before)
        if now.sure_to_s > now.clear_from_s:
            assert now.clear_from_s == shot.clear_from_s
            assert now.sure_to_s <= shot.clear_to_s
            told += 1
    assert told > len(said) / 2
