"""What a run writes so that it can go on: mflux 0.24's ZIP, whole or not at all, and read as a stranger's.

    NNNNNNN_adapter.safetensors    the LoRA, float32
    NNNNNNN_optimizer.safetensors  MLX's state
    NNNNNNN_iterator.json          where the run is in its data, and its random numbers
    NNNNNNN_loss.json              the losses up to now
    NNNNNNN_config.json            what was configured, as it was read
    NNNNNNN_window.safetensors     gradients of batches that no step was taken with yet, if there are such
    checkpoint.json, run.json      which file is which, and what the data were

Members are found by the last part of their names, and nothing is unpacked to where a name says.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, cast

from mflux.errors import CheckpointError, OutputError
from mflux.text import shown, some
from mflux.utils.atomic_files import Temporary, remove_within, write_atomically
from mflux.utils.paths import is_file, is_folder
from mflux.utils.strict_json import NotJSON, parse
from mflux.utils.version_util import VersionUtil

if TYPE_CHECKING:
    from mflux.backend import mx
    from mflux.models.common.training.session import TrainingSession
    from mflux.models.common.training.spec import TrainingSpec

_MOST_MEMBERS = 100
_LARGEST_JSON = 64 << 20
# Beside its numbers, what a safetensors file may hold: names.
_LARGEST_HEADER = 16 << 20
_PIECE = 1 << 20
_TIME = "%Y-%m-%d %H:%M:%S"
_NAME = re.compile(r"(\d{7,})_checkpoint\.zip")
FOLDER = "checkpoints"


@dataclass
class Losses:
    """A loss for each batch, and now and then one of several images, and of those that are not learned from; each with
    its step and time."""

    step_loss: list[dict[str, Any]] = field(default_factory=list)
    batch_loss: list[dict[str, Any]] = field(default_factory=list)
    held_out_loss: list[dict[str, Any]] = field(default_factory=list)

    @staticmethod
    def entry(step: int, loss: float) -> dict[str, Any]:
        return {"step": step, "loss": loss, "time": datetime.now().strftime(_TIME)}

    @staticmethod
    def from_json(value: Any) -> Losses:
        """
        Raises:
            CheckpointError: it is none.
        """
        # Up to mflux 0.19.2 there was one list.
        table = {"batch_loss": value} if isinstance(value, list) else value
        try:
            found = {
                name: [
                    {"step": int(one["step"]), "loss": float(one["loss"]), "time": shown(one["time"], 40)}
                    for one in table.get(name, [])
                ]
                for name in ("step_loss", "batch_loss", "held_out_loss")
            }
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
            raise CheckpointError("the checkpoint's losses make no sense: take another checkpoint") from None
        return Losses(**found)


class Checkpoint:
    """A checkpoint's file, opened.

    Attributes:
        configuration: what the run was configured with.
        run: what is said of its data.
        is_of_024: whether mflux 0.24 or an older version wrote it.

    Raises:
        CheckpointError: it is damaged, or no checkpoint.
    """

    def __init__(self, path: Path):
        self.path = path
        if not is_file(path):
            raise CheckpointError(f"there is no checkpoint {path}: give --resume a …_checkpoint.zip")
        with self._opened() as archive:
            infos = archive.infolist()
            if len(infos) > _MOST_MEMBERS:
                raise CheckpointError(f"{path} holds {len(infos):,} files, and is no checkpoint of a training")
            self._members: dict[str, str] = {}
            for info in infos:
                name = info.filename.rpartition("/")[2]
                if name in self._members:
                    raise CheckpointError(f"{path} holds {shown(name)} twice")
                if name:
                    self._members[name] = info.filename
        about, self.run = self._json("checkpoint.json"), self._json("run.json")
        files = about.get("files")
        wanted = ("config", "optimizer", "lora_adapter", "iterator", "loss")
        if not isinstance(files, dict) or not all(isinstance(files.get(name), str) for name in wanted):
            raise CheckpointError(f"{path} is damaged: its checkpoint.json names no files")
        self._files: dict[str, str] = {name: str(files[name]) for name in (*wanted, "window") if name in files}
        self.configuration: dict[str, Any] = self._json(self._files["config"])
        self.is_of_024 = "mflux_version" not in self.run

    # ---- what it says

    def data_root(self) -> Path:
        """The folder of its data.

        Raises:
            CheckpointError: it is gone.
        """
        root, relative = self.run.get("data_root"), self.run.get("data_root_relative")
        places = [Path(root)] if isinstance(root, str) and "\0" not in root else []
        if isinstance(relative, str) and "\0" not in relative:
            places.append(self.path.absolute().parent / relative)
        for place in places:
            if is_folder(place):
                return place.resolve()
        raise CheckpointError(
            f"the data of {self.path} are neither in {shown(root, 300)} nor beside it: put the folder back"
        )

    def output_folder(self) -> Path:
        """Where the run goes on writing: the folder that holds `checkpoints/` with this file. Of a file that lies alone
        nothing but the folder's name is taken, below the working directory: it may come from anybody."""
        if self.path.absolute().parent.name == FOLDER:
            return self.path.absolute().parents[1]
        table = self.configuration.get("checkpoint")
        asked = table.get("output_path") if isinstance(table, dict) else None
        name = Path(asked).name if isinstance(asked, str) and "\0" not in asked else ""
        return Path(name or "training")

    def check(self, spec: TrainingSpec) -> None:
        """
        Raises:
            CheckpointError: the data are no longer those that were learned from.
        """
        told, now = self.run.get("data_fingerprint"), spec.fingerprint
        if not isinstance(told, dict):
            raise CheckpointError(f"{self.path} is damaged: it says nothing of its data")
        if self.run.get("model") not in (None, spec.model):
            raise CheckpointError(f"{self.path} is damaged: it says two models, {shown(self.run['model'])} is one")
        for name in ("is_edit", "count", "images", "input_images"):
            if told.get(name) is not None and told[name] != now[name]:
                differing = some(sorted(set(map(str, _list(told[name]))) ^ set(map(str, _list(now[name])))), 3)
                raise CheckpointError(f"{spec.data_root} is not what {self.path.name} learned from: {differing} differ")
        hashes = told.get("hashes")
        if isinstance(hashes, dict) and (changed := [name for name, one in now["hashes"].items()
                                                    if hashes.get(name) not in (None, one)]):  # fmt: skip
            raise CheckpointError(
                f"{some(changed, 3)} changed in {spec.data_root} since {self.path.name} was written: put them back, or "
                "begin anew with --config"
            )

    def iterator(self) -> dict[str, Any]:
        """Where the run is in its data."""
        state = self._json(self._files["iterator"])
        return state if "seed" in state else state | {"seed": self.configuration.get("seed")}

    def losses(self) -> Losses:
        return Losses.from_json(self._json(self._files["loss"], kind=(dict, list)))

    def put_into(self, session: TrainingSession) -> tuple[dict[str, mx.array], int]:
        """Give a session the factors and the optimizer's state; returns gradients that no step was taken with yet, and
        of how many batches they are the sum.

        Raises:
            CheckpointError: they are another model's, or damaged.
        """
        own = session.lora_weights()
        room = sum(value.nbytes for value in own.values())
        spelled = session.spelled()

        def name(text: str) -> str:
            """Without what stands before it, as our layers are called."""
            for prefix in ("transformer.", "diffusion_model."):
                text = text.removeprefix(prefix)
            path, dot, leaf = text.partition(".lora_")
            return f"{spelled.get(path, path)}{dot}{leaf}"

        weights = self._tensors(self._files["lora_adapter"], 2 * room)
        session.set_lora_weights({name(key): value for key, value in weights.items()})
        state = self._tensors(self._files["optimizer"], 4 * room + (1 << 20))
        session.optimizer.read(
            {key if "lora_" not in key else f"transformer.{name(key)}": value for key, value in state.items()}
        )
        if "window" not in self._files:
            return {}, 0
        window = self._tensors(self._files["window"], 2 * room)
        batches = window.pop("batches", None)
        if batches is None or window.keys() != own.keys():
            raise CheckpointError(f"{self.path} is damaged: its gradients are another adapter's")
        return window, int(cast(int, batches.item()))

    # ---- members

    @contextmanager
    def _opened(self) -> Iterator[zipfile.ZipFile]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                yield archive
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{self.path} is damaged, or no ZIP ({shown(error, 100)}): take another") from None
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror or error}") from None

    def _read(self, name: str, most: int, into: Callable[[bytes], object]) -> None:
        """Read a member piece by piece, no more of it than `most` bytes, whatever it says of its size."""
        if name not in self._members:
            raise CheckpointError(f"{self.path} is damaged: {shown(name)} is missing")
        with self._opened() as archive, archive.open(self._members[name]) as member:
            left = most
            while piece := member.read(min(_PIECE, left + 1)):
                left -= len(piece)
                if left < 0:
                    raise CheckpointError(f"{self.path}: {shown(name)} is larger than it can be here ({most:,} bytes)")
                into(piece)

    def _json(self, name: str, kind: Any = dict) -> Any:
        content = bytearray()
        self._read(name, _LARGEST_JSON, content.extend)
        try:
            value = parse(bytes(content))
        except NotJSON as error:
            raise CheckpointError(f"{self.path}: {shown(name)} {error}") from None
        if not isinstance(value, kind):
            raise CheckpointError(f"{self.path} is damaged: {shown(name)} is no JSON object")
        return value

    def _tensors(self, name: str, most: int) -> dict[str, mx.array]:
        """The arrays of a member, computed; they pass through a file of our own."""
        from mflux.backend import mx
        from mflux.checkpoints.readers.safetensors import SafetensorsFile

        place = Temporary(Path(tempfile.gettempdir()), is_folder=True)
        try:

            def write(file: BinaryIO) -> None:
                self._read(name, most + _LARGEST_HEADER, file.write)

            path = write_atomically(place.path / "member.safetensors", write, overwrite=True)
            try:
                file = SafetensorsFile(path)
                found = {key: file[key] for key in file}
            except CheckpointError as error:
                raise CheckpointError(str(error).replace(str(path), f"{self.path}: {name}")) from None
            mx.eval(found)
            return found
        finally:
            place.discard()


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


# ---- writing


def write(
    session: TrainingSession,
    iterator: Mapping[str, Any],
    losses: Losses,
    window: tuple[Mapping[str, mx.array], int] = ({}, 0),
) -> Path:
    """Write a run's state; returns the file, which is complete.

    Args:
        iterator: where the run is in its data.
        window: gradients that no step was taken with yet, and of how many batches they are the sum.

    Raises:
        OutputError: it cannot be written; there is none then.
    """
    from mflux.backend import mx
    from mflux.checkpoints.writing import serialised
    from mflux.models.common.training import lora

    spec = session.spec
    number = f"{iterator['num_iterations']:07d}"
    weights = {f"{session.adapter.prefix}.{name}": value for name, value in session.lora_weights().items()}
    about = lora.metadata(session.layers, model=spec.model, beside=session.shapes)
    tensors: dict[str, tuple[Mapping[str, mx.array], Mapping[str, str] | None]] = {
        "lora_adapter": (weights, about),
        "optimizer": (session.optimizer.arrays(), None),
    }
    gradients, batches = window
    if batches:
        tensors["window"] = {**gradients, "batches": mx.array(batches, mx.int32)}, None
    written = {"lora_adapter": "adapter"}
    files = {name: f"{number}_{written.get(name, name)}.safetensors" for name in tensors}
    texts: dict[str, Any] = {"iterator": iterator, "loss": vars(losses), "config": spec.configuration}
    files |= {name: f"{number}_{name}.json" for name in texts}
    folder = Path(spec.checkpoint.output_path) / FOLDER
    begun, now = datetime.strptime(iterator["start_date_time"], _TIME), datetime.now()
    plain = {
        "checkpoint.json": {
            "metadata": {
                "start": iterator["start_date_time"],
                "end": now.strftime(_TIME),
                "duration": in_words(int((now - begun).total_seconds())),
                "number_of_training_data": len(spec.data),
            },
            "files": files,
        },
        "run.json": {
            "version": 1,
            "created_at": now.strftime(_TIME),
            "mflux_version": VersionUtil.get_mflux_version(),
            "model": spec.model,
            "is_edit": spec.is_edit,
            "data_root": spec.data_root,
            "data_root_relative": os.path.relpath(spec.data_root or ".", folder.absolute()),
            "data_fingerprint": spec.fingerprint,
            "checkpoint_files": files,
        },
    }

    def fill(file: IO[bytes]) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name, (arrays, header) in tensors.items():
                with archive.open(files[name], "w", force_zip64=True) as member:
                    for piece in serialised(arrays, header):
                        member.write(piece)
            for name, value in texts.items():
                archive.writestr(files[name], json.dumps(value))
            for name, value in plain.items():
                archive.writestr(name, json.dumps(value, indent=4))
        file.flush()
        os.fsync(file.fileno())

    path = write_atomically(folder / f"{number}_checkpoint.zip", fill, overwrite=True)
    if spec.checkpoint.keep is not None:
        kept = {path} | ({spec.resumed.path.absolute()} if spec.resumed is not None else set())
        _remove_older(folder, spec.checkpoint.keep, kept)
    return path


def _remove_older(folder: Path, keep: int, others: set[Path]) -> None:
    """Leave the newest by their numbers, and what a run has just written or gone on from, whatever its number."""
    found = sorted((int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)))
    for _, path in found[:-keep]:
        if path in others or path.absolute() in others:
            continue
        try:
            remove_within(path, folder)
        except OSError as error:
            raise OutputError(f"cannot remove {path}: {error.strerror or error}") from None


def in_words(seconds: int) -> str:
    """ "2 hours and 1 minute and 5 seconds"."""
    hours, rest = divmod(seconds, 3600)
    parts = [(hours, "hour"), (rest // 60, "minute"), (rest % 60, "second")]
    said = [f"{number} {noun}{'' if number == 1 else 's'}" for number, noun in parts if number]
    return " and ".join(said) or "0 seconds"
