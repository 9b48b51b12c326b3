"""The footage of a curation: the manifest's rows, without what runs have made themselves."""

import logging
from collections.abc import Sequence

from data_manifests.sources import MEDIA_EXTENSIONS, BadRow, ManifestError, SourceRow, path_of, read_sources
from data_manifests.storage import Storage
from tasks.execution.run_lock import OWN_FOLDERS

log = logging.getLogger(__name__)


def read_footage(manifest: str, storage: Storage) -> tuple[list[SourceRow], list[BadRow]]:
    """The rows of a source manifest, good and bad.

    Where the manifest is a folder, files that any run wrote into it are skipped. A file that a manifest names is
    footage, wherever it lies.

    storage: of this run. Raises ManifestError when there is no footage.
    """
    ours = tuple(f"{root}/{name}/" for root in (storage.root, storage.address.rstrip("/")) for name in OWN_FOLDERS)
    rows: list[SourceRow] = []
    bad: list[BadRow] = []
    footage = path_of(manifest).rstrip("/")
    runs: dict[str, bool] = {}
    passed_by = 0
    for row in read_sources(manifest):
        if isinstance(row, BadRow):
            bad.append(row)
        elif row.where != manifest:
            rows.append(row)
        elif not row.uri.startswith(ours):
            if _is_of_a_run(row.uri, footage, runs):
                passed_by += 1
            else:
                rows.append(row)
    if passed_by:
        log.warning("%s: %d files in it were made by other runs; they are no footage", manifest, passed_by)
    if not rows:
        raise no_footage(manifest, bad)
    return rows, bad


def no_footage(manifest: str, bad: Sequence[BadRow] = ()) -> ManifestError:
    """The error for a manifest or a folder that names nothing to curate. bad: its rows, where it has only bad ones."""
    if bad:
        return ManifestError(
            f"{manifest}: no footage in it; the first of {len(bad)} bad rows: {bad[0].where}: {bad[0].reason}"
        )
    extensions = " ".join(sorted(MEDIA_EXTENSIONS))
    return ManifestError(
        f"{manifest}: no footage in it; if it is a folder, files with these extensions count: {extensions}"
    )


def _is_of_a_run(uri: str, footage: str, runs: dict[str, bool]) -> bool:
    """Whether a file lies in the output folder of a run that lies in the footage. runs: whether a folder is one, kept
    from call to call."""
    for name in OWN_FOLDERS:
        folder, between, _ = uri.rpartition(f"/{name}/")
        if between:
            if folder not in runs:
                run = Storage(folder)
                runs[folder] = f"{run.root}/".startswith(f"{footage}/") and bool(run.folders("ledger"))
            if runs[folder]:
                return True
    return False
