"""The stage `latents`: video latents and text embeddings."""
