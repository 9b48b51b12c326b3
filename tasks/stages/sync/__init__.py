"""The stage `sync`: the offset between lips and sound."""
