"""Which images a config trains on, and which it is measured on."""

from cifarlab.config import InputError, TrainConfig
from cifarlab.data.dataset import Dataset, Split, balanced_subset, hold_out

CLEAN_IMAGES = 2000  # training images without augmentation that averaged weights' batch norm, and mixing runs, are measured on


def split_dataset(dataset: Dataset, config: TrainConfig) -> dict[str, Split]:
    """train and test, val when a fraction is held out, clean (training images for evaluation) when it is asked for or needed."""
    train, splits = dataset.train, {}
    if config.train_images > len(train):
        raise InputError(f"train_images={config.train_images} is more than {dataset.name} has: choose at most {len(train)}")
    if config.val_fraction:
        kept, held = hold_out(train.labels, config.val_fraction, config.seed)
        train, splits["val"] = train.take(kept), train.take(held)
    if config.train_images:
        train = train.take(balanced_subset(train.labels, min(config.train_images, len(train)), config.seed))
    num_clean = config.clean_images or (CLEAN_IMAGES if config.is_mixing else 0)
    if num_clean:
        splits["clean"] = train.take(balanced_subset(train.labels, min(num_clean, len(train)), config.seed))
    return {"train": train, **splits, "test": dataset.test}
