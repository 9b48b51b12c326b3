"""SyncNet and its pipeline: equal to the reference, and known offsets found with hand-made weights."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import soundfile
import torch

from data_manifests.strict import RecipeError, validate
from tasks.media.clip import SAMPLE_RATE, Clip, ClipRecord, Measurement
from tasks.networks import face_crop, s3fd, syncnet
from tasks.networks.face_crop import FaceCropTrack
from tasks.networks.lip_scores import lip_scores
from tasks.networks.mfcc import mfcc
from tasks.stages.sync.backends import FollowedFace
from tasks.stages.sync.stage import Sync, SyncSettings
from tasks.weights import store as weights
from tests import tiny_weights
from tests.parity import arrays, filled, needs_parity, shapes

FRAMES = 62  # 2.48 s
LATE_S = 0.2


@pytest.fixture(scope="module")
def network() -> syncnet.SyncNet:
    network = syncnet.SyncNet()
    network.load_state_dict(filled(network.state_dict()))
    return syncnet.ready(network)


@pytest.fixture(scope="module")
def detector() -> s3fd.S3FD:
    network = s3fd.S3FD()
    network.load_state_dict(filled(network.state_dict()))
    return s3fd.ready(network)


def near(found: Any, known: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(found), known, rtol=1e-4, atol=1e-5 * float(np.abs(known).max()))


def enlarged(small: np.ndarray, rows: int) -> np.ndarray:
    return small.repeat(8, axis=rows).repeat(8, axis=rows + 1)


@needs_parity
def test_the_published_keys_are_expected_and_no_others(tmp_path: Path) -> None:
    assert syncnet.expected_shapes(tmp_path) == shapes("syncnet/keys.json")
    assert s3fd.expected_shapes(tmp_path) == shapes("syncnet/keys_s3fd.json")


@needs_parity
def test_embeddings_of_lips_and_audio_equal_the_reference(network: syncnet.SyncNet) -> None:
    known = arrays("syncnet/unit.npz")
    pictures = torch.from_numpy(enlarged(known["lip_in_28"], 3)).float()
    with torch.inference_mode():
        near(network.sound(torch.from_numpy(known["audio_in"])), known["audio_out"])
        near(network.lips(pictures)[:, 0], known["lip_out"])
        near(network.lip_features(pictures)[:, 0], known["lipfeat_out"])


@needs_parity
def test_the_evaluation_equals_the_reference(network: syncnet.SyncNet, monkeypatch: pytest.MonkeyPatch) -> None:
    known = arrays("syncnet/evaluate.npz")
    pictures = enlarged(known["frames_28"], 1)[..., ::-1]
    columns = mfcc(known["audio_int16"])
    near(columns, known["mfcc"])
    lips, windows = syncnet.lip_vectors(network, pictures), int(known["lastframe"])
    near(lips[:windows], known["lip_feat"])
    near(syncnet.sound_vectors(network, columns, windows), known["aud_feat"])
    monkeypatch.setattr(syncnet, "lip_vectors", lambda network, pictures, batch=16: lips)  # computed once, above
    fit = syncnet.evaluate(network, pictures, known["audio_int16"])
    near(fit.distances, known["dists"])
    near(fit.mean_distances, known["mdist"])
    assert fit.offset == known["offset"] == 15
    assert fit.distance == pytest.approx(419.1491, rel=1e-6)
    assert fit.confidence == pytest.approx(1.09802, abs=1e-4)
    np.testing.assert_allclose(fit.confidences, known["fconfm"], atol=1e-5 * float(known["dists"].max()))


@needs_parity
@pytest.mark.parametrize("offset", [-4, 0, 3])
def test_the_metric_finds_the_offset_of_the_fixture(offset: int) -> None:
    known = arrays("syncnet/evaluate.npz")
    lips, sound = (torch.from_numpy(known[name]) for name in ("metric_lip", f"metric_aud_k{offset}"))
    fit = syncnet.zero_padded(lips, sound, 15)
    near(fit.mean_distances, known[f"metric_k{offset}_mdist"])
    assert fit.offset == known[f"metric_k{offset}_offset"] == offset
    assert fit.distance == pytest.approx(float(known[f"metric_k{offset}_minval"]), rel=1e-5)
    assert fit.confidence == pytest.approx(float(known[f"metric_k{offset}_conf"]), rel=1e-5)
    better = syncnet.overlapping(lips, sound, 15)
    assert better.offset == offset
    assert better.distance <= fit.distance
    assert np.isnan(better.distances).sum() == 2 * sum(range(1, 16))


@needs_parity
def test_tracks_and_crops_equal_the_reference() -> None:
    known = arrays("syncnet/track.npz")
    frames, boxes = known["det_frame"], known["det_bbox"]
    (track,) = face_crop.tracks([boxes[frames == number] for number in range(frames.max() + 1)])
    np.testing.assert_array_equal(np.arange(track.first, track.last + 1), known["track0_frames"])
    near(track.boxes, known["track0_bbox"])
    known = arrays("syncnet/crop.npz")
    places = face_crop.smoothed(known["bbox"])
    near(places, np.stack([known[name] for name in "xys"], axis=1))
    for place, (border, *edges) in zip(places, known["rect_pad_y0y1x0x1"], strict=True):
        assert face_crop.window(place) == tuple(int(edge - border) for edge in edges)
    cut = list(face_crop.crops([known["image"]] * 40, FaceCropTrack(5, known["bbox"])))
    assert len(cut) == 30
    for number in (0, 15, 29):
        assert np.abs(cut[number].astype(int) - known[f"crop_f{number}"]).max() <= 2


@needs_parity
def test_the_detectors_heads_and_detections_equal_the_reference(detector: s3fd.S3FD) -> None:
    known = arrays("syncnet/s3fd_heads.npz")
    image = torch.from_numpy(known["image_rgb"]).permute(2, 0, 1)[None].float()
    with torch.inference_mode():
        less_mean = image - torch.tensor((123.0, 117.0, 104.0))[:, None, None]
        near(less_mean[0, :, ::8, ::8], known["net_input_every8"])
        boxes, scores = detector.heads(less_mean)
        places, faces = (each[0].numpy() for each in detector(image))
    for level in range(6):
        near(boxes[level], known[f"loc{level}"])
        near(scores[level], known[f"conf{level}"])
    rows = np.column_stack([faces, places / (128, 96, 128, 96)])
    for kept in known["detections_class1_first60"]:
        assert np.abs(rows - kept).max(axis=1).min() < 1e-5


def test_a_crop_is_grey_beyond_the_frame() -> None:
    image = np.full((100, 100, 3), 200, np.uint8)
    corner = face_crop.cut_face(image, np.array([5.0, 5.0, 40.0]))
    assert corner.shape == (224, 224, 3)
    assert (corner[0, 0] == 110).all() and (corner[-1, -1] == 200).all()
    assert (face_crop.cut_face(image, np.array([-500.0, 50.0, 30.0])) == 110).all()
    assert face_crop.cut_face(image, np.array([50.0, 99.9, 60.0])).shape == (224, 224, 3)


def test_gaps_in_a_track_are_bridged_up_to_a_second() -> None:
    boxes = np.tile(np.array([10.0, 10.0, 50.0, 60.0]), (200, 1)) + np.arange(200)[:, None]
    boxes[60:84] = boxes[120:150] = np.nan
    track = face_crop.followed(boxes, 90)
    assert track is not None
    assert (track.first, track.last) == (0, 119)
    np.testing.assert_allclose(track.boxes[70], [80, 80, 120, 130])
    assert face_crop.followed(boxes, 96) is None
    assert face_crop.followed(np.full((9, 4), np.nan), 0) is None


def test_a_batch_gets_the_outputs_of_each_item_alone(network: syncnet.SyncNet, detector: s3fd.S3FD) -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (8, 224, 224, 3), np.uint8)
    together = syncnet.lip_vectors(network, pictures, batch=3)
    alone = torch.cat([syncnet.lip_vectors(network, pictures[at : at + 5]) for at in range(4)])
    near(together, alone.numpy())
    columns = rng.normal(0, 9, (44, 13))
    many = syncnet.sound_vectors(network, columns, 7)
    near(many, torch.cat([syncnet.sound_vectors(network, columns[4 * at :], 1) for at in range(7)]).numpy())
    assert syncnet.lip_vectors(network, pictures[:4]).shape == (0, 1024)
    with pytest.raises(ValueError, match="44 MFCC columns are too few for 8 windows"):
        syncnet.sound_vectors(network, columns, 8)
    images = [*rng.integers(0, 256, (3, 90, 120, 3), np.uint8)]
    each = [s3fd.faces(detector, [image], 1.0, 0.5)[0] for image in images]
    for one, other in zip(s3fd.faces(detector, images, 1.0, 0.5), each, strict=True):
        assert len(one) == len(other) > 0
        np.testing.assert_allclose(one[0], other[0], rtol=1e-4, atol=1e-3)


def test_every_window_of_a_short_clip_is_compared(network: syncnet.SyncNet, monkeypatch: pytest.MonkeyPatch) -> None:
    lips = torch.from_numpy(np.random.default_rng(0).normal(0, 9, (30, 1024)).astype(np.float32))
    monkeypatch.setattr(syncnet, "lip_vectors", lambda network, pictures, batch=16: lips)
    samples = np.random.default_rng(1).normal(0, 1000, 34 * 640)
    assert len(syncnet.compare_windows(network, (), samples).distances) == 30
    assert len(syncnet.evaluate(network, (), samples).distances) == 29
    with pytest.raises(ValueError, match="29 windows are too few for offsets of 15 frames either way"):
        syncnet.compare_windows(network, (), samples[:-1])
    with pytest.raises(ValueError, match="shorter than 6 frames"):
        syncnet.evaluate(network, (), samples[: 5 * 640])


@pytest.fixture(scope="module")
def speech(world: Any) -> np.ndarray:
    """[samples] float32, 2.7 s of speech."""
    import av

    with av.open(str(world.path("talk_office.mp4"))) as container:
        resampler = av.AudioResampler("flt", "mono", SAMPLE_RATE)
        frames = [out.to_ndarray()[0] for frame in container.decode(audio=0) for out in resampler.resample(frame)]
    return np.concatenate(frames)[: (FRAMES + 5) * 640]


@pytest.fixture(scope="module")
def made(speech: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A weights folder, and the brightness of each frame that fits the speech by its SyncNet: [frames], 0 to 255."""
    folder = tmp_path_factory.mktemp("weights")
    tiny_weights.s3fd(folder / "s3fd")
    return folder, tiny_weights.syncnet(folder / "syncnet", speech)


@pytest.fixture
def clip_at(
    made: tuple[Path, np.ndarray], speech: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[int], Clip]]:
    """Makes a clip of a given frame rate. The brightness of its frames fits its speech, which is late by LATE_S."""
    import av

    folder, brightness = made
    monkeypatch.setenv("UNDERSTUDY_WEIGHTS", str(folder))

    def clip(fps: int) -> Clip:
        frames = FRAMES * fps // 25
        levels = brightness[((np.arange(frames) + 0.5) * 25 / fps).astype(int)]
        with av.open(str(tmp_path / "clip.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "qp": "10"})
            stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
            for level in levels:
                picture = np.full((120, 160, 3), round(float(level)), np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        length, late = round(frames * SAMPLE_RATE / fps), round(LATE_S * SAMPLE_RATE)
        samples = np.concatenate([np.zeros(late, np.float32), speech])[:length]
        soundfile.write(tmp_path / "clip.flac", samples, SAMPLE_RATE, subtype="PCM_16")
        boxes = np.tile(np.array([0.25, 0.3, 0.75, 0.8], np.float32), (frames, 1))
        boxes[10:15] = np.nan
        record = ClipRecord("c", "s", 0.0, frames / fps, fps, frames, 160, 120, "", "")
        found = {"identity": Measurement({}, {"face_box": boxes})}
        return Clip(record, tmp_path / "clip.mp4", tmp_path / "clip.flac", found=found)

    yield clip


def test_the_stage_finds_late_audio_at_24_frames_a_second(clip_at: Callable[[int], Clip]) -> None:
    stage = Sync(SyncSettings(backend="syncnet", min_s=2.0))
    stage.check()
    assert stage.backend_version().startswith(f"syncnet {weights.digest('syncnet')}, torch ")
    assert (
        f"opencv {cv2.__version__}" in stage.backend_version()
    )  # the one that is imported, whichever package it is from
    clip = clip_at(24)
    track = FollowedFace()(clip, 50)
    assert track is not None
    assert len(track.boxes) == len(list(clip.frames(rate=25))) == 61
    found: dict[str, Any] = stage.measure(clip).columns
    assert found["offset_s"] == pytest.approx(LATE_S, abs=1e-9)
    assert found["reason"] == ""
    assert found["confidence"] > 20
    assert found["distance"] < 10
    seen = clip.found["identity"].arrays["face_box"].copy()
    seen[49:] = np.nan  # 44 frames are left
    hidden = dataclasses.replace(clip, found={"identity": Measurement({}, {"face_box": seen})})
    assert stage.measure(hidden).columns == {**dict.fromkeys(Sync.columns), "reason": "no face"}


@pytest.mark.slow
def test_the_stage_can_detect_the_face_itself(clip_at: Callable[[int], Clip]) -> None:
    settings = SyncSettings(backend="syncnet", faces="s3fd", min_s=2.0)
    stage = Sync(settings)
    stage.check()
    assert stage.networks() == ("syncnet", "s3fd")
    assert Sync.needed(settings) == ()
    assert f"s3fd {weights.digest('s3fd')}" in stage.backend_version()
    found: dict[str, Any] = stage.measure(dataclasses.replace(clip_at(25), found={})).columns
    assert found["offset_s"] == pytest.approx(LATE_S, abs=1e-9)
    assert found["confidence"] > 20


def test_a_videos_figures_come_with_their_tracks_and_failures(
    made: tuple[Path, np.ndarray], speech: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, brightness = made
    monkeypatch.setenv("UNDERSTUDY_WEIGHTS", str(folder))
    network = syncnet.load()
    video = np.tile(np.round(brightness)[:60, None, None, None], (1, 64, 64, 3)).astype(np.uint8)

    def faces(images: Any) -> list[np.ndarray]:
        return [np.array([[10.0, 10.0, 50.0, 50.0, 0.99]])] * len(images)

    samples = speech[: 60 * 640] * 32768
    found = lip_scores(
        network, faces, lambda: video, samples, min_track=50, min_face=30, measure=syncnet.compare_windows
    )
    (track,) = found.tracks
    assert (track.first, track.last, track.offset, found.offset) == (0, 59, 0, 0)
    assert (found.sync_c, found.sync_d) == (track.sync_c, track.sync_d)
    assert track.sync_c > 20 > 10 > track.sync_d
    assert found.failures == ()
    published = lip_scores(network, faces, lambda: video, samples)
    assert (published.sync_c, published.sync_d, published.offset, published.tracks) == (None, None, None, ())
    assert (published.min_track, len(published.failures)) == (100, 1)
    cut = lip_scores(network, faces, lambda: video[:30], samples, shots=(0, 15), min_track=13, min_face=30)
    assert [(track.first, track.last) for track in cut.tracks] == [(0, 14), (15, 29)]
    mute = lip_scores(network, faces, lambda: video[:14], samples[:100], min_track=13, min_face=30)
    assert mute.failures == ("frames 0 to 13: frames and audio together are shorter than 6 frames",)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERSTUDY_WEIGHTS", str(tmp_path))
    stage = Sync(SyncSettings(backend="syncnet", faces="s3fd"))
    with pytest.raises(weights.MissingBackend, match=r"syncnet_v2\.model; looked in .*backend `lips` serves"):
        stage.check()
    state = {key: torch.zeros(()).expand(shape) for key, shape in syncnet.expected_shapes(tmp_path).items()}
    del state["netfclip.3.bias"]
    (tmp_path / "syncnet").mkdir()
    torch.save(state, tmp_path / "syncnet" / "syncnet_v2.model")
    with pytest.raises(weights.WrongWeights, match=r"1 missing \(netfclip\.3\.bias\)"):
        stage.check()
    with pytest.raises(weights.WrongWeights, match=r"1 missing \(netfclip\.3\.bias\)"):
        syncnet.load()
    torch.save({"run": Path("here")}, tmp_path / "syncnet" / "syncnet_v2.model")
    with pytest.raises(weights.WrongWeights, match="cannot be read as weights alone"):
        stage.check()


def test_each_backend_has_its_own_defaults_and_settings() -> None:
    assert (SyncSettings().max_offset_s, SyncSettings().natural_s) == (1.5, -0.03)
    one = validate(SyncSettings, {"backend": "syncnet"}, "here")
    assert (one.max_offset_s, one.natural_s, one.faces) == (0.6, 0.0, "identity")
    assert SyncSettings(backend="syncnet", max_offset_s=0.4).max_offset_s == 0.4
    with pytest.raises(RecipeError, match="faces can be set for backend 'syncnet' only, not 'lips'"):
        validate(SyncSettings, {"faces": "s3fd"}, "here")
    with pytest.raises(RecipeError, match=r"unknown backend 'sfd'; did you mean 's3fd'\?"):
        validate(SyncSettings, {"backend": "syncnet", "faces": "sfd"}, "here")
