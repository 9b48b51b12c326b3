"""Training one phase: the loop, checkpoints, workers, metrics."""
