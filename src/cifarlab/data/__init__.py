"""Data sets: where they come from, how they are read and kept. No torch in the sources; batches and augmentation have it."""

from cifarlab.data.dataset import Dataset, Split
from cifarlab.data.load import load_dataset

__all__ = ["Dataset", "Split", "load_dataset"]
