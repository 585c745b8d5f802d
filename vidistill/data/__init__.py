"""Data of a training on disk and in batches."""
