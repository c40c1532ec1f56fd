"""A state as a tree of JSON and a mapping of tensors, and back."""

import base64
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nestor.checkpoints.forms import form_of, form_tagged, is_local, name_of
from nestor.errors import CheckpointError

Json: TypeAlias = Any
"""What ``json.dumps`` writes and ``json.loads`` reads, without loss."""

TAG, OF = "$", "of"
INLINE_BYTES = 256
"""Smaller tensors are written among the JSON: in a tensor file, the entry of each takes about as much as they do."""
_MODULES = "modules"  # the entry of the state whose tensors are all in the tensor file, where other programs find them


def encode(state: Mapping[str, Any]) -> tuple[Json, dict[str, Tensor]]:
    """Convert a state to JSON and to tensors on the CPU, which are copies.

    A tensor has the name of its place in the state, such as ``modules/net/parameters/0.weight``; one that occurs
    several times has the name of its first place, and is one tensor again after :func:`decode`.

    Args:
        state: Nested containers of tensors, numbers, strings, and values of types that have a form.

    Raises:
        CheckpointError: If a value has no form. The message names its place and its class.
    """
    encoder = _Encoder()
    try:
        return encoder.encode(state, ()), encoder.tensors
    except RecursionError:
        raise CheckpointError(
            "A checkpoint cannot hold a state that contains itself, or is nested too deeply."
        ) from None


def decode(tree: Json, tensors: Mapping[str, Tensor]) -> Any:
    """Build the state that :func:`encode` has converted.

    No code of the tree runs: classes are found among those that the process has imported, and their values are built
    without a call of the class.

    Raises:
        CheckpointError: If the tree contains a class that this process does not have, or is damaged.
    """
    try:
        return _Decoder(tensors).decode(tree)
    except CheckpointError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"The checkpoint cannot be read: {type(error).__name__}: {error}") from error


class _Encoder:
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        # Keep the originals: a tensor that is freed meanwhile could give its id to another one.
        self._seen: dict[int, tuple[Json, Tensor]] = {}

    def encode(self, value: Any, path: tuple[str, ...]) -> Json:
        kind = type(value)
        if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
            return value
        if kind is list:
            return [self.encode(part, (*path, str(index))) for index, part in enumerate(value)]
        if kind is dict and TAG not in value and all(type(key) is str for key in value):
            return {key: self.encode(part, (*path, key)) for key, part in value.items()}
        if kind is dict:
            items = [[self.encode(key, path), self.encode(part, (*path, str(key)))] for key, part in value.items()]
            return {TAG: "dict", OF: items}
        if isinstance(value, Tensor):
            return self._encode_once(value, path)
        if (numpy := sys.modules.get("numpy")) is not None and isinstance(value, numpy.ndarray | numpy.generic):
            return self._encode_array(value, path)
        if (form := form_of(kind)) is None:
            raise CheckpointError(_refusal(kind, path))
        return {TAG: form.tag, OF: self.encode(form.to_data(value), path)}

    def _encode_once(self, tensor: Tensor, path: tuple[str, ...]) -> Json:
        if id(tensor) not in self._seen:
            self._seen[id(tensor)] = (self._encode_tensor(tensor, path), tensor)
        return self._seen[id(tensor)][0]

    def _encode_tensor(self, tensor: Tensor, path: tuple[str, ...]) -> Json:
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) and not tensor.is_nested:
            raise CheckpointError(_refusal(type(tensor), path))
        tensor = tensor.detach()
        if tensor.is_nested:
            parts = list(tensor.unbind())
            return {TAG: "nested", "layout": str(tensor.layout), OF: self.encode(parts, path)}
        if tensor.layout in _SPARSE:
            parts = [read(tensor) for read in _SPARSE[tensor.layout]]
            return {
                TAG: "sparse",
                "layout": str(tensor.layout),
                "shape": list(tensor.shape),
                OF: self.encode(parts, path),
            }
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise CheckpointError(_refusal(f"tensor with the layout {tensor.layout} and dtype {tensor.dtype}", path))
        # torch chooses kernels by the strides: another order in memory would change the last bits of a resumed run.
        is_permuted = not tensor.is_contiguous() and _is_dense(tensor.shape, tensor.stride())
        stride = list(tensor.stride()) if is_permuted else None
        copied = tensor.to("cpu", copy=True).resolve_conj().resolve_neg().contiguous()
        entry = {TAG: "tensor", **({} if stride is None else {"stride": stride})}
        described = {**entry, "dtype": str(copied.dtype).removeprefix("torch."), "shape": list(copied.shape)}
        is_small = copied.numel() * copied.element_size() < INLINE_BYTES and path[0] != _MODULES
        if is_small or not copied.numel():
            return {**described, "data": base64.b64encode(_as_bytes(copied).numpy().tobytes()).decode()}
        name = "/".join(path)
        while name in self.tensors:  # keys that differ in their type only, such as 1 and "1"
            name += "+"
        if copied.dtype in STORED:
            self.tensors[name] = copied
            return {**entry, "name": name}
        self.tensors[name] = _as_bytes(copied)
        return {**described, "name": name}

    def _encode_array(self, value: Any, path: tuple[str, ...]) -> Json:
        kind = "scalar" if isinstance(value, sys.modules["numpy"].generic) else "array"
        if value.dtype.kind in "biufc" and value.dtype.isnative:
            # Their bytes are those of a tensor; not every dtype of NumPy has a counterpart in torch.
            raw = torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8) if value.size else torch.empty(0)
            data = self.encode(raw, path)
        elif value.dtype.kind in "mM":
            data = self.encode(value.astype("int64").tolist(), path)
        elif value.dtype.kind in "US":
            data = self.encode(value.tolist(), path)
        else:
            raise CheckpointError(_refusal(f"NumPy array of dtype {value.dtype}", path))
        return {TAG: kind, "dtype": value.dtype.str, "shape": list(value.shape), OF: data}


class _Decoder:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._seen: dict[str, Tensor] = {}

    def decode(self, tree: Json) -> Any:
        if isinstance(tree, list):
            return [self.decode(part) for part in tree]
        if not isinstance(tree, dict):
            return tree
        if TAG not in tree:
            return {key: self.decode(part) for key, part in tree.items()}
        tag = tree[TAG]
        if tag == "tensor":
            return self._decode_tensor(tree)
        if tag in ("array", "scalar"):
            return self._decode_array(tree)
        data = self.decode(tree[OF])
        if tag == "nested":
            return torch.nested.as_nested_tensor(data, layout=_LAYOUTS[tree["layout"]])
        if tag == "sparse":
            return _make_sparse(_LAYOUTS[tree["layout"]], data, tree["shape"])
        if (form := form_tagged(tag)) is None:
            name = str(tag).removeprefix("structure ")
            raise CheckpointError(
                f"The checkpoint contains a {name}, which this process does not know. Import its module before the "
                "checkpoint is read, or call nestor.register_batch as the program did that was saved."
            )
        return form.from_data(data)

    def _decode_tensor(self, entry: Mapping[str, Json]) -> Tensor:
        if "name" not in entry:
            raw = bytearray(base64.b64decode(entry["data"]))
            return _shaped(torch.frombuffer(raw, dtype=torch.uint8).clone() if raw else torch.empty(0), entry)
        if entry["name"] not in self._seen:
            self._seen[entry["name"]] = _shaped(self._tensors[entry["name"]], entry)
        return self._seen[entry["name"]]

    def _decode_array(self, entry: Mapping[str, Json]) -> Any:
        import numpy as np

        data, dtype = self.decode(entry[OF]), np.dtype(entry["dtype"])
        if dtype.kind not in "biufcmMUS":
            raise CheckpointError(f"The checkpoint contains a NumPy array of dtype {dtype}, which has no plain data.")
        array = np.frombuffer(data.numpy().tobytes(), dtype) if isinstance(data, Tensor) else np.array(data, dtype)
        array = array.reshape(entry["shape"]).copy()
        return array if entry[TAG] == "array" else array[()]


STORED = {
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
}
"""The dtypes that are written as they are; any other is written as bytes."""

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_LAYOUTS = {
    str(layout): layout
    for layout in (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.strided, torch.jagged)
}
_SPARSE = {
    torch.sparse_coo: (lambda t: t.coalesce().indices(), lambda t: t.coalesce().values()),
    torch.sparse_csr: (Tensor.crow_indices, Tensor.col_indices, Tensor.values),
    torch.sparse_csc: (Tensor.ccol_indices, Tensor.row_indices, Tensor.values),
}


def _make_sparse(layout: torch.layout, parts: list[Tensor], shape: list[int]) -> Tensor:
    # Indices that a file contains are checked: torch would read memory at any of them.
    if layout is torch.sparse_coo:
        indices, values = parts
        return torch.sparse_coo_tensor(indices, values, shape, is_coalesced=True, check_invariants=True)
    outer, inner, values = parts
    return torch.sparse_compressed_tensor(outer, inner, values, shape, layout=layout, check_invariants=True)


def _as_bytes(tensor: Tensor) -> Tensor:
    """View the memory of a contiguous tensor as bytes."""
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)


def _shaped(tensor: Tensor, entry: Mapping[str, Json]) -> Tensor:
    """Give a tensor the dtype, the shape and the strides of an entry, where it has them."""
    if "dtype" in entry:
        dtype = _DTYPES[entry["dtype"]]
        tensor = (tensor.view(dtype) if tensor.numel() else tensor.to(dtype)).reshape(entry["shape"])
    if "stride" in entry:
        if not _is_dense(tensor.shape, entry["stride"]):
            raise CheckpointError(f"The checkpoint contains a tensor with the strides {entry['stride']}.")
        tensor = torch.empty_strided(tensor.shape, entry["stride"], dtype=tensor.dtype).copy_(tensor)
    return tensor


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return True if the elements fill one contiguous block of memory, in any order of the dimensions."""
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return math.prod(shape) > 0 and min(strides, default=1) > 0 and last == math.prod(shape) - 1


def _refusal(kind: type | str, path: tuple[str, ...]) -> str:
    name = name_of(kind) if isinstance(kind, type) else kind
    is_hidden = isinstance(kind, type) and is_local(kind)
    why = "its class was defined in a function" if is_hidden else "no file without code can hold it"
    return (
        f"A checkpoint cannot hold the {name} at {'/'.join(path)}: {why}. Checkpoints contain no pickles. If it "
        "is (a part of) a batch, let the data yield tensors in plain containers, dataclasses or named tuples that are "
        "defined at the top of a module, or call nestor.register_batch(type, to_data, from_data)."
    )
