"""What comes of a ledger: verdicts, samples with their lineage, and tables of every source and every clip."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data_manifests.dataset import DatasetManifest, ShardEntry
from data_manifests.lineage import RecipeName
from data_manifests.sources import BadRow
from tasks.clip import ClipRecord
from tasks.curation import Curation
from tasks.findings import Finding
from tasks.ingest import SourceInfo
from tasks.jobs import WriteShard
from tasks.policy import decide, funnel, rule_results
from tasks.recipe import recipe_hash
from tasks.shards import Sample, ShardPlan, lineage, plan_shards
from tasks.work import Progress

if TYPE_CHECKING:
    import pandas as pd

Line = tuple[str, int, float | None]  # of a funnel: what, how many, hours


class ShardError(RuntimeError):
    """A shard cannot be written, for a reason that another try would meet again."""


class Outcome:
    """The state of a curation's ledger, read once."""

    def __init__(self, curation: Curation, bad_rows: Sequence[BadRow] = ()) -> None:
        import pandas as pd

        self.curation, self.policy = curation, curation.recipe.policy
        frames = [curation.frame(p) for p in range(curation.partitions) if curation.sources(p)]
        self.frame: pd.DataFrame = pd.concat(frames) if frames else curation.frame(0)
        self.decisions = decide(self.frame, self.policy, list(curation.stages))
        self.backends = {
            name: {
                "backend": stage.settings.backend,
                "version": f"{stage.version}, {stage.backend_version()}",
                "fingerprint": curation.step[name].fingerprint,
            }
            for name, stage in curation.stages.items()
        }
        self.sources = [*self._source_rows(), *map(_bad_row, bad_rows)]
        self.recipe_hash = recipe_hash(curation.recipe)
        self.recipe_name = RecipeName(name=curation.recipe.name, hash=self.recipe_hash)

    # ---- shards ----

    def plan_shards(self, partition: int) -> list[ShardPlan]:
        """The shards of a partition's kept clips, widest tier first."""
        sources = {source.info.source_id: source.info for source in self.curation.sources(partition)}
        if not sources:
            return []
        samples: dict[str, list[Sample]] = {tier: [] for tier in self.policy.tiers}
        records = self.curation.records(partition)
        decisions = self.decisions.loc[[record.clip_id for record in records]].to_dict("index")
        kept = [clip_id for clip_id, decision in decisions.items() if decision["verdict"] == "keep"]
        tables = {name: self.curation.rows_of(name, partition, kept) for name in self.curation.stages}
        for record in records:
            decision = decisions[record.clip_id]
            if decision["verdict"] == "keep":
                findings = self.curation.findings(record.clip_id, tables)
                sample = self._sample(record, sources[record.source_id], findings, decision)
                samples[decision["tier"]].append(sample)
        settings = self.curation.recipe.shards
        return [plan for tier, some in samples.items() for plan in plan_shards(some, settings, partition, tier)]

    def _sample(
        self, record: ClipRecord, source: SourceInfo, findings: list[Finding], decision: dict[str, Any]
    ) -> Sample:
        record = self.curation.remade(record, findings)
        scores = {f.stage: self.backends[f.stage] | {"values": f.columns} for f in findings}
        files: dict[str, str] = {}
        size = record.bytes
        for finding in findings:
            ours = finding.samples_files(record.clip_id)
            twice = sorted(files.keys() & ours.keys())
            if twice:
                raise ValueError(f"stage {finding.stage}: an earlier stage has given a {twice[0]} already")
            files |= ours
            size += finding.arrays_bytes
            if not self.curation.stages[finding.stage].remakes_clip:
                size += finding.files_bytes
        scores_by_name = {f"{name}.{c}": v for name, score in scores.items() for c, v in score["values"].items()}
        reason = "" if decision["audio"] == "usable" else self._why_unusable(decision)
        about = lineage(
            record,
            uri=source.uri,
            sha256=source.sha256,
            audio_usable=decision["audio"] == "usable",
            audio_reason=reason,
            scores=scores,
            rules=rule_results(scores_by_name, self.policy),
            tier=decision["tier"],
            recipe_name=self.curation.recipe.name,
            recipe_hash=self.recipe_hash,
            unaligned=[a for f in findings for a in f.arrays if a in self.curation.stages[f.stage].unaligned],
        )
        return Sample.of(record, about, files, size)

    @staticmethod
    def _why_unusable(decision: dict[str, Any]) -> str:
        if decision["audio"] == "none":
            return "no sound"
        return f"{decision['audio_rule']}: {decision['audio_value']}, wanted {decision['audio_threshold']}"

    def write_shards(self, plans: list[ShardPlan], progress: Progress | None = None) -> list[ShardEntry]:
        """Write the shards that are not there yet. Raises StoreError, or ShardError for what would fail again."""
        job = WriteShard(self.curation.storage)
        entries: list[ShardEntry] = []
        for outcome in self.curation.engine.map(job, plans, self.curation.recipe.run.time_limit("shards")):
            if outcome.result is None:
                raise ShardError(
                    f"cannot write {outcome.unit.name} in {self.curation.storage.address}: {outcome.error}; "
                    "where a file is gone, --retry-errors makes it again"
                )
            entries.append(outcome.result)
            if progress is not None:
                progress(len(entries), len(plans), 0)
        return entries

    # ---- tables for people ----

    def _source_rows(self) -> Iterator[dict[str, Any]]:
        """What came of each uri of the manifest: `status` is ok, error or duplicate; `reason` says why."""
        curation = self.curation
        probed = {r["key"]: r for r in curation.ledger.rows("sources", curation.step["sources"].fingerprint)}
        cut = {key: row for p in range(curation.partitions) for key, row in self._cutting(p)}
        counts: dict[str, dict[str, int]] = {}
        by_source = self.decisions.groupby(self.decisions.index.str[:16])["verdict"].value_counts()
        for (source_id, verdict), count in by_source.items():
            counts.setdefault(source_id, {})[verdict] = int(count)
        for row in curation.rows:
            found: dict[str, Any] = {"uri": row.uri, "where": row.where, "status": "ok", "reason": ""}
            known = probed.get(row.uri)
            if known is None or known["status"] == "error":
                yield found | {"status": "error", "reason": known["error"] if known else "not read"}
            elif row.uri in curation.same_as:
                same = curation.same_as[row.uri]
                about = {"status": "duplicate", "reason": f"the same bytes as {same}"}
                yield found | about | {"source_id": known["source_id"]}
            else:
                source_id = known["source_id"]
                about = cut.get(source_id, {})
                # a recording that was never closed does not tell its length, and whoever looked for cuts has seen it
                length = {"source_id": source_id, "duration_s": known["duration_s"] or about.get("duration_s")}
                yield found | about | length | counts.get(source_id, {})

    def _cutting(self, partition: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """By source: shots and clips, or why there are none."""
        shots, clips = (self.curation.rows_of(name, partition) for name in ("scenes", "clips"))
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

    def problems(self) -> list[tuple[str, str]]:
        """(where, why) for each source and each clip that ended in an error."""
        found = [
            (row["uri"] or row["where"], row["reason"]) for row in self.sources if row["status"] in ("error", "bad row")
        ]
        failed = self.decisions[self.decisions["verdict"] == "error"]
        found += [(key, f"{row['stage']}: {row['error']}") for key, row in failed.to_dict("index").items()]
        return found

    def funnel(self) -> list[Line]:
        """(what, how many, hours), from the footage that came in to the tiers that came out."""
        step = self.curation.step["clips"]
        skipped = self.curation.ledger.read_list(step.name, step.fingerprint, "skipped", None, SKIPPED_COLUMNS)
        table = funnel(self.frame, self.decisions, self.policy, list(self.curation.stages))
        return [*source_lines(self.sources, skipped), *clip_lines(table)]

    def record(self, manifest: DatasetManifest) -> None:
        """Write the tables and, last of all, the dataset manifest, each whole or not at all."""
        storage = self.curation.storage
        text = io.StringIO()
        writer = csv.DictWriter(text, _SOURCE_COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.sources)
        storage.write_bytes("sources.csv", text.getvalue().encode("utf-8", "surrogateescape"))
        table = self.decisions.reset_index()
        uris = {row.get("source_id"): row["uri"] for row in self.sources if row["status"] == "ok"}
        about = self.frame.reset_index()
        table.insert(1, "uri", table["clip_id"].str[:16].map(uris))
        for at, name in enumerate(("start_s", "end_s", "duration_s", "video"), 2):
            table.insert(at, name, about[f"clips.{name}"])
        needed = self.policy.columns()
        scores = [f"{stage}.{column}" for stage in self.curation.stages for column in needed.get(stage, ())]
        # what of the ledger this outcome was made from, for whoever reads the folder later
        statuses = [f"{stage}.status" for stage in self.curation.stages]
        table = table.join(about[["clips.audio", *statuses, *scores]].rename(columns={"clips.audio": "audio_file"}))
        storage.write("clips.parquet", lambda path: table.to_parquet(path, index=False))
        recipe = (
            json.dumps(self.curation.recipe.model_dump(mode="json", exclude={"run"}), indent=1, ensure_ascii=False)
            + "\n"
        )
        storage.write_bytes(f"recipes/{self.recipe_hash}.json", recipe.encode())
        made = {name: step.fingerprint for name, step in self.curation.step.items()}
        storage.write_bytes(steps_file(self.recipe_hash), json.dumps(made, indent=1).encode() + b"\n")
        manifest.write(storage)


def steps_file(recipe_hash: str) -> str:
    """Where the fingerprint of each step of a recipe's last run is kept: which rows of the ledger count."""
    return f"recipes/{recipe_hash}.steps.json"


def source_lines(rows: Sequence[Mapping[str, Any]], skipped: "pd.DataFrame") -> list[Line]:
    """The funnel's lines about the manifest. rows: of sources.csv. skipped: parts that no clip was made of."""
    lines: list[Line] = [("rows of the manifest", len(rows), None)]
    for status in ("bad row", "error", "duplicate", "ok"):
        some = [row for row in rows if row["status"] == status]
        hours = sum(row.get("duration_s") or 0.0 for row in some) / 3600
        if some or status == "ok":
            lines.append((_STATUS_WORDS[status], len(some), hours if status == "ok" else None))
    ours = skipped[skipped["key"].isin([row["source_id"] for row in rows if row.get("source_id")])]
    for reason, some in ours.groupby("reason"):
        lines.append((f"  parts left out: {reason}", len(some), float((some["end_s"] - some["start_s"]).sum()) / 3600))
    return lines


def clip_lines(table: "pd.DataFrame") -> list[Line]:
    """The funnel's lines about clips, from tasks.policy.funnel's table; what is left only where something could go."""
    deciding = set(table["stage"][(table["what"] == "dropped") | (table["clips"] > 0) & (table["what"] != "left")])
    return [
        (funnel_label(row), row["clips"], row["hours"])
        for row in table.to_dict("records")
        if (row["stage"] in deciding if row["what"] == "left" else row["clips"])
        or row["what"] in ("in", "kept", "tier", "dropped")
    ]


def funnel_label(row: Mapping[str, Any]) -> str:
    """What a row of tasks.policy.funnel's table counts, in words."""
    what = "dropped by name" if row["what"] == "dropped" and row["reason"] == row["rule"] else row["what"]
    return _FUNNEL_WORDS[what].format(**row)


def _bad_row(row: BadRow) -> dict[str, Any]:
    status = "duplicate" if row.duplicate else "bad row"
    return {"uri": "", "where": row.where, "status": status, "reason": row.reason}


_SOURCE_COLUMNS = [
    *("uri", "where", "status", "reason", "source_id", "duration_s"),
    *("shots", "clips", "keep", "drop", "error", "pending"),
]
SKIPPED_COLUMNS = ["reason", "start_s", "end_s"]
_STATUS_WORDS = {"bad row": "  bad rows", "error": "  in error", "duplicate": "  duplicates", "ok": "sources"}
_FUNNEL_WORDS = {
    "in": "clips",
    "dropped": "  dropped: fails {reason}",
    "dropped by name": "  dropped: {rule}",
    "error": "  {stage}: {reason}",
    "pending": "  {stage}: {reason}",
    "left": "  left after {stage}",
    "kept": "kept",
    "audio": "  sound {reason}",
    "tier": "  tier {reason}",
}
