"""The result of a curation: verdicts, samples with their lineage, shards, and tables of all sources and clips."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from data_manifests.dataset import DatasetManifest, ShardEntry
from data_manifests.lineage import RecipeName
from data_manifests.sources import BadRow
from tasks.cutting.ingest import SourceInfo
from tasks.execution.curation import Curation
from tasks.execution.jobs import WriteShard
from tasks.execution.stage_results import StageResult
from tasks.execution.steps import SOURCES
from tasks.execution.work import Progress
from tasks.media.clip import ClipRecord
from tasks.policy.decide import decide, rule_results
from tasks.recipe import recipe_hash
from tasks.shards import Sample, ShardPlan, lineage, plan_shards

if TYPE_CHECKING:
    import pandas as pd


class ShardError(RuntimeError):
    """A shard cannot be written, and another try would fail too."""


class Outcome:
    """The verdicts on a curation's clips, made from its ledger as it stands."""

    def __init__(self, curation: Curation, bad_rows: Sequence[BadRow] = ()) -> None:
        import pandas as pd

        self.curation, self.policy = curation, curation.recipe.policy
        view, steps = curation.view, curation.steps
        frames = [view.read_frame(partition) for partition in range(view.partitions) if view.sources(partition)]
        self.frame: pd.DataFrame = pd.concat(frames) if frames else view.read_frame(0)
        self.decisions = decide(self.frame, self.policy, view.stages)
        self.backends = {
            name: {
                "backend": stage.settings.backend,
                "version": f"{stage.version}, {stage.backend_version()}",
                "fingerprint": steps[name].fingerprint,
            }
            for name, stage in steps.stages.items()
        }
        self.sources = [*self._source_rows(), *map(_bad_row, bad_rows)]
        """The rows of sources.csv: what came of each row of the source manifest."""
        self.recipe_hash = recipe_hash(curation.recipe)
        self.recipe_name = RecipeName(name=curation.recipe.name, hash=self.recipe_hash)

    # ---- shards ----

    def plan_shards(self, partition: int) -> list[ShardPlan]:
        """The shards of a partition's kept clips, widest tier first."""
        view = self.curation.view
        sources = {source.info.source_id: source.info for source in view.sources(partition)}
        if not sources:
            return []
        samples: dict[str, list[Sample]] = {tier: [] for tier in self.policy.tiers}
        records = view.records(partition)
        decisions = self.decisions.loc[[record.clip_id for record in records]].to_dict("index")
        kept = [clip_id for clip_id, decision in decisions.items() if decision["verdict"] == "keep"]
        tables = {name: view.rows_of(name, partition, kept) for name in view.stages}
        for record in records:
            decision = decisions[record.clip_id]
            if decision["verdict"] == "keep":
                results = [view.result(name, table[record.clip_id]) for name, table in tables.items()]
                sample = self._sample(record, sources[record.source_id], results, decision)
                samples[decision["tier"]].append(sample)
        settings = self.curation.recipe.shards
        return [plan for tier, some in samples.items() for plan in plan_shards(some, settings, partition, tier)]

    def _sample(
        self, record: ClipRecord, source: SourceInfo, results: list[StageResult], decision: dict[str, Any]
    ) -> Sample:
        stages = self.curation.steps.stages
        record = self.curation.view.remade(record, results)
        scores = {r.stage: self.backends[r.stage] | {"values": r.columns} for r in results}
        files: dict[str, str] = {}
        size = record.bytes
        for result in results:
            ours = result.sample_files(record.clip_id)
            twice = sorted(files.keys() & ours.keys())
            if twice:
                raise ValueError(f"stage {result.stage}: an earlier stage has given a {twice[0]} already")
            files |= ours
            size += result.arrays_bytes
            if not stages[result.stage].remakes_clip:
                size += result.files_bytes
        scores_by_name = {f"{name}.{c}": v for name, score in scores.items() for c, v in score["values"].items()}
        usable = decision["audio"] == "usable"
        about = lineage(
            record,
            uri=source.uri,
            sha256=source.sha256,
            audio_usable=usable,
            audio_reason="" if usable else _why_unusable(decision),
            scores=scores,
            rules=rule_results(scores_by_name, self.policy),
            tier=decision["tier"],
            recipe_name=self.curation.recipe.name,
            recipe_hash=self.recipe_hash,
            unaligned=[a for r in results for a in r.arrays if a in stages[r.stage].unaligned],
        )
        return Sample.of(record, about, files, size)

    def write_shards(self, plans: list[ShardPlan], progress: Progress | None = None) -> list[ShardEntry]:
        """Write shards. Raises StoreError, or ShardError for what would fail again."""
        storage, limit_s = self.curation.storage, self.curation.recipe.run.time_limit("shards")
        units = ((plan.name, plan) for plan in plans)
        entries: list[ShardEntry] = []
        for result in self.curation.runner.pool.map(WriteShard(storage), units, limit_s):
            if result.result is None:
                raise ShardError(
                    f"cannot write {result.key} in {storage.address}: {result.error}; "
                    "where a file is gone, run `understudy curate` with --retry-errors, which makes it again"
                )
            entries.append(result.result)
            if progress is not None:
                progress(len(entries), len(plans), 0)
        return entries

    # ---- tables ----

    def _source_rows(self) -> Iterator[dict[str, Any]]:
        """One row for each uri of the manifest. `status` is ok, error or duplicate; `reason` says why."""
        view = self.curation.view
        probed = {r["key"]: r for r in view.ledger.rows(SOURCES, view.fingerprints[SOURCES])}
        cut = {key: row for partition in range(view.partitions) for key, row in self._cut_rows(partition)}
        counts: dict[str, dict[str, int]] = {}
        by_source = self.decisions.groupby(self.decisions.index.str[:16])["verdict"].value_counts()
        for (source_id, verdict), count in by_source.items():
            counts.setdefault(source_id, {})[verdict] = int(count)
        for row in view.rows:
            found: dict[str, Any] = {"uri": row.uri, "where": row.where, "status": "ok", "reason": ""}
            known = probed.get(row.uri)
            if known is None or known["status"] == "error":
                yield found | {"status": "error", "reason": known["error"] if known else "not read"}
            elif row.uri in view.same_as:
                about = {"status": "duplicate", "reason": f"the same bytes as {view.same_as[row.uri]}"}
                yield found | about | {"source_id": known["source_id"]}
            else:
                source_id = known["source_id"]
                about = cut.get(source_id, {})
                # a recording that was never closed does not tell its length; the search for shots has seen it
                length = {"source_id": source_id, "duration_s": known["duration_s"] or about.get("duration_s")}
                yield found | about | length | counts.get(source_id, {})

    def _cut_rows(self, partition: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """By source_id: how many shots and clips there are, or why there are none."""
        shots, clips = (self.curation.view.rows_of(name, partition) for name in ("scenes", "clips"))
        for source_id, row in shots.items():
            cut = clips.get(source_id)
            failed = next((r for r in (row, cut) if r is not None and r["status"] == "error"), None)
            if failed is not None:
                yield source_id, {"status": "error", "reason": failed["error"]}
                continue
            found: dict[str, Any] = {"shots": len(row["shots"]), "duration_s": row["duration_s"]}
            if cut is not None:
                found["clips"] = len(cut["clips"])
                if not cut["clips"]:
                    found["reason"] = "no clip: " + "; ".join(sorted({s["reason"] for s in cut["skipped"]}))
            yield source_id, found

    def record(self, manifest: DatasetManifest) -> None:
        """Write the tables, the recipe and, last of all, the dataset manifest, each whole or not at all."""
        storage, recipe = self.curation.storage, self.curation.recipe
        storage.write_bytes("sources.csv", self._sources_csv())
        table = self._clips_table()
        storage.write("clips.parquet", lambda path: table.to_parquet(path, index=False))
        told = json.dumps(recipe.model_dump(mode="json", exclude={"run"}), indent=1, ensure_ascii=False) + "\n"
        storage.write_bytes(f"recipes/{self.recipe_hash}.json", told.encode())
        made = json.dumps(self.curation.steps.fingerprints, indent=1)
        storage.write_bytes(steps_file(self.recipe_hash), made.encode() + b"\n")
        manifest.write(storage)

    def _sources_csv(self) -> bytes:
        text = io.StringIO()
        writer = csv.DictWriter(text, _SOURCE_COLUMNS, restval="", lineterminator="\n")
        # The csv module quotes a "\n" but not a "\r", which would end the row for every reader.
        quoting = csv.DictWriter(text, _SOURCE_COLUMNS, restval="", lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writeheader()
        for row in self.sources:
            (quoting if any("\r" in str(value) for value in row.values()) else writer).writerow(row)
        return text.getvalue().encode("utf-8", "surrogateescape")

    def _clips_table(self) -> "pd.DataFrame":
        """One row a clip: where it comes from, the decision on it, and what of the ledger that was made from."""
        table = self.decisions.reset_index()
        uris = {row.get("source_id"): row["uri"] for row in self.sources if row["status"] == "ok"}
        about = self.frame.reset_index()
        table.insert(1, "uri", table["clip_id"].str[:16].map(uris))
        for at, name in enumerate(("start_s", "end_s", "duration_s", "video"), 2):
            table.insert(at, name, about[f"clips.{name}"])
        needed, stages = self.policy.columns(), self.curation.view.stages
        scores = [f"{stage}.{column}" for stage in stages for column in needed.get(stage, ())]
        statuses = [f"{stage}.status" for stage in stages]
        return table.join(about[["clips.audio", *statuses, *scores]].rename(columns={"clips.audio": "audio_file"}))


def steps_file(recipe_hash: str) -> str:
    """The name of the file with the fingerprint of each step of a recipe's last run: which rows of the ledger count."""
    return f"recipes/{recipe_hash}.steps.json"


def _why_unusable(decision: dict[str, Any]) -> str:
    if decision["audio"] == "none":
        return "no sound"
    return f"{decision['audio_rule']}: {decision['audio_value']}, wanted {decision['audio_threshold']}"


def _bad_row(row: BadRow) -> dict[str, Any]:
    status = "duplicate" if row.duplicate else "bad row"
    return {"uri": "", "where": row.where, "status": status, "reason": row.reason}


_SOURCE_COLUMNS = [
    *("uri", "where", "status", "reason", "source_id", "duration_s"),
    *("shots", "clips", "keep", "drop", "error", "pending"),
]
