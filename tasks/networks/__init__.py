"""The published networks, for curation and for the evaluation of generated video: tensors in, tensors out."""
