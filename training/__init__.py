"""Training: models, data, the training loop, sampling and evaluation. It reads the shards that curation writes."""
