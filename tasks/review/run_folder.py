"""A finished run of `understudy curate`, read from its output folder. Nothing in the folder is changed."""

import contextlib
import csv
import dataclasses
import difflib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from data_manifests.dataset import DatasetManifest, NoDataset, load
from data_manifests.sources import ManifestError
from data_manifests.storage import Storage
from data_manifests.strict import RecipeError
from tasks.execution.ledger import Ledger, LedgerError, partition_of
from tasks.execution.ledger_view import LedgerView
from tasks.execution.outcome import steps_file
from tasks.execution.stage_results import DamagedFile, StageResult
from tasks.media.clip import Clip, ClipRecord
from tasks.media.container import MediaError
from tasks.policy.decide import decide, funnel
from tasks.policy.rules import Policy
from tasks.recipe import Recipe, parse_curation
from tasks.review.funnel import FunnelLine, clip_lines, list_problems, source_lines
from tasks.review.refusal import Refused

if TYPE_CHECKING:
    import pandas as pd


_NEARBY = 100  # a misspelt clip_id is compared with so many clips before it, after it, and with its ending
_CLIP_COLUMNS = ["uri", "start_s", "end_s", "duration_s", "video", "audio_file"]  # of clips.parquet


class UnreadableRun(Refused):
    """An output folder that cannot be read as a finished run. The message says what is missing and what to do."""


class _FrozenLedger(Ledger):
    """A ledger that is only read. A damaged file stays where it is, and reading it raises LedgerError."""

    def _move_aside(self, name: str, reason: str) -> None:
        address = f"{self.storage.address.rstrip('/')}/{name}"
        raise LedgerError(f"{address} is damaged ({reason}); run `understudy curate` again, which makes its rows anew")


class RunFolder(LedgerView):
    """The output folder of a run of `understudy curate`, as it stood when the run ended.

    Raises UnreadableRun when there is no finished run in the folder, or when files of the run are missing or damaged.
    """

    def __init__(self, address: str) -> None:
        """address: the address of the folder, or of the dataset.json in it."""
        self.address = address.removesuffix("dataset.json").rstrip("/") or ("/" if address.startswith("/") else ".")
        self.storage = self._open()
        try:
            self._read()
        except NoDataset:
            raise UnreadableRun(
                f"{self.address}: there is no finished run here (no dataset.json); "
                "give the folder that `understudy curate --out` wrote to, or let that run end first"
            ) from None
        except ManifestError as error:
            raise UnreadableRun(str(error)) from None
        except FileNotFoundError as error:
            raise UnreadableRun(self._incomplete(f"{error.filename or error} is missing")) from None
        except UnreadableRun as error:
            raise UnreadableRun(self._incomplete(str(error))) from None
        except RecipeError as error:
            raise UnreadableRun(
                f"{error}\nanother version of understudy made this run; run `understudy curate` with this version first"
            ) from None
        except (LedgerError, OSError) as error:
            raise UnreadableRun(str(error)) from error

    def _open(self) -> Storage:
        try:
            return Storage(self.address)
        except (ValueError, ImportError) as error:
            raise UnreadableRun(f"{self.address}: this address cannot be read: {error}") from None

    def _incomplete(self, fault: str) -> str:
        return f"{self.address}: {fault}; run `understudy curate` into it again, which makes only what is missing"

    # ---- the run as a whole ----

    def _read(self) -> None:
        self.manifest: DatasetManifest = load(f"{self.address}/dataset.json")
        recipe = self._read_recipe()
        steps = self._read_json(steps_file(self.manifest.recipe.hash))
        self.sources = self._read_sources()
        """The rows of sources.csv. `duration_s` is a float, or None where it is not known."""
        super().__init__(_FrozenLedger(self.storage, recipe.shards.partitions), recipe, steps)
        lacking = [name for name in ("scenes", "clips", *recipe.measure) if name not in steps]
        if lacking:
            raise UnreadableRun(f"{steps_file(self.manifest.recipe.hash)} has no fingerprint of the step {lacking[0]}")
        clips = self._read_clips()
        self._clips = clips[_CLIP_COLUMNS].rename(columns={"audio_file": "audio"})
        self._counted = {name: clips.index[clips[f"{name}.status"].notna()] for name in self.stages}
        self.frame = self.read_frame()
        """One row a clip: the columns that the policy reads, and those of `clips`, `clips.uri` among them.

        Other columns may hold long texts. `columns` and `frame_for` read them when they are needed.
        """
        self.decisions = decide(self.frame, recipe.policy, self.stages)
        """The verdict on each clip, as tasks.policy.decide.decide returns it."""

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
        return parse_curation(self._read_json(name), f"{self.address}/{name}")

    def _read_sources(self) -> list[dict[str, Any]]:
        text = self.storage.read_bytes("sources.csv").decode("utf-8", "surrogateescape")
        try:
            reader = csv.DictReader(io.StringIO(text, newline=""))
            if not {"uri", "where", "status", "reason", "source_id", "duration_s"} <= set(reader.fieldnames or ()):
                raise ValueError("columns are missing")
            rows: list[dict[str, Any]] = list(reader)
            for row in rows:
                row["duration_s"] = float(row["duration_s"]) if row["duration_s"] else None
        except (csv.Error, ValueError) as error:
            raise UnreadableRun(f"sources.csv is damaged ({error})") from None
        return rows

    def _read_clips(self) -> "pd.DataFrame":
        """Of clips.parquet: where each clip comes from, and each stage's status. A status is null when the run has not
        counted a row of that stage for the clip."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            file = pq.ParquetFile(pa.BufferReader(self.storage.read_bytes("clips.parquet")))
            wanted = ["clip_id", *_CLIP_COLUMNS, *(f"{name}.status" for name in self.stages)]
            lacking = [name for name in wanted if name not in file.schema_arrow.names]
            if lacking:
                raise UnreadableRun(f"clips.parquet has no column {lacking[0]!r}")
            return file.read(columns=wanted).to_pandas(split_blocks=True, self_destruct=True).set_index("clip_id")
        except pa.ArrowException as error:
            raise UnreadableRun(f"clips.parquet is damaged ({error})") from None

    def clip_table(self, partition: int | None) -> "pd.DataFrame":
        assert partition is None, "a finished run is read as a whole"
        return self._clips

    def counting(self, stage: str, table: "pd.DataFrame") -> "pd.DataFrame":
        # the ledger may also hold rows of footage that is no longer listed, and of captions that have changed since
        return table[table["key"].isin(self._counted[stage])]

    def columns(self, stage: str, names: Sequence[str], partition: int | None = None) -> "pd.DataFrame":
        """Columns of a stage's rows, indexed by clip_id.

        partition: whose rows to read; those of all partitions when None. Raises UnreadableRun.
        """
        try:
            return self.table(stage, names, partition).set_index("key")
        except (LedgerError, OSError) as error:
            raise UnreadableRun(str(error)) from error

    def frame_for(self, policy: Policy) -> "pd.DataFrame":
        """`frame`, and the columns that another policy reads as well. Raises UnreadableRun."""
        import pandas as pd

        parts = [self.frame]
        for stage, names in policy.columns().items():
            missing = [name for name in names if stage in self.stages and f"{stage}.{name}" not in self.frame]
            if missing:
                parts.append(self.columns(stage, missing).reindex(self.frame.index).add_prefix(f"{stage}."))
        return pd.concat(parts, axis=1)

    def funnel(self) -> list[FunnelLine]:
        """The funnel's lines, from the rows of the source manifest to the tiers."""
        table = funnel(self.frame, self.decisions, self.recipe.policy, self.stages)
        return [*source_lines(self.sources, self.skipped()), *clip_lines(table)]

    def problems(self) -> list[tuple[str, str]]:
        """The errors, as tasks.review.funnel.list_problems returns them."""
        return list_problems(self.sources, self.decisions)

    # ---- single clips ----

    def find(self, prefix: str) -> str:
        """The clip_id that equals `prefix`, or the only one that begins with it. Raises Refused when there is no such
        clip, or several begin with it."""
        if prefix in self.frame.index:
            return prefix
        found = [clip_id for clip_id in self.frame.index if clip_id.startswith(prefix)]
        if len(found) == 1:
            return str(found[0])
        if found:
            raise Refused(
                f"{len(found)} clips begin with {prefix!r}, such as {found[0]} and {found[1]}; give more of the clip_id"
            )
        near = self._nearest(prefix)
        hint = f"did you mean {near}?" if near else "clips.parquet lists them"
        raise Refused(f"no clip of {self.address} begins with {prefix!r}; {hint}")

    def _nearest(self, prefix: str) -> str:
        """The clip_id whose beginning is most similar to `prefix`; "" when none is similar.

        Only clips that lie near `prefix` in sorted order, and clips that end like it, are compared.
        """
        index = self.frame.index  # sorted
        at = int(index.searchsorted(prefix))
        nearby = [str(clip_id) for clip_id in index[max(0, at - _NEARBY) : at + _NEARBY]]
        ending = [str(clip_id) for clip_id in index[index.str.endswith(prefix[-8:])][:_NEARBY]] if prefix else []
        begins = {clip_id[: len(prefix)]: clip_id for clip_id in [*nearby, *ending]}
        found = difflib.get_close_matches(prefix, list(begins), n=1, cutoff=0.6)
        return begins[found[0]] if found else ""

    def clips(self, clip_ids: Iterable[str], remade: bool = True) -> Iterator[tuple[ClipRecord, list[StageResult]]]:
        """Records and results of these clips, in the order of `clip_ids`.

        remade: whether the record names the video, size and audio that a stage such as crop has given the clip. If
            False, it is the clip as it was cut.

        Raises UnreadableRun when the ledger lacks one of the clips.
        """
        wanted = list(dict.fromkeys(clip_ids))
        records, results = self._rows_of_clips(wanted)
        names = [f.name for f in dataclasses.fields(ClipRecord) if f.name != "metadata"]
        for clip_id in wanted:
            if clip_id not in records:
                raise UnreadableRun(self._incomplete(f"the ledger has no clip {clip_id}"))
            record = ClipRecord(**{name: records[clip_id][name] for name in names})
            of_clip = results.get(clip_id, [])
            yield self.remade(record, of_clip) if remade else record, of_clip

    def _rows_of_clips(self, clip_ids: list[str]) -> tuple[dict[str, dict[str, Any]], dict[str, list[StageResult]]]:
        """The clips' records and stages' results, by clip_id. Only the partitions of these clips are read."""
        wanted = set(clip_ids)
        records: dict[str, dict[str, Any]] = {}
        results: dict[str, list[StageResult]] = {}
        for partition in sorted({partition_of(clip_id, self.partitions) for clip_id in clip_ids}):
            for row in self.rows_of("clips", partition, {clip_id[:16] for clip_id in wanted}).values():
                records |= {clip["clip_id"]: clip for clip in row["clips"] or () if clip["clip_id"] in wanted}
            for stage in self.stages:
                for clip_id, row in self.rows_of(stage, partition, wanted).items():
                    if self.frame.at[clip_id, f"{stage}.status"] == row["status"] == "ok":
                        results.setdefault(clip_id, []).append(self.result(stage, row))
        return records, results

    @contextlib.contextmanager
    def open(self, record: ClipRecord, results: Iterable[StageResult] = ()) -> Iterator[Clip]:
        """Open a clip: fetch its files to the local disk while the context lasts, and attach results of stages.

        Raises UnreadableRun when a file is missing, or turns out to be damaged inside the context.
        """
        from soundfile import SoundFileError

        found = {result.stage: result.measurement(self.storage, record.clip_id) for result in results}
        with contextlib.ExitStack() as files:
            for name in filter(None, (record.video, record.audio)):
                if not self.storage.exists(name):
                    raise UnreadableRun(
                        f"{self.address}: {name} is missing; "
                        "run `understudy curate` with --retry-errors, which makes it again"
                    )
            video = files.enter_context(self.storage.local(record.video))
            audio = files.enter_context(self.storage.local(record.audio)) if record.audio else None
            try:
                yield Clip(record, video, audio, found)
            except (MediaError, SoundFileError, DamagedFile) as error:
                raise UnreadableRun(
                    f"{self.address}: a file of clip {record.clip_id} is damaged ({error}); "
                    "delete the file and run `understudy curate` with --retry-errors, which makes it again"
                ) from None
