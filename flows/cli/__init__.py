"""The `understudy` command, one module a group of commands."""
