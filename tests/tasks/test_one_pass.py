"""Clips written while shots are being found: the same bytes as afterwards, from one decoding, in little memory."""

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from data_manifests.storage import Storage
from tasks.clip import ClipRecord
from tasks.clips import ClipSettings, plan
from tasks.cut import write_clips
from tasks.decode import read_video
from tasks.ingest import ingest
from tasks.media import MediaError
from tasks.one_pass import find_and_cut
from tasks.scenes import Scenes, ScenesSettings, ShotFinder, find_shots

SCENES = ScenesSettings()
CLIPS = ClipSettings(fps=24, short_side=180, min_s=1.0, max_s=2.5)
FRAME = 320 * 180 * 3 // 2  # bytes of a picture of theirs
ENOUGH = 640_000_000


def afterwards(path: Path, folder: Path, settings: ClipSettings = CLIPS) -> tuple[Scenes, list[ClipRecord]]:
    source, scenes = ingest(str(path)), find_shots(path, SCENES)
    clips, _ = plan(source, scenes.shots, scenes.holes, settings)
    return scenes, write_clips(source, path, clips, settings, Storage(str(folder)))


def written(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


@pytest.mark.parametrize(
    "name",
    [
        "cuts_quick.mp4",
        "fade_and_cut.mp4",
        "interlaced.ts",
        "vfr_irregular.mp4",
        "fps_60.mp4",
        "rotate_90.mp4",
        "corrupt_frames.mp4",
        "no_audio.mp4",
    ],
)
def test_one_pass_writes_the_clips_of_two(world: Any, tmp_path: Path, name: str) -> None:
    path, settings = world.path(name), CLIPS.model_copy(update={"min_s": 0.5} if name == "cuts_quick.mp4" else {})
    scenes, clips = afterwards(path, tmp_path / "two", settings)
    assert clips
    found, _ = find_and_cut(ingest(str(path)), path, SCENES, settings, Storage(str(tmp_path / "one")), ENOUGH)
    assert found == scenes
    assert written(tmp_path / "one") == written(tmp_path / "two")


def test_a_long_shot_waits_in_the_memory_of_a_clip(world: Any, tmp_path: Path) -> None:
    """And of the shortest one after it, and of the moment in which a fade may have begun."""
    path, storage = world.path("talk_45s.mp4"), Storage(str(tmp_path / "one"))
    keep = round((CLIPS.max_s + CLIPS.min_s + 0.8) * CLIPS.fps) * FRAME
    find_and_cut(ingest(str(path)), path, SCENES, CLIPS, storage, keep)
    _, clips = afterwards(path, tmp_path / "two")
    assert len(clips) > 10
    assert written(tmp_path / "one") == written(tmp_path / "two")


@pytest.mark.parametrize("frames", [0, 30, 70])
def test_what_memory_does_not_allow_is_left_for_another_pass(world: Any, tmp_path: Path, frames: int) -> None:
    path, storage = world.path("cuts_plain.mp4"), Storage(str(tmp_path / "one"))
    scenes, clips = afterwards(path, tmp_path / "two")
    source = ingest(str(path))
    assert find_and_cut(source, path, SCENES, CLIPS, storage, frames * FRAME)[0] == scenes
    assert len(written(tmp_path / "one")) < len(written(tmp_path / "two"))
    assert write_clips(source, path, clips, CLIPS, storage) == clips
    assert written(tmp_path / "one") == written(tmp_path / "two")


def test_clips_that_are_there_are_left_alone(world: Any, tmp_path: Path) -> None:
    path, storage = world.path("cuts_plain.mp4"), Storage(str(tmp_path))
    _, clips = afterwards(path, tmp_path)
    before = {clip.video: Path(storage.path(clip.video)).stat().st_mtime_ns for clip in clips}
    storage.remove(clips[1].video)
    find_and_cut(ingest(str(path)), path, SCENES, CLIPS, storage, ENOUGH)
    after = {clip.video: Path(storage.path(clip.video)).stat().st_mtime_ns for clip in clips}
    assert {name for name in before if before[name] != after[name]} == {clips[1].video}


def test_nothing_is_left_of_a_file_that_turns_out_to_be_broken(world: Any, tmp_path: Path) -> None:
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


def film(path: Path, pictures: list[np.ndarray], rate: int = 30) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "ultrafast", "qp": "0"})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    return path


def pictures(seed: int, count: int, repeats: int = 1) -> list[np.ndarray]:
    """A pan over blotches, each picture shown some times."""
    import cv2

    coarse = np.random.default_rng(seed).integers(0, 255, (12, 60, 3), dtype=np.uint8)
    wide = cv2.resize(coarse, (1600, 180), interpolation=cv2.INTER_CUBIC)
    return [np.ascontiguousarray(wide[:, 4 * (k // repeats) : 4 * (k // repeats) + 320]) for k in range(count)]


def test_black_takes_no_memory(tmp_path: Path) -> None:
    black = [np.zeros((180, 320, 3), np.uint8)] * 150
    path = film(tmp_path / "a.mp4", black + pictures(0, 60) + black + pictures(1, 60))
    _, clips = afterwards(path, tmp_path / "two")
    assert len(clips) == 2
    find_and_cut(ingest(str(path)), path, SCENES, CLIPS, Storage(str(tmp_path / "one")), 80 * FRAME)
    assert written(tmp_path / "one") == written(tmp_path / "two")


def test_a_cut_that_is_found_late_costs_another_pass_and_no_more(tmp_path: Path) -> None:
    """Doubled pictures keep the detector waiting."""
    path = film(tmp_path / "a.mp4", [p for seed in range(4) for p in pictures(seed, 70, repeats=5)], 60)
    settings = CLIPS.model_copy(update={"min_s": 0.5, "trim_s": 0.0})
    scenes, clips = afterwards(path, tmp_path / "two", settings)
    assert len(clips) == 4
    source, storage = ingest(str(path)), Storage(str(tmp_path / "one"))
    assert find_and_cut(source, path, SCENES, settings, storage, ENOUGH)[0] == scenes
    assert len(written(tmp_path / "one")) < len(clips)
    write_clips(source, path, clips, settings, storage)
    assert written(tmp_path / "one") == written(tmp_path / "two")


@pytest.mark.parametrize("name", ["fade_and_cut.mp4", "fades.mp4", "cuts_quick.mp4", "corrupt_frames.mp4"])
def test_nothing_sure_of_a_shot_is_taken_back(world: Any, name: str) -> None:
    finder = ShotFinder(SCENES)
    said = []
    for event in read_video(world.path(name)):
        finder.add(event)
        if finder.under_way is not None:
            said.append((list(finder.shots), finder.under_way))
    shots = finder.finish().shots
    told = 0
    for before, now in said:
        assert shots[: len(before)] == before
        shot = shots[len(before)]
        assert (now.start_s, now.cut_before) == (shot.start_s, shot.cut_before)
        if now.to_s > now.clear_from_s:
            assert now.clear_from_s == shot.clear_from_s
            assert now.to_s <= shot.clear_to_s
            told += 1
    assert told > len(said) / 2
