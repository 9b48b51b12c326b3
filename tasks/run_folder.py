"""A finished curation, read from its output folder alone and without changing anything in it."""

import contextlib
import csv
import dataclasses
import difflib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from data_manifests.dataset import DatasetManifest, NoDataset, load
from data_manifests.sources import ManifestError
from data_manifests.storage import Storage
from data_manifests.strict import RecipeError
from tasks.clip import Clip, ClipRecord
from tasks.findings import DamagedFile, Finding
from tasks.ledger import Ledger, LedgerError, partition_of
from tasks.media import MediaError
from tasks.outcome import SKIPPED_COLUMNS, Line, clip_lines, source_lines, steps_file
from tasks.policy import decide, funnel, join
from tasks.recipe import Recipe, recipe_of
from tasks.rules import Policy
from tasks.stages import STAGES

if TYPE_CHECKING:
    import pandas as pd


_LIKELY = 100  # clips that a misspelt name is held against
_CLIP_COLUMNS = ["uri", "start_s", "end_s", "duration_s", "video", "audio_file"]  # of clips.parquet


class Refused(ValueError):
    """What was asked of a run cannot be done; one message for whoever asked, that says what could be."""


class UnreadableRun(Refused):
    """An output folder that cannot be read as a finished run; the message says what is missing and what to do."""


class _FrozenLedger(Ledger):
    """A ledger that is only looked at: a damaged file stays where it is."""

    def _move_aside(self, name: str, reason: str) -> None:
        place = f"{self.storage.address.rstrip('/')}/{name}"
        raise LedgerError(f"{place} is damaged ({reason}); run `understudy curate` again, which makes its rows anew")


class RunFolder:
    """What a run of `understudy curate` left at an address, as it stood when the run ended.

    storage, manifest, recipe: where it lies, its dataset manifest and the recipe that made it.
    sources: the rows of sources.csv; `duration_s` a float where it is known.
    frame: one row a clip as tasks.policy.join makes it, with the columns that deciding needs, and `clips.uri`. Other
        columns are read when they are asked for (`columns`, `frame_for`), since a stage may have long texts.
    decisions: what tasks.policy.decide says of them.

    Raises UnreadableRun when the folder is not there, unfinished, incomplete or damaged.
    """

    def __init__(self, address: str) -> None:
        self.address = address.removesuffix("dataset.json").rstrip("/") or ("/" if address.startswith("/") else ".")
        self.storage = self._open()
        try:
            self.manifest: DatasetManifest = load(f"{self.address}/dataset.json")
            self.recipe = self._read_recipe()
            self.steps = self._read_json(steps_file(self.manifest.recipe.hash))
            self.sources = self._read_sources()
            self.ledger = _FrozenLedger(self.storage, self.recipe.shards.partitions)
            lacking = [name for name in ("scenes", "clips", *self.recipe.measure) if name not in self.steps]
            if lacking:
                raise UnreadableRun(f"{steps_file(self.manifest.recipe.hash)} lacks {lacking[0]}")
            self.stages = list(self.recipe.measure)
            self.frame = self._read_frame(self.recipe.policy.columns())
        except NoDataset:
            raise UnreadableRun(
                f"{self.address}: no finished run lies here (there is no dataset.json); "
                "give the folder that `understudy curate --out` wrote to, or let that run end first"
            ) from None
        except ManifestError as error:
            raise UnreadableRun(str(error)) from None
        except FileNotFoundError as error:
            raise UnreadableRun(self._incomplete(f"{error.filename or error} is gone")) from None
        except UnreadableRun as error:
            raise UnreadableRun(self._incomplete(str(error))) from None
        except RecipeError as error:
            raise UnreadableRun(f"{error}\nthe run was made by another version; curate with this one first") from None
        except (LedgerError, OSError) as error:
            raise UnreadableRun(str(error)) from error
        self.decisions = decide(self.frame, self.recipe.policy, self.stages)

    def _open(self) -> Storage:
        try:
            return Storage(self.address)
        except (ValueError, ImportError) as error:
            raise UnreadableRun(f"{self.address}: no address that can be read: {error}") from None

    def _incomplete(self, what: str) -> str:
        return f"{self.address}: {what}; run `understudy curate` into it again, which costs only what is missing"

    # ---- what the folder says ----

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads(self.storage.read_bytes(name))
        except ValueError as error:
            raise UnreadableRun(f"{name} is damaged ({error})") from None
        if not isinstance(content, dict):
            raise UnreadableRun(f"{name} is damaged (not a JSON object)")
        return content

    def _read_recipe(self) -> Recipe:
        name = f"recipes/{self.manifest.recipe.hash}.json"
        return recipe_of(self._read_json(name), f"{self.address}/{name}")

    def _read_sources(self) -> list[dict[str, Any]]:
        text = self.storage.read_bytes("sources.csv").decode("utf-8", "surrogateescape")
        try:
            reader = csv.DictReader(io.StringIO(text, newline=""))
            if not {"uri", "where", "status", "reason", "source_id", "duration_s"} <= set(reader.fieldnames or ()):
                raise ValueError("it lacks columns")
            rows: list[dict[str, Any]] = list(reader)
            for row in rows:
                row["duration_s"] = float(row["duration_s"]) if row["duration_s"] else None
        except (csv.Error, ValueError) as error:
            raise UnreadableRun(f"sources.csv is damaged ({error})") from None
        return rows

    def _read_frame(self, needed: Mapping[str, Sequence[str]]) -> "pd.DataFrame":
        """needed: by stage, the columns beside the status and the error."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            file = pq.ParquetFile(pa.BufferReader(self.storage.read_bytes("clips.parquet")))
            wanted = ["clip_id", *_CLIP_COLUMNS, *(f"{name}.status" for name in self.stages)]
            lacking = [name for name in wanted if name not in file.schema_arrow.names]
            if lacking:
                raise UnreadableRun(f"clips.parquet has no column {lacking[0]!r}")
            clips = file.read(columns=wanted).to_pandas(split_blocks=True, self_destruct=True).set_index("clip_id")
        except pa.ArrowException as error:
            raise UnreadableRun(f"clips.parquet is damaged ({error})") from None
        self._counted = {name: clips.index[clips[f"{name}.status"].notna()] for name in self.stages}
        tables = {name: self._read_table(name, ["status", "error", *needed.get(name, ())]) for name in self.stages}
        return join(clips[_CLIP_COLUMNS].rename(columns={"audio_file": "audio"}), tables)

    def _read_table(self, stage: str, columns: Sequence[str], partition: int | None = None) -> "pd.DataFrame":
        table = self.ledger.read(stage, self.steps[stage], partition, columns)
        # rows of the ledger that the run did not count: of footage no longer listed, or made from another caption
        return table[table["key"].isin(self._counted[stage])]

    def columns(self, stage: str, names: Sequence[str], partition: int | None = None) -> "pd.DataFrame":
        """Columns of the clips that a stage has a row for, by clip_id; of one partition, or of all. Raises
        UnreadableRun."""
        try:
            return self._read_table(stage, names, partition).set_index("key")
        except (LedgerError, OSError) as error:
            raise UnreadableRun(str(error)) from error

    def frame_for(self, policy: Policy) -> "pd.DataFrame":
        """`frame`, with the columns that deciding by another policy needs as well. Raises UnreadableRun."""
        import pandas as pd

        parts = [self.frame]
        for stage, names in policy.columns().items():
            missing = [name for name in names if stage in self.stages and f"{stage}.{name}" not in self.frame]
            if missing:
                parts.append(self.columns(stage, missing).reindex(self.frame.index).add_prefix(f"{stage}."))
        return pd.concat(parts, axis=1)

    @cached_property
    def skipped(self) -> "pd.DataFrame":
        """The parts of the footage that no clip shows: `key` (source_id), reason, start_s, end_s."""
        return self.ledger.read_list("clips", self.steps["clips"], "skipped", None, SKIPPED_COLUMNS)

    def funnel(self) -> list[Line]:
        """(what, how many, hours), as the run told it at its end."""
        table = funnel(self.frame, self.decisions, self.recipe.policy, self.stages)
        return [*source_lines(self.sources, self.skipped), *clip_lines(table)]

    def problems(self) -> list[tuple[str, str]]:
        """(where, why) for each row of the manifest, source and clip that ended in an error."""
        rows = [row for row in self.sources if row["status"] in ("error", "bad row")]
        failed = self.decisions[self.decisions["verdict"] == "error"]
        return [(row["uri"] or row["where"], row["reason"]) for row in rows] + [
            (clip_id, f"{stage}: {error}")
            for clip_id, stage, error in zip(failed.index, failed["stage"], failed["error"], strict=True)
        ]

    # ---- single clips ----

    def find(self, prefix: str) -> str:
        """The clip_id that is `prefix`, or the only one that begins with it. Raises Refused."""
        if prefix in self.frame.index:
            return prefix
        found = [clip_id for clip_id in self.frame.index if clip_id.startswith(prefix)]
        if len(found) == 1:
            return str(found[0])
        if found:
            raise Refused(f"{len(found)} clips begin with {prefix!r}, such as {found[0]} and {found[1]}; give more")
        near = self._nearest(prefix)
        hint = f"did you mean {near}?" if near else "clips.parquet lists them"
        raise Refused(f"no clip of {self.address} begins with {prefix!r}; {hint}")

    def _nearest(self, prefix: str) -> str:
        """The clip_id whose beginning is most like `prefix`, among those beside it in their order and those that end
        like it; "" where none is much alike."""
        index = self.frame.index  # sorted
        at = int(index.searchsorted(prefix))
        beside = [str(clip_id) for clip_id in index[max(0, at - _LIKELY) : at + _LIKELY]]
        ending = [str(clip_id) for clip_id in index[index.str.endswith(prefix[-8:])][:_LIKELY]] if prefix else []
        begins = {clip_id[: len(prefix)]: clip_id for clip_id in [*beside, *ending]}
        found = difflib.get_close_matches(prefix, list(begins), n=1, cutoff=0.6)
        return begins[found[0]] if found else ""

    def clips(self, clip_ids: Iterable[str], remade: bool = True) -> Iterator[tuple[ClipRecord, list[Finding]]]:
        """Records and findings of these clips, in their order.

        remade: whether the picture, size and sound are those that a stage such as the crop has given the clip.
        """
        wanted = list(dict.fromkeys(clip_ids))
        records, findings = self._of_partitions(wanted)
        names = [f.name for f in dataclasses.fields(ClipRecord) if f.name != "metadata"]
        for clip_id in wanted:
            if clip_id not in records:
                raise UnreadableRun(self._incomplete(f"the ledger has no clip {clip_id}"))
            record = ClipRecord(**{name: records[clip_id][name] for name in names})
            ours = findings.get(clip_id, [])
            for finding in ours:
                if remade and STAGES[finding.stage].remakes_clip:
                    record = finding.remake(record)
            yield record, ours

    def _of_partitions(self, clip_ids: list[str]) -> tuple[dict[str, dict[str, Any]], dict[str, list[Finding]]]:
        """The ledger's rows for some clips, from the partitions they lie in."""
        wanted = set(clip_ids)
        records: dict[str, dict[str, Any]] = {}
        findings: dict[str, list[Finding]] = {}
        for partition in sorted({partition_of(clip_id, self.recipe.shards.partitions) for clip_id in clip_ids}):
            for row in self.ledger.rows("clips", self.steps["clips"], partition, {clip_id[:16] for clip_id in wanted}):
                records |= {clip["clip_id"]: clip for clip in row["clips"] or () if clip["clip_id"] in wanted}
            for stage in self.stages:
                for row in self.ledger.rows(stage, self.steps[stage], partition, wanted):
                    clip_id = row["key"]
                    if self.frame.at[clip_id, f"{stage}.status"] == row["status"] == "ok":
                        finding = Finding.of(stage, self.steps[stage], row, STAGES[stage].columns)
                        findings.setdefault(clip_id, []).append(finding)
        return records, findings

    @contextlib.contextmanager
    def open(self, record: ClipRecord, findings: Iterable[Finding] = ()) -> Iterator[Clip]:
        """The clip with its files at hand and what was found in it. Raises UnreadableRun for a file gone or damaged."""
        from soundfile import SoundFileError

        found = {finding.stage: finding.measurement(self.storage, record.clip_id) for finding in findings}
        with contextlib.ExitStack() as files:
            for name in filter(None, (record.video, record.audio)):
                if not self.storage.exists(name):
                    raise UnreadableRun(f"{self.address}: {name} is gone; curate with --retry-errors makes it again")
            video = files.enter_context(self.storage.local(record.video))
            audio = files.enter_context(self.storage.local(record.audio)) if record.audio else None
            try:
                yield Clip(record, video, audio, found)
            except (MediaError, SoundFileError, DamagedFile) as error:
                raise UnreadableRun(
                    f"{self.address}: a file of clip {record.clip_id} is damaged ({error}); "
                    "delete it, and curate with --retry-errors makes it again"
                ) from None
