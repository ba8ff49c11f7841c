"""Which images a config trains on, and which it is measured on."""

from cifarlab.config import InputError, TrainConfig
from cifarlab.data.dataset import Dataset, Split, balanced_subset, hold_out

CLEAN_IMAGES = 2000  # training images without augmentation that averaged weights' batch norm, and mixing runs, are measured on
BUILT_IN = {"cifar10": 50_000, "cifar100": 50_000, "digits": 1_437}  # training images, known without reading any


def split_dataset(dataset: Dataset, config: TrainConfig) -> dict[str, Split]:
    """train and test, val when a fraction is held out, clean (training images for evaluation) when it is asked for or needed.

    A range test chooses a learning rate, and the test set chooses nothing: then there is none.
    """
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
    return {"train": train, **splits} | ({} if config.is_range_test else {"test": dataset.test})


def count_train_images(config: TrainConfig, dataset: Dataset | None = None) -> int:
    """How many images a config trains on; without the data set, by what is known of the built-in ones.

    Raises InputError where it is not known.
    """
    if dataset is None and config.data not in BUILT_IN:
        raise InputError(f"how many images data={config.data!r} holds is not known without reading them: give the data set")
    count = len(dataset.train) if dataset else BUILT_IN[config.data]
    if config.val_fraction:
        held = len(hold_out(dataset.train.labels, config.val_fraction, 0)[1]) if dataset else round(config.val_fraction * count)
        count -= held
    return min(count, config.train_images) if config.train_images else count


def count_steps(num_images: int, config: TrainConfig, world_size: int = 1) -> int:
    """Updates that make an epoch of so many training images; raises InputError where there is none, or a rank without images."""
    size = config.batch_size
    if num_images < 2:
        raise InputError(f"a training set of {num_images} image(s) is too small: give it at least 2")
    full, rest = divmod(num_images, size)
    keep_rest = rest > 1 and not config.drop_last
    if full + keep_rest == 0:
        raise InputError(
            f"batch_size={size} with drop_last leaves no step of {num_images} training images: choose at most {num_images}"
        )
    if full and size < world_size:
        raise InputError(f"batch_size={size} is too small for {world_size} ranks: choose at least {world_size}, or fewer ranks")
    if keep_rest and rest < world_size:
        raise InputError(
            f"the last batch of an epoch has {rest} images ({num_images} in batches of {size}), too few for {world_size} ranks: "
            "choose another batch_size, or drop_last"
        )
    return full + keep_rest
