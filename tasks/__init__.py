"""Curation: the stages that measure, their backends, and what cuts, runs, judges and reviews."""
