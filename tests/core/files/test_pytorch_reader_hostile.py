"""PyTorch files that are out to do harm: each ends in one sentence, quickly, and nothing of it runs."""

from __future__ import annotations

import builtins
import copyreg
import functools
import importlib
import io
import operator
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from support.mutations import mutated
from support.torch_archives import (
    Call,
    Global,
    Persistent,
    archive,
    legacy,
    parameter,
    pickled,
    save,
    spelled,
    storage,
    tensor,
    tensor_v3,
    zipped,
)

from mflux.checkpoints import load_checkpoint
from mflux.checkpoints.readers.pytorch import PytorchFile
from mflux.checkpoints.readers.zip_records import read_records
from mflux.errors import CheckpointError, MfluxError, UnsafeCheckpointError

SIX = np.arange(6, dtype=np.float32).tobytes()
ORDERED = Global("collections", "OrderedDict")


@contextmanager
def bounded(seconds: float = 1.0, megabytes: int = 512):
    """Fails where the block takes longer, or asks for more address space than so much on top of what is in use.

    The processor's time counts, so that a busy machine changes nothing.
    """
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (megabytes << 20), limits[1]))
    start = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert time.process_time() - start < seconds


def refused(tmp_path, content: bytes, words: str = "", error: type = UnsafeCheckpointError) -> None:
    path = save(tmp_path / "hostile.pt", content)
    with bounded(), pytest.raises(error, match=words or None) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


# ---- code


class Reduced:
    """Pickles as the call it is given."""

    def __init__(self, *reduction):
        self.reduction = reduction

    def __reduce__(self):
        return self.reduction


def gadgets(marker: str) -> dict[str, object]:
    """Objects that make the file `marker` when Python unpickles them, by well-known ways."""
    shell = f"touch '{marker}'"
    statement = f"open({marker!r}, 'w').close()"
    system = Reduced(getattr, (os_module(), "system"))
    return {
        "os.system": Reduced(os.system, (shell,)),
        "subprocess": Reduced(subprocess.check_call, (["touch", marker],)),
        "eval": Reduced(builtins.eval, (statement,)),
        "exec": Reduced(builtins.exec, (statement,)),
        "open": Reduced(builtins.open, (marker, "w")),
        "importlib": Reduced(operator.methodcaller("system", shell), (os_module(),)),
        "getattr": Reduced(operator.call, (system, shell)),
        "operator": Reduced(operator.call, (Reduced(operator.attrgetter("system"), (os_module(),)), shell)),
        "reduce": Reduced(functools.reduce, (operator.call, [os.system, shell])),
        "map": Reduced(list, (Reduced(map, (os.system, [shell])),)),
        "below a tensor's name": {"state_dict": {"weight": Reduced(os.system, (shell,))}},
        "as a key": {Reduced(os.system, (shell,)): 1},
        "state": Reduced(copyreg._reconstructor, (Opened, object, None), {"marker": marker}),
    }


def os_module() -> Reduced:
    return Reduced(importlib.import_module, ("os",))


class Opened:
    def __setstate__(self, state):
        Path(state["marker"]).touch()


@pytest.mark.parametrize("name", sorted(gadgets("")))
@pytest.mark.parametrize("container", ["zip", "legacy", "legacy header"])
def test_no_gadget_runs(tmp_path, name, container):
    marker = tmp_path / "marker"
    stream = pickle.dumps(gadgets(str(marker))[name], protocol=2)
    # The control: Python's own unpickler does what the file asks for.
    made = pickle.loads(stream)
    assert marker.exists()
    if isinstance(made, io.IOBase):
        made.close()
    marker.unlink()
    content = {"zip": archive(stream, {}), "legacy": legacy(stream, {}), "legacy header": stream}[container]
    refused(tmp_path, content, "asks for ")
    assert not marker.exists()


@pytest.mark.parametrize(
    "root",
    [
        Global("os", "system"),
        Global("builtins", "getattr"),
        Global("torch", "load"),
        Global("torch.hub", "load"),
        Global("torch.storage", "_load_from_bytes"),
        Global("torch._utils", "_rebuild_tensor_v2.__globals__"),
        Global("collections", "OrderedDict.__init__"),
        Global("torch.nn.modules.linear", "Linear"),
        Global("my_wrappers", "QuantizedSubclass"),
    ],
)
def test_names_outside_the_table_are_named(tmp_path, root):
    refused(tmp_path, archive({"w": root}, {}), f"asks for {root.module}.{root.name}")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "asks for os.system"),
        (b"(S'true'\nios\nsystem\n.", "never writes"),
        (b"(ios\nsystem\n.", "makes an instance"),
        (b"(c__builtin__\nset\no.", "makes an instance"),
        (b"\x82\x01.", "extension registry"),
        (b"\x83\x01\x00.", "extension registry"),
        (b"P1\n.", "never writes"),
        (b"\x97.", "outside the file"),
        # Calls of what is no function, and attributes of what has none.
        (b"K\x01)R.", "no function"),
        (b"ctorch\nfloat32\n)R.", "no function"),
        (b"ctorch\nFloatStorage\n)\x81.", "no function"),
        (b"ctorch\nSize\n}b.", "attributes of something that has none"),
        (b"ccollections\nOrderedDict\n)}(K\x01K\x02u\x92.", "keywords"),
    ],
)
def test_instructions_that_reach_outside(tmp_path, code, words):
    refused(tmp_path, archive(code, {}), words)


def test_a_wrapper_subclass_is_refused(tmp_path):
    inner = Call(Global("torch._utils", "_rebuild_wrapper_subclass"), (Global("torch", "Tensor"),))
    refused(tmp_path, archive({"w": inner}, {}), "subclass that wraps others")


# ---- limits: recursion, memory, time


def nested_calls(depth: int) -> bytes:
    """`_rebuild_from_type_v2` handed to itself, one inside the other."""
    typed = spelled(Global("torch._tensor", "_rebuild_from_type_v2"))
    kind = spelled(Global("torch", "Tensor"))
    return typed + (b"(" + typed + kind) * depth + b")" + b"Nt" * depth + b"R."


BOMBS = {
    # Each dictionary holds the one before it ten times: 10^60 names.
    "dictionaries": b"}q\x00"
    + b"".join(
        b"}(" + b"".join(b"K" + bytes([k]) + b"h" + bytes([i]) for k in range(10)) + b"uq" + bytes([i + 1])
        for i in range(60)
    )
    + b".",
    "a dictionary in itself": b"}q\x00(" + spelled("a") + b"h\x00" + spelled("b") + b"h\x00u.",
    "a list in itself": b"]q\x00(h\x00h\x00e.",
    "deep dictionaries": b"}" + (spelled("k") + b"}") * 5000 + b"s" * 5000 + b".",
    "deep tuples": b")" + b"\x85" * 100_000 + b".",
    "deep lists": b"]" * 100_000 + b"a" * 99_999 + b".",
    "endless names": b"".join(b"}" + spelled("k" * 100) for _ in range(60)) + b"N" + b"s" * 60 + b".",
    "a list handed to many": b"]("
    + b"(K\x01K\x02t" * 5_000
    + b"eq\x00]("
    + (spelled(ORDERED) + b"h\x00\x85R") * 5_000
    + b"e.",
    "calls in calls": nested_calls(5000),
    "marks": b"(" * 500_000 + b".",
    "numbers": b"\x8b\xff\xff\xff\x7f" + b"\1" * 1000,
    "a long number": b"\x8b" + struct.pack("<I", 500_000) + b"\x7f" * 500_000 + b".",
    "digits": b"L" + b"9" * 500_000 + b"L\n.",
    "text longer than the file": b"X\xff\xff\xff\xff" + b"a" * 100,
    "text of 2^63 bytes": b"\x8d" + b"\xff" * 8 + b"a",
    "a far memo": b"}r\xff\xff\xff\xff.",
    "a frame of 2^63 bytes": b"\x80\x04\x95" + b"\xff" * 8 + b"N",
    "equal hashes": b"}(" + b"".join(spelled(k * (2**61 - 1)) + b"N" for k in range(20_000)) + b"u.",
    "popping below a mark": b"K\x01(00t.",
    "items for no dictionary": b"](K\x01K\x02u.",
    "an odd number of items": b"}(K\x01u.",
    "no value": b".",
    "no end": b"}}}",
}


@pytest.mark.parametrize("name", sorted(BOMBS))
@pytest.mark.parametrize("container", [archive, legacy])
def test_bombs_end_within_their_bounds(tmp_path, name, container):
    refused(tmp_path, container(BOMBS[name], {}), error=CheckpointError)


@pytest.mark.parametrize(
    ("root", "words"),
    [
        (tensor("0", (2, 3), (3, 1), 1, count=6), "reaches to byte 28 of a storage of 24"),
        (tensor("0", (2, 3), (30, 1), count=6), "reaches to byte"),
        (tensor("0", (2, 3), (2**62, 1), count=6), "reaches to byte"),
        (tensor("0", (3,), (-1,), 2, count=6), "negative"),
        (tensor("0", (-3,), (1,), count=6), "negative"),
        (tensor("0", (-1, -6), (1, 1), count=6), "negative"),
        (tensor("0", (3,), (1,), -1, count=6), "negative"),
        (tensor("0", (True,), (1,), count=6), "make no sense"),
        (tensor("0", (3.0,), (1,), count=6), "make no sense"),
        (tensor("0", (3,), (1, 1), count=6), "make no sense"),
        (tensor("0", (1,) * 100, (1,) * 100, count=6), "make no sense"),
        (tensor("0", (2**40,), (0,), count=6), "beyond all bounds"),
        (tensor("0", (2**40, 0), (0, 0), count=6), "beyond all bounds"),
        (tensor("0", (2**20, 2**20), (0, 0), count=6), "its tensors take"),
        ([tensor("0", (2**20,), (0,), count=6)] * 50, "its tensors take"),
        (tensor("0", count=7), "claims 28 bytes and has 24"),
        (tensor("0", count=2**50), "the whole file has"),
        (tensor("0", (2, 3), metadata={"evil": True}), "marks that are unknown"),
        (tensor_v3("0", "float64", (6,), 24), "reaches to byte 48 of a storage of 24"),
    ],
)
def test_tensors_that_want_more_than_they_have(tmp_path, root, words):
    refused(tmp_path, archive({"w": root}, {"0": SIX}), words)


def test_a_quantized_tensor_outside_its_storage(tmp_path):
    arguments = (storage("0", "QInt8Storage", 24), 0, (5, 5), (5, 1), (Global("torch", "per_tensor_affine"), 0.1, 0))
    call = Call(Global("torch._utils", "_rebuild_qtensor"), (*arguments, False, Call(ORDERED, ())))
    refused(tmp_path, archive({"w": call}, {"0": SIX}), "reaches to byte 25 of a storage of 24")


@pytest.mark.parametrize(
    "identity",
    [
        None,
        (),
        ("storage",),
        ("module", Global("torch", "FloatStorage"), "0", "cpu", 6),
        ("storage", Global("torch", "float32"), "0", "cpu", 6),
        ("storage", Global("torch", "FloatStorage"), 0, "cpu", 6),
        ("storage", Global("torch", "FloatStorage"), "0", "cpu", -6),
        ("storage", Global("torch", "FloatStorage"), "0", "cpu", "6"),
        ("storage", Global("torch", "FloatStorage"), "../data.pkl", "cpu", 6),
        ("storage", Global("torch", "FloatStorage"), "9", "cpu", 6),
    ],
)
def test_references_to_data_that_make_no_sense(tmp_path, identity):
    refused(tmp_path, archive({"w": Persistent(identity)}, {"0": SIX}), error=CheckpointError)
    refused(tmp_path, legacy({"w": Persistent(identity)}, {"0": (6, SIX)}), error=CheckpointError)


@pytest.mark.parametrize(
    ("storages", "keys"),
    [
        ({"0": (7, SIX)}, None),
        ({"0": (-6, SIX)}, None),
        ({"0": (2**61, SIX)}, None),
        ({"0": (6, SIX)}, []),
        ({"0": (6, SIX)}, ["0", "0"]),
        ({"0": (6, SIX)}, ["0", "1"]),
        ({"0": (6, SIX)}, [0]),
        ({"0": (6, SIX)}, {"0": 1}),
        ({"0": (6, SIX[:-1])}, None),
    ],
)
def test_legacy_data_that_do_not_match(tmp_path, storages, keys):
    refused(tmp_path, legacy({"w": tensor("0")}, storages, keys), error=CheckpointError)


def test_legacy_data_of_two_dtypes(tmp_path):
    root = {"w": tensor("0"), "v": tensor("0", kind="IntStorage")}
    refused(tmp_path, legacy(root, {"0": (6, SIX)}), "makes no sense", CheckpointError)


def test_legacy_parts_outside_their_storage(tmp_path):
    part = Persistent(("storage", Global("torch", "FloatStorage"), "0", "cpu", 6, ("view", 4, 3)))
    refused(tmp_path, legacy({"w": part}, {"0": (6, SIX)}), "lies outside it")


# ---- archives


def central(content: bytes) -> int:
    return content.index(b"PK\x01\x02")


def patched(content: bytes, at: int, code: str, value: int) -> bytes:
    changed = bytearray(content)
    struct.pack_into(code, changed, at, value)
    return bytes(changed)


GOOD = archive({"w": tensor("0")}, {"0": SIX})
LAST = GOOD.rindex(b"PK\x05\x06")


def overlapping() -> bytes:
    """Two entries of the directory that lie on the same bytes under names of their own."""
    names = (b"a/data.pkl", b"a/data/000")
    stream = pickled({})
    inner = b"PK\x03\x04" + struct.pack("<5H3I2H", 20, 0, 0, 0, 0, 0, 4, 4, 10, 0)
    # The second record's header stands inside the first one's data.
    data = stream + inner + names[1] + b"abcd"
    first = b"PK\x03\x04" + struct.pack("<5H3I2H", 20, 0, 0, 0, 0, 0, len(data), len(data), 10, 0) + names[0]
    body = first + data
    directory = b""
    for name, size, offset in ((names[0], len(data), 0), (names[1], 4, len(first) + len(stream))):
        directory += b"PK\x01\x02" + struct.pack(
            "<6H3I5H2I", 20, 20, 0, 0, 0, 0, 0, size, size, 10, 0, 0, 0, 0, 0, offset
        )
        directory += name
    return body + directory + b"PK\x05\x06" + struct.pack("<4H2IH", 0, 0, 2, 2, len(directory), len(body), 0)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_torch_would_not_write(tmp_path):
    compressed = zipped({"data.pkl": pickled({}), "data/0": bytes(10_000_000)}, method=zipfile.ZIP_DEFLATED)
    assert len(compressed) < 20_000
    refused(tmp_path, compressed, "compressed")
    path = tmp_path / "twice.zip"
    with zipfile.ZipFile(path, "w") as twice:
        for data in (pickled({}), pickled({"w": tensor("0")})):
            twice.writestr("a/data.pkl", data)
    refused(tmp_path, path.read_bytes(), "stands twice")
    refused(tmp_path, overlapping(), "overlap")
    refused(tmp_path, patched(GOOD, central(GOOD) + 8, "<H", 1), "encrypted")
    two = zipped({"a/data.pkl": pickled({}), "b/data.pkl": pickled({})}, prefix="")
    refused(tmp_path, two, "not one that torch.save wrote", CheckpointError)


@pytest.mark.parametrize(
    ("at", "code", "value"),
    [
        (LAST + 8, "<H", 9),
        (LAST + 10, "<H", 9),
        (LAST + 10, "<H", 0xFFFF),
        (LAST + 12, "<I", 2**32 - 2),
        (LAST + 16, "<I", 2**32 - 2),
        (LAST + 16, "<I", 0),
        (LAST + 20, "<H", 1),
        (central(GOOD) + 24, "<I", 2**32 - 2),
        (central(GOOD) + 24, "<I", 2**32 - 1),
        (central(GOOD) + 28, "<H", 2**16 - 1),
        (central(GOOD) + 30, "<H", 2**16 - 1),
        (central(GOOD) + 42, "<I", 2**32 - 2),
        (central(GOOD) + 42, "<I", 1),
        (26, "<H", 2**16 - 1),
        (28, "<H", 2**16 - 1),
        (8, "<H", 8),
    ],
)
def test_directories_that_lie(tmp_path, at, code, value):
    refused(tmp_path, patched(GOOD, at, code, value), error=CheckpointError)


def test_a_directory_beyond_4_gb_is_read_by_its_wide_fields():
    stream = pickled({})
    names = {b"a/data.pkl": stream, b"a/version": b"3\n"}
    body, directory = b"", b""
    for name, data in names.items():
        wide = struct.pack("<2H3Q", 1, 24, len(data), len(data), len(body))
        directory += b"PK\x01\x02" + struct.pack(
            "<6H3I5H2I", 45, 45, 0, 0, 0, 0, 0, 2**32 - 1, 2**32 - 1, len(name), len(wide), 0, 0, 0, 0, 2**32 - 1
        )
        directory += name + wide
        body += b"PK\x03\x04" + struct.pack("<5H3I2H", 45, 0, 0, 0, 0, 0, 0, 0, len(name), 0) + name + data
    end = b"PK\x06\x06" + struct.pack("<Q2H2I4Q", 44, 45, 45, 0, 0, 2, 2, len(directory), len(body))
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, len(body) + len(directory), 1)
    last = b"PK\x05\x06" + struct.pack("<4H2IH", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)
    content = body + directory + end + locator + last
    records = read_records(memoryview(content), "test")
    assert {name: content[r.start : r.start + r.length] for name, r in records.items()} == {
        name.decode(): data for name, data in names.items()
    }


# ---- damage


def a_file_of_everything(old: bool) -> bytes:
    root = {
        "state_dict": {
            "f": tensor("0"),
            "t": tensor("0", (3, 2), (1, 3), count=6),
            "h": parameter(tensor("1", (4,), kind="HalfStorage")),
            "u": tensor_v3("2", "uint16", (2,), 4),
            "e": tensor_v3("2", "float8_e5m2", (4,), 4),
            "c": tensor("3", (1,), kind="ComplexFloatStorage", metadata={"conj": True}),
        },
        "epoch": 3,
        "lr": [0.1, None, True, ("text", b"bytes")],
        "big": 2**70,
    }
    storages = {"0": SIX, "1": bytes(8), "2": bytes(4), "3": bytes(8)}
    if old:
        counts = {"0": 6, "1": 4, "2": 4, "3": 1}
        return legacy(root, {key: (counts[key], data) for key, data in storages.items()})
    return archive(root, storages)


@pytest.mark.parametrize("old", [False, True])
def test_a_file_cut_anywhere_is_an_error(tmp_path, old):
    content = a_file_of_everything(old)
    assert len(load_checkpoint(save(tmp_path / "whole.pt", content))) == 6
    for percent in range(100):
        refused(tmp_path, content[: len(content) * percent // 100], error=CheckpointError)
    # And at each byte of the end, where the directory and the last storage are.
    for missing in range(1, 60):
        refused(tmp_path, content[:-missing], error=CheckpointError)


ZIP, OLD = a_file_of_everything(False), a_file_of_everything(True)
_RECORDS = read_records(memoryview(ZIP), "test")
STREAM = ZIP[_RECORDS["archive/data.pkl"].start :][: _RECORDS["archive/data.pkl"].length]
STORAGES = {"0": SIX, "1": bytes(8), "2": bytes(4), "3": bytes(8)}


@pytest.mark.parametrize("what", ["archive", "stream", "legacy"])
def test_mutated_files_end_in_success_or_one_sentence(tmp_path, what):
    """7,000 files each, so 21,000: whatever a file says, it is read, or refused by a `MfluxError`, in bounded time
    and space."""
    choose = random.Random(f"mflux {what}")
    path = tmp_path / "mutated.pt"
    outcomes: dict[str, int] = {}
    slowest = 0.0
    with bounded(seconds=120, megabytes=256):
        for _ in range(7000):
            if what == "stream":
                content = archive(mutated(STREAM, choose), STORAGES)
            else:
                content = mutated(ZIP if what == "archive" else OLD, choose)
            path.unlink(missing_ok=True)
            path.write_bytes(content)
            start = time.process_time()
            try:
                file = PytorchFile(path)
                for name in file:
                    file[name].tolist()
                outcome = "read"
            except MfluxError as error:
                assert "\n" not in str(error)
                outcome = type(error).__name__
            slowest = max(slowest, time.process_time() - start)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert slowest < 1
    # The changes must reach all the way through: some harmless, some damage, some requests that are refused.
    assert set(outcomes) >= {"read", "CheckpointError", "UnsafeCheckpointError"}, outcomes


def test_random_streams_of_instructions(tmp_path):
    """Streams of nothing but instructions and names that are allowed: they get further than flipped bytes."""
    choose = random.Random(24)
    pieces = [
        *(bytes([code]) for code in b"(.N)}]\x85\x86\x87\x88\x89tRQbuseaq0\x81"),
        *(spelled(value) for value in (0, 1, 6, -1, 2**40, "0", "storage", "cpu", (2, 3), 0.5)),
        *(
            spelled(Global("torch._utils", f"_rebuild_{name}"))
            for name in ("tensor_v2", "tensor_v3", "parameter", "qtensor")
        ),
        *(spelled(Global("torch", name)) for name in ("FloatStorage", "float32", "Size", "Tensor", "device")),
        *(spelled(value) for value in (ORDERED, tensor("0"), storage("0"), parameter(tensor("0")), {"w": tensor("0")})),
        *(b"q\x00", b"h\x00", b"q\x01", b"h\x01"),
    ]
    path = tmp_path / "random.pt"
    with bounded(seconds=60, megabytes=256):
        for _ in range(2000):
            stream = b"".join(choose.choice(pieces) for _ in range(choose.randrange(2, 40))) + b"."
            path.unlink(missing_ok=True)
            path.write_bytes(archive(stream, {"0": SIX}))
            try:
                file = PytorchFile(path)
                for name in file:
                    file[name].tolist()
            except MfluxError as error:
                assert str(path) in str(error)
