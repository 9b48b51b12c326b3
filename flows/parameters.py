"""The forms of the flows: what a run is given, with the texts that the Prefect UI shows."""

from pathlib import Path

from prefect import runtime
from pydantic import BaseModel, Field

from tasks.execution.run_lock import OutputError


class CurateParameters(BaseModel):
    """What to curate, how, and where to put it."""

    manifest: str = Field(
        title="Footage",
        description="Address of a manifest (CSV, JSONL or Parquet with a `uri` column) or of a folder of videos: "
        "an absolute path on the worker's machine, s3://bucket/key, or any fsspec address.",
        json_schema_extra={"position": 1},
    )
    recipe: str = Field(
        "active_mind",
        title="Recipe",
        description="Name of a bundled recipe (active_mind, physavatar, demo) or the path of a YAML file. It says how "
        "clips are cut, what is measured and which thresholds decide.",
        json_schema_extra={"position": 2},
    )
    out: str = Field(
        title="Output folder",
        description="Where ledger, clips and shards are kept: an absolute path or an address. Give the same folder "
        "again to go on from where a run stopped, to add footage or to try other thresholds: only new work costs time.",
        json_schema_extra={"position": 3},
    )
    workers: int | None = Field(
        None,
        ge=1,
        title="Workers",
        description="Worker processes on the machine that runs the flow; one a core when left empty. "
        "Their number changes nothing but the speed.",
        json_schema_extra={"position": 4},
    )
    retry_errors: bool = Field(
        False,
        title="Retry errors",
        description="Do again the sources and clips that ended in an error, such as a time limit.",
        json_schema_extra={"position": 5},
    )


class TrainParameters(BaseModel):
    """What to train, on what, and where to put it."""

    manifest: str = Field(
        title="Dataset",
        description="Address of a dataset manifest, such as OUT/dataset.json of a curation: an absolute path on the "
        "worker's machine, s3://bucket/key, or any fsspec address.",
        json_schema_extra={"position": 1},
    )
    recipe: str = Field(
        "active_mind",
        title="Recipe",
        description="Name of a bundled recipe or the path of a YAML file. Its `training` section is used.",
        json_schema_extra={"position": 2},
    )
    out: str = Field(
        title="Output folder",
        description="Where checkpoints, weights, curves and samples are kept: an absolute path that all workers see, "
        "s3://bucket/folder, or any fsspec address. Give the same again to go on from the latest checkpoint.",
        json_schema_extra={"position": 3},
    )
    phases: list[str] | None = Field(
        None,
        title="Phases",
        description="Which phases to train; all of the recipe's when left empty. A phase starts from the weights that "
        "earlier phases have left in the output folder.",
        json_schema_extra={"position": 4},
    )
    workers: int = Field(
        1,
        ge=1,
        title="Workers",
        description="Number of workers. Each takes a GPU where there are any.",
        json_schema_extra={"position": 5},
    )
    ray: str | None = Field(
        None,
        title="Ray",
        description="Address of a Ray cluster, such as auto or ray://host:10001. Without it, one worker trains in the "
        "flow's own process, and several on a Ray of their own on this machine.",
        json_schema_extra={"position": 6},
    )


def check_paths(parameters: CurateParameters | TrainParameters) -> None:
    """Refuse a relative path in a deployed run. Such a run works in a folder that its worker removes afterwards, with
    all that was written there. Raises OutputError."""
    for name in ("manifest", "out"):
        path = getattr(parameters, name)
        if runtime.deployment.id and "://" not in path and not Path(path).is_absolute():
            raise OutputError(f"{name} {path!r}: a deployed run needs an absolute path or an address such as s3://...")
