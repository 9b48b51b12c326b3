"""Running a curation: steps, workers, the ledger, what is still to do."""
