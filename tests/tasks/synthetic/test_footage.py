"""The table says the truth about the generated footage."""

import itertools
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.synthetic import Truth, catalogue, make, measure_events, read_table
from tasks.synthetic.truth import write_table

TIMED = (  # one file of each kind of unusual timing, container and coding
    "audio_late.mp4",
    "av1_opus.mkv",
    "edit_list.mp4",
    "edit_list_both.mp4",
    "fps_23976.mp4",
    "fps_60.mp4",
    "interlaced.ts",
    "mpeg4_mp3.avi",
    "odd_size.avi",
    "rotate_90.mp4",
    "surround_ac3.mkv",
    "two\nlines.mp4",
    "vfr_drops.mp4",
    "vfr_irregular.mp4",
    "video_late.mkv",
    "vp9_opus.webm",
    "wrap.ts",
)


def frames(path: Path, only_key: bool = False, small: bool = False) -> list[tuple[float, np.ndarray]]:
    """Times and frames as stored: [height, width, 3] uint8 RGB, or [90, 160] uint8 grey if `small`.

    only_key: only key frames, one every 2 s.
    """
    import av

    form = {"format": "gray", "width": 160, "height": 90} if small else {"format": "rgb24"}
    with av.open(str(path)) as container:
        if only_key:
            container.streams.video[0].codec_context.skip_frame = "NONKEY"
        return [(f.time, f.to_ndarray(**form)) for f in container.decode(video=0)]


@pytest.mark.slow
def test_flash_and_beep_are_where_the_table_says(world: Any) -> None:
    wrong = {}
    for name in TIMED:
        truth = world.truth(name)
        flashes, beeps = measure_events(world.path(name))
        assert len(truth.events_s) == len(flashes) >= 2, name
        nearest = np.abs(beeps[:, None] - flashes).min(axis=0)  # a damaged flash still has its beep
        off = max(np.abs(flashes - truth.events_s).max(), nearest.max())
        if off > 0.001:
            wrong[name] = off
    assert not wrong, "seconds off"


def test_sound_and_picture_of_the_late_files_do_not_begin_together(world: Any) -> None:
    import av

    for name, ahead in (("audio_late.mp4", 0.77), ("video_late.mkv", -0.64), ("wrap.ts", 0), ("start_5s.mp4", 0)):
        with av.open(str(world.path(name))) as container:
            sound, picture = container.streams.audio[0], container.streams.video[0]
            late = float(sound.start_time * sound.time_base - picture.start_time * picture.time_base)
            assert late == pytest.approx(ahead, abs=0.03), name
            assert (abs(container.start_time) > 4e6) == (name in ("wrap.ts", "start_5s.mp4"))


def test_the_edit_list_hides_frames_that_are_in_the_file(world: Any) -> None:
    import av

    with av.open(str(world.path("edit_list.mp4"))) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    shown = frames(world.path("edit_list.mp4"), small=True)
    assert len(packets) == len(shown) + 13
    assert shown[0][0] == 0


def test_unusual_files_are_what_their_names_say(world: Any) -> None:
    import av

    def first(name: str) -> Any:
        with av.open(str(world.path(name))) as container:
            return next(container.decode(video=0))

    assert first("rotate_90.mp4").rotation == 90
    assert (world.truth("rotate_90.mp4").display_width, world.truth("rotate_90.mp4").display_height) == (180, 320)
    assert first("interlaced.ts").interlaced_frame and first("interlaced.mp4").interlaced_frame
    assert first("hevc_10bit.mp4").format.name == "yuv420p10le"
    assert first("odd_size.avi").width % 2 and first("odd_size.avi").height % 2
    with av.open(str(world.path("anamorphic.mp4"))) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(
            world.truth("anamorphic.mp4").display_width, 240
        )
    intervals = np.diff([t for t, _ in frames(world.path("vfr_irregular.mp4"), small=True)])
    assert intervals.max() > 4 * intervals.min()


def test_cuts_and_fades_are_where_the_table_says(world: Any) -> None:
    for name in ("cuts_quick.mp4", "cuts_vfr.mp4"):
        seen = frames(world.path(name), small=True)
        change = [np.abs(a[1].astype(int) - b[1]).mean() for a, b in itertools.pairwise(seen)]
        cuts = world.truth(name).cuts_s
        found = sorted(seen[k + 1][0] for k in np.argsort(change)[-len(cuts) :])
        assert found == pytest.approx(cuts, abs=1e-4), name
    seen = frames(world.path("fades.mp4"), small=True)
    for middle in world.truth("fades.mp4").fades_s:
        dark = [time for time, picture in seen if abs(time - middle) < 1 and picture.mean() < 18]
        assert abs(np.mean(dark) - middle) < 0.03
    assert not world.truth("pan_no_cut.mp4").cuts_s


def test_frozen_footage_stands_still_and_a_talker_moves(world: Any) -> None:
    seen = frames(world.path("frozen.mp4"), small=True)
    ((start, end),) = world.truth("frozen.mp4").frozen_s
    moving, still = [], []
    for (_, before), (time, after) in itertools.pairwise(seen):
        part = still if start + 0.1 <= time < end else moving if not start <= time <= end else None
        if part is not None:
            part.append(np.abs(after.astype(int) - before).mean())
    # a key frame in between is coded anew, which changes the frame a little
    assert np.quantile(still, 0.9) < 0.2 < np.quantile(moving, 0.1)


def test_detectors_accept_the_person(world: Any) -> None:
    solutions = pytest.importorskip("mediapipe").solutions
    with (
        solutions.face_detection.FaceDetection(model_selection=1) as faces,
        solutions.pose.Pose(static_image_mode=True) as pose,
    ):
        for name in ("talk_medium.mp4", "talk_full.mp4", "talk_long.mp4", "fps_60.mp4", "nobody.mp4"):
            pictures = [picture for _, picture in frames(world.path(name), only_key=True)]
            there = bool(world.truth(name).person_s)
            assert [bool(faces.process(p).detections) for p in pictures] == [there] * len(pictures), name
            assert [bool(pose.process(p).pose_landmarks) for p in pictures] == [there] * len(pictures), name


def test_the_mouth_opens_with_the_voice(world: Any) -> None:
    import av

    solutions = pytest.importorskip("mediapipe").solutions
    path = world.path("talk_3s.mp4")
    opening, times = [], []
    with solutions.face_mesh.FaceMesh(static_image_mode=True) as mesh:
        for time, picture in frames(path):
            marks = mesh.process(picture).multi_face_landmarks[0].landmark
            opening.append((marks[14].y - marks[13].y) / (marks[152].y - marks[10].y))
            times.append(time)
    with av.open(str(path)) as container:
        sound = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
    loudness = [np.sqrt(np.mean(sound[round(t * 48_000) : round((t + 0.04) * 48_000)] ** 2)) for t in times]
    assert np.corrcoef(opening, loudness)[0, 1] > 0.8


def test_speech_is_where_the_table_says(world: Any) -> None:
    import av

    with av.open(str(world.path("speech_sparse.mp4"))) as container:
        sound = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
    loud = np.zeros(len(sound), bool)
    for start, end in world.truth("speech_sparse.mp4").speech_s:
        loud[round(start * 48_000) : round(end * 48_000)] = True
    assert 0.3 < loud.mean() < 0.8
    assert np.abs(sound[~loud]).max() < 0.1 * np.abs(sound[loud]).max()


def test_broken_files_fail_as_the_table_says(world: Any) -> None:
    import av

    broken = make(world.folder, groups=["broken"])
    for truth in broken:
        path = world.folder / truth.file
        if truth.error in ("empty", "not media", "truncated"):
            with pytest.raises(av.error.InvalidDataError):
                av.open(str(path))
            continue
        with av.open(str(path)) as container:
            assert bool(container.streams.video) == (truth.error != "no video")
            assert bool(container.streams.audio) == truth.has_audio
    by_name = {truth.file: truth for truth in broken}
    assert {truth.error for truth in broken} == {"", "empty", "not media", "truncated", "no video", "damaged"}
    assert by_name["truncated.mkv"].usable and by_name["truncated.mkv"].duration_s < 8
    again = by_name["talk_office again.mp4"]
    assert world.path(again.same_as).read_bytes() == (world.folder / again.file).read_bytes()

    ((start, end),) = by_name["corrupt_slices.mp4"].corrupt_s
    with av.open(str(world.folder / "corrupt_slices.mp4")) as container:
        bad = [frame.time for frame in container.decode(video=0) if frame.is_corrupt]
    assert bad and all(start <= time < end for time in bad)


def test_the_same_bytes_come_out_each_time(world: Any, tmp_path: Path) -> None:
    names = ["hevc_10bit.mp4", "wrap.ts"]
    made = make(tmp_path, names, workers=2)
    assert made == [world.truth(name) for name in names]
    for name in names:
        assert (tmp_path / name).read_bytes() == world.path(name).read_bytes(), name


def test_a_second_call_makes_only_missing_files(tmp_path: Path) -> None:
    seen: list[str] = []
    make(tmp_path, ["empty.mp4", "text.mp4"])
    assert not (tmp_path / "noise.mp4").exists()
    truths = make(tmp_path, ["text.mp4", "noise.mp4"], progress=lambda name, done, total: seen.append(name))
    assert seen == ["noise.mp4"]
    assert [t.file for t in truths] == ["noise.mp4", "text.mp4"]
    assert [t.file for t in read_table(tmp_path)] == ["empty.mp4", "noise.mp4", "text.mp4"]
    (tmp_path / "text.mp4").unlink()
    make(tmp_path, ["text.mp4"])
    assert (tmp_path / "text.mp4").exists()


def test_an_unknown_name_or_group_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no generated file is called 'talk_ofice.mp4'.*talk_office.mp4"):
        make(tmp_path, ["talk_ofice.mp4"])
    with pytest.raises(ValueError, match="no group is called cutz"):
        make(tmp_path, groups=["cutz"])
    assert 6 <= len(catalogue(["demo"])) <= 20


times = st.floats(0, 1000).map(lambda t: round(t, 6))
span_lists = st.lists(st.tuples(times, times), max_size=3).map(tuple)


names = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1)
rows = st.builds(
    Truth,
    file=names,
    usable=st.booleans(),
    fps=times,
    cuts_s=st.lists(times).map(tuple),
    speech_s=span_lists,
    groups=st.sampled_from([(), ("a",), ("a", "b")]),
    event_box=st.none() | st.tuples(times, times, times, times),
    notes=st.text("a,;\"'\n é"),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(rows, unique_by=lambda row: row.file))
def test_the_table_reads_back_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, rows: list[Truth]) -> None:
    folder = tmp_path_factory.mktemp("table")
    write_table(folder, rows)
    assert read_table(folder) == sorted(rows, key=lambda row: row.file)
