"""Training reads the shards that curation writes; models, objectives and the loop on Ray belong here."""
