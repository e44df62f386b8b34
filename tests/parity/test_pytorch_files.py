"""The native reader against torch: the same file, the same bits."""

from __future__ import annotations

import collections
import io
import zipfile

import numpy as np
import pytest
import torch

from mflux.backend import mx
from mflux.checkpoints import load_checkpoint, open_checkpoint
from mflux.checkpoints.readers.pytorch import PytorchFile
from mflux.cli.convert import main
from mflux.errors import CheckpointError, UnsafeCheckpointError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CONTAINERS = ("zip", "legacy", "big endian")
BIT_FOR_BIT = (
    torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8,
    torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64,
)  # fmt: skip
# torch 2.13 saves these in the legacy stream but fails to load them, and forgets to swap them on loading a file from a
# big-endian machine; there only what was saved can be compared with.
NO_STORAGE_CLASS = (torch.uint16, torch.uint32, torch.uint64)


def any_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A tensor of arbitrary bits, NaNs and denormals included."""
    if dtype is torch.bool:
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    width = torch.empty((), dtype=dtype).element_size()
    raw = np.random.default_rng(seed).integers(0, 256, (int(np.prod(shape)), width), dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).reshape(shape)


def save(obj, path, container: str = "zip", **options):
    if container == "big endian":
        return save_big_endian(obj, path)
    torch.save(obj, path, _use_new_zipfile_serialization=container == "zip", **options)
    return path


def save_big_endian(obj, path):
    """What torch would write on a big-endian machine: every storage swapped, the record `byteorder` saying so."""
    plain, file = io.BytesIO(), io.BytesIO()
    torch.save(obj, plain)
    widths = storage_widths(obj)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(file, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("/byteorder"):
                data = b"big"
            elif "/data/" in name:
                data = np.frombuffer(data, f"u{widths.pop(0)}").byteswap().tobytes()
            target.writestr(name, data)
    path.write_bytes(file.getvalue())
    return path


def storage_widths(obj) -> list[int]:
    """The width of what is swapped in each storage, in the order in which torch numbers them."""
    widths = {}
    for value in obj.values():
        width = value.element_size() // (2 if value.is_complex() else 1)
        widths.setdefault(value.untyped_storage().data_ptr() or id(value), width)
    return list(widths.values())


def bits(value: mx.array | torch.Tensor) -> bytes:
    if isinstance(value, torch.Tensor):
        value = value.detach().contiguous().resolve_conj().resolve_neg()
        return value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    return bytes(memoryview(mx.contiguous(value.reshape(-1)).view(mx.uint8))) if value.size else b""


def assert_same(found: mx.array, expected: torch.Tensor) -> None:
    assert str(found.dtype).removeprefix("mlx.core.").rstrip("_") == str(expected.dtype).removeprefix("torch.")
    assert tuple(found.shape) == tuple(expected.shape)
    assert bits(found) == bits(expected)


def assert_equal_to_torch(path) -> None:
    """The same names in the same order, and the same bits under each."""
    expected = torch.load(path, weights_only=False)
    found = load_checkpoint(path, key="")
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert_same(found[name], value)


def assert_equal_to_saved(path, tensors: dict[str, torch.Tensor]) -> None:
    found = load_checkpoint(path, key="")
    assert list(found) == list(tensors)
    for name, value in tensors.items():
        assert_same(found[name], value)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("dtype", BIT_FOR_BIT, ids=str)
def test_every_dtype_bit_for_bit(tmp_path, dtype, container):
    tensors = {"w": any_bits((3, 5), dtype, 1), "v": any_bits((7,), dtype, 2), "s": any_bits((), dtype, 3)}
    path = save(tensors, tmp_path / "w.pt", container)
    assert_equal_to_saved(path, tensors)
    if container == "zip" or dtype not in NO_STORAGE_CLASS:
        assert_equal_to_torch(path)


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_dtype_in_one_file(tmp_path, container):
    tensors = {str(dtype): any_bits((2, 3), dtype, seed) for seed, dtype in enumerate(BIT_FOR_BIT)}
    assert_equal_to_saved(save(tensors, tmp_path / "w.pt", container), tensors)


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_float64_after_its_cast(tmp_path, container):
    values = torch.cat([any_bits((500,), torch.float64), torch.tensor([1e300, -1e-300, 0.1, float("nan")]).double()])
    values = values[~values.isnan()]
    found = load_checkpoint(save({"w": values}, tmp_path / "w.pt", container))["w"]
    assert_same(found, values.float())


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8_by_value(tmp_path, container, dtype):
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    found = np.array(load_checkpoint(save({"w": every}, tmp_path / "w.pt", container))["w"])
    np.testing.assert_array_equal(found, every.float().numpy())


def test_complex128_is_a_clear_error(tmp_path):
    path = save({"w": torch.zeros(2, dtype=torch.complex128)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"w has the dtype complex128, .*: save it as complex64"):
        load_checkpoint(path)


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_views_offsets_strides_and_shapes(tmp_path, container):
    base = torch.randn(4, 6, 5)
    flat = base.reshape(-1)
    complex_base = torch.randn(3, 4, dtype=torch.complex64)
    tensors = {
        "whole": base,
        "transposed": base.transpose(0, 2),
        "permuted": base.permute(1, 2, 0),
        "slice": base[1:3, ::2, 1],
        "offset": flat[17:29],
        "strided": flat.as_strided((3, 4), (7, 2), 5),
        "overlapping": flat.as_strided((10, 5), (1, 1)),
        "expanded": torch.randn(3, 1).expand(3, 7),
        "diagonal": base[:, :, 0].diagonal(),
        "empty": torch.zeros(0, 3),
        "empty view": base[2:2],
        "scalar": torch.tensor(2.5),
        "element": base[1, 2, 3],
        "many axes": torch.randn(1, 2, 1, 2, 1, 2, 1, 2),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    assert_equal_to_torch(save(tensors, tmp_path / "w.pt", container))
    if container == "zip":  # the legacy stream does not keep these marks
        assert_equal_to_torch(save({"c": complex_base.conj(), "h": complex_base.mH}, tmp_path / "c.pt"))
        assert_equal_to_torch(save({"i": complex_base.conj().imag}, tmp_path / "i.pt"))


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_shared_storages_stand_in_full_under_each_name(tmp_path, container):
    shared = torch.randn(20, 4)
    tensors = {"a": shared, "b": shared, "rows": shared[5:9], "t": shared.t(), "c": shared.clone()}
    path = save(tensors, tmp_path / "w.pt", container)
    assert_equal_to_torch(path)
    file = PytorchFile(path)
    assert len({id(file.infos[name].storage) for name in ("a", "b", "rows", "t")}) == 1
    assert main([str(path), str(tmp_path / "w.safetensors")]) == 0
    converted = load_checkpoint(tmp_path / "w.safetensors")
    for name, value in tensors.items():
        assert_same(converted[name], value)


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(9, 4)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
        self.norm = torch.nn.BatchNorm1d(4)
        self.head = torch.nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_a_modules_state_with_parameters_and_wrappers(tmp_path, container):
    network = Network()
    state = network.state_dict()
    assert_equal_to_torch(save(state, tmp_path / "state.pt", container))
    parallel = torch.nn.DataParallel(network).state_dict()
    optimizer = torch.optim.Adam(network.parameters())
    for wrapped in (
        {"state_dict": state, "epoch": 7},
        {"model": collections.OrderedDict(state), "args": {"lr": 0.1, "betas": (0.9, 0.99)}},
        {"state_dict": parallel, "optimizer": optimizer.state_dict()},
        parallel,
    ):
        found = load_checkpoint(save(wrapped, tmp_path / "wrapped.pt", container))
        assert list(found) == list(state)
        for name, value in state.items():
            assert_same(found[name], value)
    parameters = dict(network.named_parameters())
    found = load_checkpoint(save(parameters, tmp_path / "parameters.pt", container))
    for name, value in parameters.items():
        assert_same(found[name], value)
    # After a step the optimizer holds tensors too: nothing is taken off or lost, and the key selects.
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    path = save({"state_dict": state, "optimizer": optimizer.state_dict()}, tmp_path / "trained.pt", container)
    assert {name.split(".")[0] for name in load_checkpoint(path)} == {"state_dict", "optimizer"}
    assert list(load_checkpoint(path, "state_dict")) == list(state)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_every_protocol_and_odd_names(tmp_path, protocol, container):
    names = ["", "a b", "ünï.cödé", "重み", "🔑", "tab\t", "line\nbreak", "quote'\"", "x" * 1000, "null\0"]
    tensors = {name: torch.full((2,), float(i)) for i, name in enumerate(names)}
    assert_equal_to_torch(save(tensors, tmp_path / "w.pt", container, pickle_protocol=protocol))


def test_attributes_on_tensors(tmp_path):
    tensor, parameter = torch.randn(3), torch.nn.Parameter(torch.randn(2))
    tensor.note, parameter.tag = "kept by torch", 3
    assert_equal_to_torch(save({"t": tensor, "p": parameter}, tmp_path / "w.pt"))


def test_nested_dictionaries_and_lists(tmp_path):
    layers = [torch.ones(1), {"w": torch.zeros(2)}]
    tree = {"enc": {"layers": layers}, "pair": (torch.ones(3), "text"), 5: {"x": torch.ones(4)}}
    path = save(tree, tmp_path / "w.pt")
    assert list(load_checkpoint(path)) == ["enc.layers.0", "enc.layers.1.w", "pair.0", "5.x"]
    assert open_checkpoint(path).dropped == ["pair.1"]


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_ten_thousand_tensors(tmp_path, container):
    values = torch.randn(10_000, 3)
    tensors = {f"layer.{i}.weight": values[i].clone() for i in range(10_000)}
    assert_equal_to_torch(save(tensors, tmp_path / "w.pt", container))


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_round_trip_through_convert(tmp_path, container):
    tensors = {str(dtype): any_bits((3, 4), dtype, seed) for seed, dtype in enumerate(BIT_FOR_BIT)}
    tensors |= {"empty": torch.zeros(0, 2), "scalar": torch.tensor(1.5), "t": torch.randn(3, 4).t()}
    path = save({"state_dict": tensors, "epoch": 3}, tmp_path / "w.pth", container)
    assert main([str(path), str(tmp_path / "out")]) == 0
    from safetensors.torch import load_file

    for found in (load_checkpoint(tmp_path / "out.safetensors"), mx.load(str(tmp_path / "out.safetensors"))):
        assert set(found) == set(tensors)
        for name, value in tensors.items():
            assert_same(found[name], value)
    # The reference implementation reads the same.
    again = load_file(tmp_path / "out.safetensors")
    for name, value in tensors.items():
        assert bits(again[name]) == bits(value)
        assert again[name].dtype == value.dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_convert_casts_as_torch_does(tmp_path, dtype):
    tensors = {"w": torch.randn(64, 64), "h": torch.randn(5).bfloat16(), "i": torch.arange(4)}
    tensors["d"] = torch.ones(2).double()
    path = save(tensors, tmp_path / "w.pt")
    assert main([str(path), str(tmp_path / "o"), "--dtype", dtype]) == 0
    found = load_checkpoint(tmp_path / "o.safetensors")
    for name, value in tensors.items():
        assert_same(found[name], value.to(getattr(torch, dtype)) if value.is_floating_point() else value)


# ---- what only torch can read


def test_sparse_quantized_and_nested_come_out_dense(tmp_path):
    matrix = torch.randn(6, 5) * (torch.rand(6, 5) < 0.3)
    dense = {
        "coo": matrix.to_sparse(),
        "csr": matrix.to_sparse_csr(),
        "half": matrix.bfloat16().to_sparse(),
        "tensor": torch.quantize_per_tensor(torch.randn(4, 3), 0.05, 3, torch.quint8),
        "channel": torch.quantize_per_channel(torch.randn(4, 3), torch.rand(4) + 0.1, torch.zeros(4), 0, torch.qint8),
        "transposed": torch.quantize_per_tensor(torch.randn(4, 3), 0.05, 3, torch.qint8).t(),
        "nested": torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 2)]),
        "deep": {"below": [matrix.to_sparse()]},
        "plain": torch.randn(3),
    }
    path = save(dense, tmp_path / "w.pt")
    found = load_checkpoint(path)
    for name in ("coo", "csr", "half"):
        assert_same(found[name], dense[name].to_dense())
    assert_same(found["deep.below.0"], matrix.to_sparse().to_dense())
    for name in ("tensor", "channel", "transposed"):
        assert_same(found[name], dense[name].dequantize().contiguous())
    padded = torch.zeros(2, 4, 3)
    padded[0, :2, :3], padded[1, :4, :2] = 1, 1
    assert_same(found["nested"], padded)
    assert_same(found["plain"], dense["plain"])
    assert main([str(path), str(tmp_path / "w.safetensors")]) == 0
    assert_same(load_checkpoint(tmp_path / "w.safetensors")["coo"], dense["coo"].to_dense())
    old = save({"coo": matrix.to_sparse()}, tmp_path / "old.pt", "legacy")
    assert_same(load_checkpoint(old)["coo"], dense["coo"].to_dense())


def test_indices_that_point_outside_are_not_trusted(tmp_path):
    matrix = torch.sparse_coo_tensor(torch.tensor([[0, 2**40]]), torch.ones(2), (2**41,), check_invariants=False)
    path = save({"w": matrix}, tmp_path / "w.pt")
    with pytest.raises(UnsafeCheckpointError, match="made dense it would take"):
        load_checkpoint(path)
    bad = torch.sparse_coo_tensor(torch.tensor([[0, 100_000]]), torch.ones(2), (4,), check_invariants=False)
    path = save({"w": bad}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match="torch cannot load it either"):
        load_checkpoint(path)


def test_a_whole_module_is_refused_by_name(tmp_path):
    path = tmp_path / "module.pt"
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(UnsafeCheckpointError, match=r"asks for torch\.nn\.modules\.linear\.Linear"):
        load_checkpoint(path)


class Wrapping(torch.Tensor):
    """A subclass that has no data of its own, as quantization libraries make them."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError


def test_a_wrapper_subclass_is_refused_by_name(tmp_path):
    path = tmp_path / "wrapped.pt"
    torch.save({"w": Wrapping(torch.ones(2))}, path)
    with pytest.raises(UnsafeCheckpointError, match="Wrapping"):
        load_checkpoint(path)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript_is_refused(tmp_path):
    path = tmp_path / "script.pt"
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(str(path))
    with pytest.raises(UnsafeCheckpointError, match="TorchScript"):
        load_checkpoint(path)
