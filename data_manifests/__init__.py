"""What goes in and what came out: source manifests, recipes, dataset manifests. The schema is in README.md."""
