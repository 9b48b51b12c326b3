"""From shards to batches."""

import json
import logging
import shutil
import tarfile
import threading
from collections import Counter
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_manifests.dataset import DatasetManifest, ShardEntry, load
from data_manifests.sources import ManifestError
from data_manifests.storage import Storage
from tasks.media.frames import FrameCache, rgb_frames
from tasks.stages.latents.codec import CosineCodec
from tasks.synthetic.puppet_shards import LATENTS, make_puppets
from tasks.synthetic.puppets import GESTURES, Puppet
from tests.training.data.loading import loader, npy, repack, take
from training.config import ConditionDropout
from training.data.batch import Batch
from training.data.buckets import LoaderError
from training.data.loader import tiers_within

COUNT = 40
NEVER = ConditionDropout(text=0.0, audio=0.0, first_frame=0.0, last_frame=0.0)


@pytest.fixture(scope="module")
def puppets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short puppets and some of twice the length, in shards of two tiers. A third have unusable sound."""
    folder = tmp_path_factory.mktemp("puppets")
    parts = [
        make_puppets(folder, COUNT, 1, unusable=0.3, hq=0.25, samples_a_shard=9),
        make_puppets(folder, 10, 2, frames=65, samples_a_shard=6),
    ]
    DatasetManifest.of(parts[0].recipe, "puppets", [s for part in parts for s in part.shards]).write(
        Storage(str(folder))
    )
    return folder


def assert_same(one: Batch, other: Batch) -> None:
    for field in fields(Batch):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


def joined(parts: list[Batch]) -> Batch:
    def join(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        if isinstance(values[0], torch.Tensor):
            return torch.cat(values)
        return [item for value in values for item in value] if isinstance(values[0], list) else values[0]

    return Batch(**{field.name: join(field.name) for field in fields(Batch)})


def pictures(folder: Path, key: str) -> np.ndarray:
    """The frames of a sample's video, from its shard."""
    for shard in load(f"{folder}/dataset.json").shards:
        with tarfile.open(folder / shard.name) as tar:
            if f"{key}.mp4" in tar.getnames():
                tar.extract(f"{key}.mp4", folder / "videos", filter="data")
    return np.stack(list(rgb_frames(FrameCache(folder / "videos" / f"{key}.mp4").frames(), 25)))


def number_of(key: str) -> int:
    return int(key[:6])


# ---- what is in a batch ----


def test_a_batch_holds_what_the_puppets_are(puppets: Path) -> None:
    codec = CosineCodec(LATENTS.channels)
    short = loader(puppets, conditions=NEVER)
    seen = 0
    for batch in take(short, 5):
        assert (batch.fps, batch.frames) == (25.0, 33)
        assert batch.latents.shape == (8, LATENTS.channels, 9, 4, 4) and batch.latents.dtype == torch.float32
        assert batch.audio.shape == (8, 33, 4, 80) and batch.speaker_mask is None
        assert batch.text.shape == (8, 8, LATENTS.dim) and (batch.text_mask.sum(1) == 4).all()
        assert not batch.text[~batch.text_mask].any()
        for row, key in enumerate(batch.keys):
            assert (batch.audio[row].any() and not batch.drop_audio[row]) or not batch.audio_usable[row]
            if batch.tiers[row] == "main" and number_of(key) < 10:
                continue  # this number stands for a short and a long puppet
            puppet = Puppet.of(1, number_of(key))
            latent = batch.latents[row].numpy().swapaxes(0, 1)
            pictures = np.stack(list(codec.decode(list(latent), 32, 32)))
            assert np.abs(pictures.astype(float) - puppet.pictures).mean() < 10
            seen += 1
    assert seen > 20


def test_same_words_have_the_same_embedding_and_others_another(puppets: Path) -> None:
    texts: dict[str, torch.Tensor] = {}
    for batch in take(loader(puppets, tiers=("hq",), batch=10), 1):
        for key, text in zip(batch.keys, batch.text, strict=True):
            gesture = list(GESTURES)[number_of(key) % len(GESTURES)]
            assert torch.equal(texts.setdefault(gesture, text), text)
    assert len(texts) >= 4
    assert len({tuple(text.flatten().tolist()) for text in texts.values()}) == len(texts)


def test_sound_of_no_use_is_silenced_and_dropped(puppets: Path) -> None:
    batches = take(loader(puppets, conditions=NEVER), 12)
    together = joined(batches)
    assert 0.1 < (~together.audio_usable).float().mean() < 0.5
    assert torch.equal(together.drop_audio, ~together.audio_usable)
    assert not together.audio[~together.audio_usable].any()
    assert together.audio[together.audio_usable].flatten(1).any(1).all()


def test_conditions_are_dropped_as_often_as_asked_by_sample_and_epoch_alone(puppets: Path) -> None:
    often = ConditionDropout(text=0.5, audio=0.2, first_frame=0.8, last_frame=0.0)
    together = joined(take(loader(puppets, conditions=often), 60))
    assert together.drop_text.float().mean() == pytest.approx(0.5, abs=0.1)
    assert together.drop_first.float().mean() == pytest.approx(0.8, abs=0.1)
    assert together.drop_audio[together.audio_usable].float().mean() == pytest.approx(0.2, abs=0.1)
    assert not together.drop_last.any()

    def drops(batch: Batch) -> dict[tuple[int, str], tuple[bool, ...]]:
        flags = torch.stack([batch.drop_text, batch.drop_audio, batch.drop_first, batch.drop_last], 1).tolist()
        return {(epoch, key): tuple(row) for epoch, key, row in zip(batch.epochs, batch.keys, flags, strict=True)}

    one = drops(together)
    other = drops(joined(take(loader(puppets, conditions=often, batch=3, shuffle=7), 40)))
    common = one.keys() & other.keys()
    assert len(common) > 50 and all(one[sample] == other[sample] for sample in common)
    again = {key for (epoch, key) in one if (epoch, key) in one and (epoch + 1, key) in one}
    assert any(one[0, key] != one[1, key] for key in again if (0, key) in one and (1, key) in one)


def test_a_tier_is_its_own_shards_and_those_within_it(puppets: Path) -> None:
    assert tiers_within(["main", "hq"], "main") == ("main", "hq")
    assert tiers_within(["main", "hq"], "hq") == ("hq",)
    with pytest.raises(LoaderError, match="no tier 'best'; the recipe's tiers are main, hq"):
        tiers_within(["main", "hq"], "best")
    hq = loader(puppets, tiers=("hq",), batch=5)
    assert hq.samples == load(f"{puppets}/dataset.json").tiers["hq"].samples == 10
    both = joined(take(hq, 2))
    assert set(both.tiers) == {"hq"} and len(set(both.keys)) == 10
    assert loader(puppets).samples == COUNT + 10


def test_two_people_come_with_masks_and_sounds_of_their_own(tmp_path: Path) -> None:
    make_puppets(tmp_path, 4, 3, two=True, silent=0.0)
    (batch,) = take(loader(tmp_path, batch=4), 1)
    assert batch.latents.shape == (4, LATENTS.channels, 9, 4, 8)
    assert batch.audio.shape == (4, 2, 33, 4, 80) and batch.speaker_mask is not None
    assert batch.speaker_mask.shape == (4, 2, 9, 4, 8) and batch.speaker_mask.dtype == torch.bool
    assert batch.speaker_mask[:, 0, ..., :4].all() and not batch.speaker_mask[:, 0, ..., 4:].any()
    loudness = batch.audio.amax(dim=(3, 4)).numpy()
    for row, key in enumerate(batch.keys):
        puppet = Puppet.of(3, number_of(key), two=True)
        for person, heard in zip(puppet.people, loudness[row], strict=True):
            assert np.corrcoef(10 ** (1.2 * heard), person.opening)[0, 1] > 0.9


def test_where_a_speaker_is_is_told_for_each_latent_frame(tmp_path: Path) -> None:
    make_puppets(tmp_path, 2, 3, two=True)
    walking = np.zeros((33, 2, 4, 8), bool)
    for frame in range(33):
        walking[frame, 1, :, frame // 5] = True  # one column further every fifth frame

    repack(tmp_path, lambda members: [(i, npy(walking) if "speaker_mask" in i.name else d) for i, d in members])
    for seed in range(4):
        (batch,) = take(loader(tmp_path, batch=2, frames=(17,), seed=seed, latents=LATENTS), 1)
        assert batch.speaker_mask is not None and not batch.speaker_mask[:, 0].any()
        for row, where in enumerate(batch.speaker_mask[:, 1, :, 0].numpy()):
            # the window's first latent covers its first frame alone, each other one four frames
            began = [
                first
                for first in range(0, 17, 4)
                if np.array_equal(where[0], walking[first, 1, 0])
                and all(
                    np.array_equal(where[i], walking[first + 4 * i - 3 : first + 4 * i + 1, 1, 0].any(0))
                    for i in range(1, 5)
                )
            ]
            assert len(began) == 1, row


# ---- order, workers, resuming ----


def test_neither_threads_nor_workers_change_a_batch(puppets: Path) -> None:
    plain = take(loader(puppets, workers=1, ahead=1), 9)
    for threads in take(loader(puppets, workers=4, ahead=6), 9), take(loader(puppets, workers=3, ahead=2), 9):
        for one, other in zip(plain, threads, strict=True):
            assert_same(one, other)
    for ranks in (2, 3, 8):
        shares = zip(*(take(loader(puppets, rank=rank, ranks=ranks), 9) for rank in range(ranks)), strict=True)
        for one, parts in zip(plain, shares, strict=True):
            assert_same(one, joined(list(parts)))


def test_stopped_and_resumed_on_other_workers_it_goes_on_exactly(puppets: Path) -> None:
    undisturbed = take(loader(puppets), 18)
    given: list[Batch] = []
    state: dict[str, Any] | None = None
    for steps, ranks in ((3, 1), (4, 2), (0, 5), (5, 3), (6, 2)):
        loaders = [loader(puppets, rank=rank, ranks=ranks) for rank in range(ranks)]
        if state is not None:
            for each in loaders:
                each.load_state_dict(state)
        given += [joined(list(parts)) for parts in zip(*(take(each, steps) for each in loaders), strict=True)]
        states = [json.dumps(each.state_dict()) for each in loaders]
        assert len(set(states)) == 1, "the same on every worker"
        state = json.loads(states[0])
    for one, other in zip(undisturbed, given, strict=True):
        assert_same(one, other)


def test_the_state_is_of_what_was_given_not_of_what_was_made_ahead(puppets: Path) -> None:
    loaded = loader(puppets, ahead=4)
    batches = iter(loaded)
    first = [next(batches) for _ in range(2)]
    state = loaded.state_dict()
    assert state["batches"] == 2 and len(first) == 2
    following = next(batches)
    again = loader(puppets)
    again.load_state_dict(state)
    assert_same(following, take(again, 1)[0])


def test_an_epoch_gives_every_sample_once(puppets: Path) -> None:
    loaded = loader(puppets, batch=7)
    epochs: Counter[tuple[int, str]] = Counter()
    for batch in islice(loaded, 40):
        epochs.update(zip(batch.epochs, batch.keys, strict=True))
    assert max(epochs.values()) == 1
    for epoch in range(loaded.state_dict()["epoch"] - 1):
        assert sum(1 for e, _ in epochs if e == epoch) == COUNT + 10


def test_a_state_of_other_data_or_settings_is_refused(puppets: Path) -> None:
    state = loader(puppets).state_dict()
    for options, named in (
        ({"seed": 1}, "seed"),
        ({"tiers": ("hq",)}, "shards"),
        ({"batch": 4, "frames": (5,)}, "frames and batch"),
    ):
        with pytest.raises(LoaderError, match=f"made with other {named}"):
            loader(puppets, **options).load_state_dict(state)
    loader(puppets, workers=5, text_tokens=3, cache=None, rank=1, ranks=4).load_state_dict(state)


def test_a_loader_that_is_left_leaves_nothing_running(puppets: Path) -> None:
    before = set(threading.enumerate())
    loaded = loader(puppets, workers=3)
    for _batch in loaded:
        break
    batches = iter(loaded)
    next(batches)
    batches.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive(), thread.name


# ---- lengths and sizes ----


def test_clips_of_other_lengths_and_sizes_are_in_batches_of_their_own(puppets: Path, tmp_path: Path) -> None:
    shutil.copytree(puppets, tmp_path / "all")
    more = make_puppets(tmp_path / "more", 6, 9, size=48)
    for shard in more.shards:
        shutil.copy(tmp_path / "more" / shard.name, tmp_path / "all" / shard.name)
    manifest = load(f"{tmp_path}/all/dataset.json")
    DatasetManifest.of(manifest.recipe, "", [*manifest.shards, *more.shards]).write(Storage(str(tmp_path / "all")))
    shapes: Counter[tuple[int, ...]] = Counter()
    seen: Counter[tuple[int, str]] = Counter()
    loaded = loader(tmp_path / "all", frames=(33, 65), batch=5)
    for batch in islice(loaded, 48):
        shapes[tuple(batch.latents.shape[2:])] += 1
        seen.update(zip(batch.epochs, batch.keys, strict=True))
        assert batch.audio.shape[1] == batch.frames
    assert set(shapes) == {(9, 4, 4), (17, 4, 4), (9, 6, 6)}
    assert max(seen.values()) == 1 and sum(1 for epoch, _ in seen if epoch == 0) == COUNT + 16


def test_clips_that_are_too_short_or_of_another_rate_are_left_out_and_said(
    puppets: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        loaded = loader(puppets, frames=(65,), batch=5)
        together = joined(take(loaded, 2))
    assert set(together.tiers) == {"main"} and len(set(together.keys)) == 10
    assert loaded.left_out["shorter than 65 frames"] >= COUNT and loaded.bad == 0
    assert "shorter than 65 frames" in caplog.text
    other = loader(puppets, fps=24)
    with pytest.raises(LoaderError, match="no sample"):
        take(other, 1)
    assert other.left_out["25 frames a second, not 24"] == COUNT + 10


def test_a_window_inside_a_clip_is_what_encoding_its_frames_gives(tmp_path: Path) -> None:
    """Its first latent is of its first frame alone, and its sound is that of its frames."""
    make_puppets(tmp_path, 6, 2, frames=65, silent=0.0)  # windows of silence would all be equal
    without = joined(take(loader(tmp_path, batch=6), 4))
    cut = loader(tmp_path, batch=6, latents=LATENTS, cache=str(tmp_path / "cache"), conditions=NEVER)
    together = joined(take(cut, 4))
    whole = joined(take(loader(tmp_path, batch=6, frames=(65,)), 1))
    codec = CosineCodec(LATENTS.channels)
    clips = {key: pictures(tmp_path, key) for key in whole.keys}
    starts = set()
    for row, key in enumerate(together.keys):
        at = whole.keys.index(key)
        (start,) = [s for s in range(0, 33, 4) if torch.equal(whole.audio[at, s : s + 33], together.audio[row])]
        starts.add(start)
        again = [encoded.latent for encoded in codec.encode(clips[key][start : start + 33])]
        np.testing.assert_allclose(together.latents[row].numpy(), np.stack(again, axis=1), rtol=1e-3, atol=1e-4)
        if start == 0:
            assert torch.equal(together.latents[row], whole.latents[at, :, :9])
    assert len(starts) > 4
    assert all(
        torch.equal(b, whole.latents[whole.keys.index(k), :, :9])
        for k, b in zip(without.keys, without.latents, strict=True)
    )


# ---- manifests, indexes, stores ----


def test_what_is_asked_for_and_not_there_is_said_at_once(puppets: Path) -> None:
    for options, said in (
        ({"tiers": ("best",)}, "no samples of tier best; it has hq, main"),
        ({"frames": (32,)}, "4n [+] 1"),
        ({"rank": 2, "ranks": 2}, "worker 2 of 2"),
        ({"batch": 2, "ranks": 3}, "no part in a batch of 2"),
    ):
        with pytest.raises(LoaderError, match=said):
            loader(puppets, **options)
    with pytest.raises(ManifestError, match="no such dataset manifest"):
        loader("/nowhere")


def test_an_index_that_is_kept_saves_reading_the_headers(puppets: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = take(loader(puppets, cache=str(cache)), 4)
    kept = sorted((cache / "index").iterdir())
    shards: list[ShardEntry] = load(f"{puppets}/dataset.json").shards
    assert {path.stem for path in kept} == {shard.sha256 for shard in shards}
    before = kept[0].read_text()
    kept[0].write_text("{}")
    kept[1].write_text(kept[1].read_text().replace('"mp4":', '"mp5":1,"mp4":'))
    for one, other in zip(first, take(loader(puppets, cache=str(cache)), 4), strict=True):
        assert_same(one, other)
    assert kept[0].read_text() == before  # made again


def test_an_object_store_gives_the_same_batches(puppets: Path, s3_folder: str) -> None:
    store = Storage(s3_folder)
    for path in [*sorted((puppets / "shards").glob("*.tar")), puppets / "dataset.json"]:
        store.write_bytes(str(path.relative_to(puppets)), path.read_bytes())
    remote = loader(s3_folder, cache=f"{s3_folder}/cache", latents=LATENTS)
    for one, other in zip(take(loader(puppets, latents=LATENTS), 6), take(remote, 6), strict=True):
        assert_same(one, other)
    assert Storage(f"{s3_folder}/cache").files("index")


# ---- batches ----


def test_a_batch_is_split_in_order_and_moved_as_a_whole(puppets: Path) -> None:
    (batch,) = take(loader(puppets), 1)
    assert_same(joined(batch.split(3)), batch)
    assert [len(part) for part in batch.split(3)] == [3, 3, 2]
    half = batch.to("cpu", torch.bfloat16)
    assert half.latents.dtype == half.text.dtype == half.audio.dtype == torch.bfloat16
    assert half.weight.dtype == torch.float32 and half.text_mask.dtype == torch.bool
    assert half.keys == batch.keys
    meta = batch.to("meta")
    assert meta.latents.device.type == meta.drop_text.device.type == "meta"
