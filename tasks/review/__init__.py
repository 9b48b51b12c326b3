"""Looking at a finished run, and computing what another policy would change."""
