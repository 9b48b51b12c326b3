"""What is scheduled, triggered and watched: Prefect flows and the command line. No algorithms here."""
