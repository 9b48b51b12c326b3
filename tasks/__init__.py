"""Curation: one stage a module, what it measures and by which backends; and the parts that run, keep and judge."""
