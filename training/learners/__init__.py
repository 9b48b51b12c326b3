"""Learners: one for each model family, with its model, data and loss (training.loop.job.Learner)."""
