"""Published weights: the catalogue, the local store, fetching, and safe reading."""
