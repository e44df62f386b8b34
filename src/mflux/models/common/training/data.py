"""What is learned from: images and captions of a folder, and in which order they come.

Loads no MLX: a folder is looked through before anything heavy is.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import random
from collections.abc import Iterator as Iterates
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mflux.errors import CheckpointError, UsageError
from mflux.text import shown, some
from mflux.utils.paths import is_file, is_folder, read_bounded
from mflux.utils.scale_factor import GRID, LARGEST

if TYPE_CHECKING:
    from mflux.backend import mx

log = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_TARGET, _SOURCE, _PREVIEW = "_out", "_in", "preview"
# No caption is as long.
_LARGEST_CAPTION = 1_000_000
_TIME = "%Y-%m-%d %H:%M:%S"
# No run is as long.
_MOST_BATCHES = 10**9
# Of an extra look at the loss: so many images at most.
_MOST_LOOKED_AT = 10


# ---- the folder


@dataclass
class DataSpec:
    """One image to learn, its caption, and what it is to be made of, where pairs are learned.

    Attributes:
        width, height: what the image is resized to.
    """

    image: Path
    input_image: Path | None
    prompt: str
    width: int = 0
    height: int = 0


@dataclass(frozen=True)
class Found:
    """What a folder holds.

    Attributes:
        previews: what the previews show, by the names of their files: a prompt, and the image that it edits.
    """

    items: list[DataSpec]
    is_edit: bool
    previews: dict[str, tuple[str, Path | None]]


def look_through(folder: Path, *, max_resolution: int | None = None, previews: bool = False) -> Found:
    """The images of a folder with their captions.

    Args:
        max_resolution: an image of more pixels than the square of it is made smaller.
        previews: whether previews will be generated, so that their prompts are read.

    Raises:
        UsageError: a caption or the other half of a pair is missing, or an image is too small.
        ImageError: an image cannot be read.
    """
    if not is_folder(folder):
        raise UsageError(f"data: there is no folder {folder}: give the one with images and captions")
    files = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )
    for path in files:
        if not is_file(path):
            raise UsageError(f"data: {path} is no file, perhaps a link to one that is gone: remove it")
    images = [path for path in files if not path.stem.startswith(_PREVIEW)]
    if not images:
        raise UsageError(f"data: {folder} holds no image ({', '.join(SUFFIXES)}): put some there, each with NAME.txt")
    is_edit = any(path.stem.endswith(_TARGET) for path in images)
    items = list(_pairs(images) if is_edit else _captioned(images))
    for item in items:
        item.width, item.height = size_of(item.image, max_resolution)
        if item.input_image is not None:
            size_of(item.input_image, None)
    shown_before = _previews(folder, files, items, is_edit=is_edit) if previews else {}
    return Found(items, is_edit, shown_before)


def _captioned(images: list[Path]) -> Iterates[DataSpec]:
    stems = [path.stem for path in images]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        log.warning("%s: several images of one name share its caption: %s", images[0].parent, some(twice, 3))
    for image in images:
        yield DataSpec(image, None, _caption(image.with_suffix(".txt"), image))


def _pairs(images: list[Path]) -> Iterates[DataSpec]:
    by_stem = {path.stem: path for path in images}
    for image in images:
        base = image.stem.removesuffix(_SOURCE)
        if image.stem.endswith(_TARGET):
            continue
        if base == image.stem:
            raise UsageError(
                f"data: {image} is half of no pair, and others here are (NAME{_TARGET} and NAME{_SOURCE}): remove it, "
                "or give pairs alone"
            )
        if f"{base}{_TARGET}" not in by_stem:
            raise UsageError(f"data: {image} has no {base}{_TARGET} beside it, which would be made of it")
    for image in images:
        if image.stem.endswith(_TARGET):
            base = image.stem.removesuffix(_TARGET)
            source = by_stem.get(f"{base}{_SOURCE}")
            if source is None:
                raise UsageError(f"data: {image} has no {base}{_SOURCE} beside it, which it is made of")
            yield DataSpec(image, source, _caption(source.with_suffix(".txt"), image))


def _caption(path: Path, image: Path) -> str:
    if not is_file(path):
        raise UsageError(f"data: {image.name} has no caption: write {path.name} beside it, in {path.parent}")
    caption = _words(path)
    if "\0" in caption:
        raise UsageError(f"data: {path} is not text in UTF-8, perhaps in UTF-16: save it as UTF-8")
    if "\ufffd" in caption:
        log.warning("data: %s is not all UTF-8: what is not is read as \ufffd; save it as UTF-8", path)
    if not caption:
        raise UsageError(f"data: {path} is empty: write what {image.name} shows")
    return caption


def _words(path: Path) -> str:
    try:
        content = read_bounded(path, _LARGEST_CAPTION)
    except OSError as error:
        raise UsageError(f"data: {path} cannot be read ({error.strerror})") from None
    if len(content) > _LARGEST_CAPTION:
        raise UsageError(f"data: {path} has more than {_LARGEST_CAPTION:,} bytes: no caption is as long")
    return content.decode("utf-8-sig", errors="replace").strip()


def size_of(image: Path, max_resolution: int | None) -> tuple[int, int]:
    """What an image is resized to: its own size, made smaller if it is too large, in whole tokens."""
    from mflux.utils.picture_files import oriented_size

    width, height = oriented_size(image)
    if max_resolution is not None and width * height > max_resolution**2:
        scale = (max_resolution**2 / (width * height)) ** 0.5
        width, height = int(width * scale), int(height * scale)
    across, down = width // GRID * GRID, height // GRID * GRID
    if not (across and down):
        raise UsageError(
            f"data: {image} is too small or too narrow ({width} × {height}): {GRID} pixels a side at least"
        )
    if max(across, down) > LARGEST:
        raise UsageError(f"data: {image} is too large ({width} × {height}): {LARGEST:,} pixels a side at most")
    return across, down


def _previews(
    folder: Path, files: list[Path], items: list[DataSpec], *, is_edit: bool
) -> dict[str, tuple[str, Path | None]]:
    prompts = sorted((path for path in folder.glob(f"{_PREVIEW}*.txt") if is_file(path)), key=lambda path: path.name)
    images: dict[str, Path] = {}
    for path in files:
        if path.stem.startswith(_PREVIEW):
            if path.stem in images:
                raise UsageError(f"data: there are {images[path.stem].name} and {path.name}: keep one of them")
            images[path.stem] = path
    if images and not is_edit:
        raise UsageError(
            f"data: {min(images.values())}: a preview's image is only supported for edit training: remove it"
        )
    found: dict[str, tuple[str, Path | None]] = {}
    for path in prompts:
        if not (prompt := _words(path)):
            raise UsageError(f"data: {path} is empty: write what the preview is to show")
        if is_edit and path.stem not in images:
            raise UsageError(f"data: {path.name} has no image beside it ({path.stem}.png) that the preview edits")
        found[path.stem] = prompt, images.get(path.stem)
    return found or {items[0].image.stem: (items[0].prompt, items[0].input_image)}


def fingerprint(items: Sequence[DataSpec], root: Path, *, is_edit: bool) -> dict[str, Any]:
    """What tells a folder's data from others': names, as mflux 0.24 has them, and what the files hold."""

    def name(path: Path) -> str:
        here, base = path.resolve(), root.resolve()
        return str(here.relative_to(base)) if here.is_relative_to(base) else here.name

    paths = [item.image for item in items] + [item.input_image for item in items if item.input_image is not None]
    digests = {name(path): _digest(path) for path in paths}
    captions = {
        name((item.input_image or item.image).with_suffix(".txt")): hashlib.sha256(
            item.prompt.encode("utf-8", "replace")
        ).hexdigest()
        for item in items
    }
    return {
        "count": len(items),
        "images": sorted(name(item.image) for item in items),
        "input_images": sorted(name(item.input_image) for item in items if item.input_image is not None),
        "is_edit": is_edit,
        "hashes": digests | captions,
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- what a session holds of it


class DataItem:
    """One image as the model learns it.

    Attributes:
        image_name: the image's path.
        clean_latents: what the transformer takes, without noise: float32, a batch of one.
        cond: what it is told of the prompt, and of the image that an edit starts from, by name: batches of one.
        width, height: pixels.
    """

    def __init__(
        self,
        data_id: int,
        prompt: str,
        image_path: str | Path,
        clean_latents: mx.array,
        cond: dict[str, mx.array],
        width: int,
        height: int,
    ):
        self.data_id = data_id
        self.prompt = prompt
        self.image_name = str(image_path)
        self.clean_latents = clean_latents
        self.cond = cond
        self.width = int(width)
        self.height = int(height)


@dataclass
class Batch:
    """Images that one step learns from, and what draws their noise."""

    data: list[DataItem]
    rng: random.Random


class Dataset:
    def __init__(self, data: Sequence[Any]):
        self.data = data

    def size(self) -> int:
        return len(self.data)


class Iterator:
    """Goes through a dataset in batches, each epoch in another order; the arguments are where it stands.

    The order and what is drawn from `rng` are mflux 0.24's: a seed has the same run.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        num_epochs: int | None = None,
        seed: int | None = None,
        position: int = 0,
        epoch: int = 0,
        num_iterations: int = 0,
        current_permutation: list[int] | None = None,
        rng_state: tuple[Any, ...] | None = None,
        start_date_time: datetime.datetime | None = None,
    ):
        self.dataset = dataset
        self.batch_size = batch_size
        self.total_items = dataset.size()
        self.num_epochs = num_epochs
        self.seed = seed
        self.rng = random.Random(seed)
        self._position = position
        self._epoch = epoch
        self.num_iterations = num_iterations
        self.start_date_time = start_date_time or datetime.datetime.now()
        if rng_state is not None:
            self.rng.setstate(rng_state)
        self._current_permutation = self._shuffled() if current_permutation is None else current_permutation

    def _shuffled(self) -> list[int]:
        order = list(range(self.total_items))
        self.rng.shuffle(order)
        return order

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Batch:
        if self.num_epochs is not None and self._epoch >= self.num_epochs:
            raise StopIteration
        if self._position >= self.total_items:
            self._position = 0
            self._epoch += 1
            if self.num_epochs is not None and self._epoch >= self.num_epochs:
                raise StopIteration
            self._current_permutation = self._shuffled()
        stop = min(self._position + self.batch_size, self.total_items)
        chosen = self._current_permutation[self._position : stop]
        self._position = stop
        self.num_iterations += 1
        return Batch([self.dataset.data[number] for number in chosen], self.rng)

    def total_number_of_steps(self) -> int:
        """Batches of the whole run."""
        return -(-self.total_items // self.batch_size) * (self.num_epochs or 0)

    def get_validation_batch(self) -> Batch:
        """Some of the images, for an extra look at the loss; nothing is drawn from the run's own random numbers."""
        rng = random.Random(self.seed or 0)
        if self.total_items <= _MOST_LOOKED_AT:
            return Batch(list(self.dataset.data), rng)
        rng = random.Random((self.seed or 0) + 1337 + self.num_iterations)
        chosen = rng.sample(range(self.total_items), k=_MOST_LOOKED_AT)
        return Batch([self.dataset.data[number] for number in chosen], rng)

    def to_dict(self) -> dict[str, Any]:
        """Where it stands, as JSON has it."""
        return {
            "position": self._position,
            "epoch": self._epoch,
            "num_iterations": self.num_iterations,
            "current_permutation": list(self._current_permutation),
            "rng_state": list(self.rng.getstate()),
            "batch_size": self.batch_size,
            "num_epochs": self.num_epochs,
            "seed": self.seed,
            "start_date_time": self.start_date_time.strftime(_TIME),
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any], dataset: Dataset) -> Iterator:
        """One that stands where another stood.

        Raises:
            CheckpointError: the state makes no sense, or is another dataset's.
        """
        try:
            version, numbers, gauss = state["rng_state"]
            whole = [state[name] for name in ("position", "epoch", "num_iterations", "batch_size")]
            order, epochs, seed = state["current_permutation"], state["num_epochs"], state.get("seed")
            sensible = (
                all(type(number) is int and number >= 0 for number in (*whole, *order, *numbers))
                and sorted(order) == list(range(dataset.size()))
                and whole[0] <= dataset.size()
                and whole[3] > 0
                and (type(epochs) is int and epochs > 0)
                and (seed is None or type(seed) is int)
                # Mersenne's state: 624 words of 32 bits, and which of them is next.
                and version == 3
                and len(numbers) == 625
                and max(numbers[:-1]) < 2**32
                and numbers[-1] <= 624
                and (gauss is None or type(gauss) is float)
            )
            sensible = sensible and whole[2] <= _MOST_BATCHES and epochs <= _MOST_BATCHES and whole[3] <= _MOST_BATCHES
            begun = datetime.datetime.strptime(state["start_date_time"], _TIME)
            # A year has four digits where it is written again.
            sensible = sensible and begun.year >= 1970
        except (KeyError, TypeError, ValueError):
            sensible = False
        if not sensible:
            raise CheckpointError(
                f"the checkpoint's place in the data makes no sense for {dataset.size()} images: take "
                "another checkpoint"
            )
        return cls(
            dataset,
            whole[3],
            epochs,
            seed,
            whole[0],
            whole[1],
            whole[2],
            list(order),
            (version, tuple(numbers), gauss),
            begun,
        )


def described(items: Sequence[DataSpec]) -> str:
    """How many images of which sizes there are."""
    sizes: dict[tuple[int, int], int] = {}
    for item in items:
        sizes[item.width, item.height] = sizes.get((item.width, item.height), 0) + 1
    parts = [f"{number} of {width} × {height}" for (width, height), number in sorted(sizes.items())]
    return shown(some(parts, 4, counted=True), 300)
