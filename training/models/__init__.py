"""The networks that are trained, each with its sizes."""
