"""The published networks that curation and evaluation run. They take tensors or arrays and return them.

They know nothing of clips, stages or storage. Weights come from tasks.weights.
"""
