"""Cuts are exact to the frame and fades to three frames, and nothing else is taken for one."""

from pathlib import Path

import av
import numpy as np
import pytest

from tasks.cutting.shots import ScenesSettings, find_shots, shots_of_row
from tasks.media.container import MediaError
from tasks.stages.base import fingerprint

SETTINGS = ScenesSettings()
CUTS = ["cuts_plain.mp4", "cuts_beside.mp4", "cuts_nearer.mp4", "cuts_quick.mp4", "cuts_2997.mp4", "cuts_vfr.mp4"]


@pytest.mark.parametrize("name", CUTS)
def test_hard_cuts_are_exact_to_the_frame(world, name: str) -> None:
    truth = world.truth(name)
    shots = find_shots(world.path(name), SETTINGS).shots
    assert [shot.start_s for shot in shots[1:]] == pytest.approx(truth.cuts_s, abs=0.002)
    assert [shot.end_s for shot in shots[:-1]] == [shot.start_s for shot in shots[1:]]
    assert shots[-1].end_s == pytest.approx(truth.duration_s, abs=0.05)


@pytest.mark.parametrize("name", ["fades.mp4", "fade_and_cut.mp4"])
def test_fades_are_found_within_three_frames_of_the_middle_of_black(world, name: str) -> None:
    truth = world.truth(name)
    shots = find_shots(world.path(name), SETTINGS).shots
    expected = sorted([*truth.fades_s, *truth.cuts_s])
    assert [shot.start_s for shot in shots[1:]] == pytest.approx(expected, abs=3 / truth.fps)
    for shot in shots:
        assert (shot.clear_from_s > shot.start_s) == any(abs(shot.start_s - f) < 0.2 for f in truth.fades_s)
        assert (shot.clear_to_s < shot.end_s) == any(abs(shot.end_s - f) < 0.2 for f in truth.fades_s)


@pytest.mark.parametrize(
    "name", ["pan_no_cut.mp4", "pan_fast_no_cut.mp4", "shake.mp4", "frozen.mp4", "fps_60.mp4", "vfr_drops.mp4"]
)
def test_pans_shakes_flashes_and_freezes_are_not_cuts(world, name: str) -> None:
    (shot,) = find_shots(world.path(name), SETTINGS).shots
    assert shot.start_s == 0


def _film(path: Path, pictures: list[np.ndarray], rate: int = 30) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "ultrafast", "crf": "12"})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    return path


def _noise(seed: int, size: tuple[int, int] = (180, 320)) -> np.ndarray:
    import cv2

    coarse = np.random.default_rng(seed).integers(0, 255, (12, 20, 3), dtype=np.uint8)
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)


def test_doubled_frames_of_a_fast_pan_are_not_cuts_and_changes_of_still_images_are(tmp_path: Path) -> None:
    wide = _noise(0, (180, 700))
    # 10 different frames a second, each shown three times
    pan = [np.ascontiguousarray(wide[:, 16 * (k // 3) : 16 * (k // 3) + 320]) for k in range(54)]
    still = [_noise(seed) for seed in (1, 2, 3) for _ in range(20)]
    shots = find_shots(_film(tmp_path / "a.mp4", pan + still), SETTINGS).shots
    assert [round(shot.start_s * 30) for shot in shots] == [0, 54, 74, 94]


def test_black_at_either_end_is_not_clear_and_is_not_a_shot(tmp_path: Path) -> None:
    picture, black = _noise(0), np.zeros((180, 320, 3), np.uint8)
    up = [(picture * (k / 10)).astype(np.uint8) for k in range(1, 10)]
    (shot,) = find_shots(_film(tmp_path / "a.mp4", [black] * 10 + up + [picture] * 30 + [black] * 5), SETTINGS).shots
    assert (shot.start_s, round(shot.end_s * 30)) == (0, 54)
    assert round(shot.clear_from_s * 30) == 19
    assert round(shot.clear_to_s * 30) == 49
    (dark,) = find_shots(_film(tmp_path / "b.mp4", [black] * 30), SETTINGS).shots
    assert dark.clear_from_s >= dark.clear_to_s


@pytest.mark.parametrize("name", ["corrupt_frames.mp4", "corrupt_slices.mp4"])
def test_damage_ends_a_shot_and_is_counted(world, name: str) -> None:
    truth = world.truth(name)
    scenes = find_shots(world.path(name), SETTINGS)
    (hole,), ((start, end),) = scenes.holes, truth.corrupt_s
    assert (hole.start_s, hole.end_s) == pytest.approx((start, end), abs=0.002)
    before, after = scenes.shots
    assert (before.start_s, before.end_s) == pytest.approx((0, start), abs=0.002)
    assert (after.start_s, after.end_s) == pytest.approx((end, truth.duration_s), abs=0.002)
    assert scenes.bad_frames == round(sum(b - a for a, b in truth.corrupt_s) * truth.fps)
    assert scenes.frames + scenes.bad_frames == round(truth.duration_s * truth.fps)


def test_too_many_bad_frames_make_the_file_an_error(world) -> None:
    with pytest.raises(MediaError, match=r"140 of 150 frames cannot be decoded \(93%, at most 20% may\), the first at"):
        find_shots(world.path("corrupt_most.mp4"), SETTINGS)
    bad = find_shots(world.path("corrupt_frames.mp4"), SETTINGS)
    share = bad.bad_frames / (bad.frames + bad.bad_frames)
    with pytest.raises(MediaError, match="cannot be decoded"):
        find_shots(world.path("corrupt_frames.mp4"), ScenesSettings(max_bad_frames=share * 0.99))
    assert find_shots(world.path("corrupt_frames.mp4"), ScenesSettings(max_bad_frames=share)) == bad


@pytest.mark.parametrize("name", ["truncated.mkv", "truncated_index_first.mp4"])
def test_the_missing_end_of_a_truncated_file_is_a_hole(world, name: str) -> None:
    scenes = find_shots(world.path(name), SETTINGS)
    assert scenes.duration_s == pytest.approx(world.truth(name).duration_s, abs=0.05)
    assert scenes.holes[-1].end_s > scenes.duration_s + 1
    assert scenes.bad_frames <= 2  # the frame in which the file ends


def test_shots_can_be_read_back_from_the_ledger(world) -> None:
    import dataclasses

    import pyarrow as pa

    from tasks.cutting import shots as stage
    from tasks.execution.ledger import schema_for

    found = find_shots(world.path("corrupt_frames.mp4"), SETTINGS)
    schema = pa.schema([f for f in schema_for(stage.COLUMNS) if f.name in stage.COLUMNS])
    (row,) = pa.Table.from_pylist([dataclasses.asdict(found)], schema).to_pylist()
    assert shots_of_row(row) == (found.shots, found.holes)
    assert fingerprint("scenes", stage.VERSION, stage.backend_version(), SETTINGS)
