"""Types that JSON does not have: each is written as a tag and plain data."""

import base64
import builtins
import dataclasses
import sys
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch

from nestor.errors import CheckpointError


class Form(NamedTuple):
    """How values of one type are written.

    Attributes:
        tag: The name of the type in a file.
        to_data: Converts a value to plain data and tensors.
        from_data: Converts them back.
    """

    tag: str
    to_data: Callable[[Any], Any]
    from_data: Callable[[Any], Any]


def register_batch(type: type, to_data: Callable[[Any], Any], from_data: Callable[[Any], Any]) -> None:
    """Tell how batches of a class of your own are written to checkpoints and read from them.

    A checkpoint contains the batches from which a run continues, and never a pickle. Tensors, NumPy arrays, plain
    containers, dataclasses, named tuples and Hugging Face's batches need no registration. Register the class before
    the run, and in the program that resumes it: the registration is valid for the whole process.

    Args:
        type: The class. Its subclasses are other classes.
        to_data: Converts a batch to containers of tensors, numbers and strings.
        from_data: Converts these back to a batch. It runs when a checkpoint is read, with what the file contains.

    Raises:
        TypeError: If ``type`` is not a class, or a function is not callable.
        ValueError: If ``type`` is a class of Python or torch that checkpoints know already.

    Example:
        >>> import nestor, torch
        >>> class Graph:
        ...     def __init__(self, nodes, edges):
        ...         self.nodes, self.edges = nodes, edges
        >>> nestor.register_batch(Graph, lambda g: [g.nodes, g.edges], lambda data: Graph(*data))
    """
    if not isinstance(type, _class):
        raise TypeError(f"register_batch(type={type!r}) must be a class.")
    if type in _BUILT_IN:
        raise ValueError(f"register_batch(type={type.__name__}): checkpoints know this class already.")
    for name, function in (("to_data", to_data), ("from_data", from_data)):
        if not callable(function):
            raise TypeError(f"register_batch({name}={function!r}) must be a function.")
    _add(type, Form(name_of(type), to_data, from_data))


_class = type


def form_of(kind: type) -> Form | None:
    """Return the form of a type; None if it has none."""
    if kind in _FORMS:
        return _FORMS[kind]
    if not _is_structure(kind):
        return None
    return Form(f"structure {name_of(kind)}", _fields, lambda data: data)


def form_tagged(tag: str) -> Form | None:
    """Return the form with a tag; None if no type of this process has it."""
    if tag.startswith(_STRUCTURE):
        kind = _find(tag.removeprefix(_STRUCTURE))
        return None if kind is None else Form(tag, _fields, lambda data: _assemble(kind, data))
    return _TAGGED.get(tag)


def name_of(kind: type) -> str:
    """Return the full name of a class, as ``module.Class``."""
    return f"{kind.__module__}.{kind.__qualname__}"


def is_local(kind: type) -> bool:
    """Return whether a class was defined in a function, where no other process finds it."""
    return "<locals>" in kind.__qualname__


_STRUCTURE = "structure "


@runtime_checkable
class _NamedTuple(Protocol):
    _fields: tuple[str, ...]
    _make: Any


def _is_structure(kind: type) -> bool:
    """Return whether values of the class are their fields: dataclasses, named tuples, Hugging Face's batches."""
    if is_local(kind):
        return False
    is_named_tuple = issubclass(kind, tuple) and isinstance(kind, _NamedTuple)
    return dataclasses.is_dataclass(kind) or is_named_tuple or issubclass(kind, UserDict)


def _fields(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, UserDict):
        # A tokenizer's own notes on how it has split the text are no part of the batch.
        return {name: field for name, field in vars(value).items() if name != "_encodings"}
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _find(name: str) -> type | None:
    """Find a class among the modules that are imported already: a file must not decide what is imported."""
    for module_name in (name.rsplit(".", count)[0] for count in range(1, name.count(".") + 1)):
        if (module := sys.modules.get(module_name)) is None:
            continue
        found: Any = module
        for part in name.removeprefix(f"{module_name}.").split("."):
            found = vars(found).get(part) if isinstance(found, _class | _class(module)) else None
        if isinstance(found, _class) and _is_structure(found):
            return found
    return None


def _assemble(kind: type, data: Any) -> Any:
    """Build a value from its fields, without a call of the class: what a file contains must not run code."""
    if issubclass(kind, tuple):
        return tuple.__new__(kind, data)
    if issubclass(kind, UserDict):
        batch: Any = object.__new__(cast("type[Any]", kind))
        vars(batch).update({"_encodings": None, **data} if name_of(kind) in _TOKENIZED else data)
        return batch
    names = {field.name for field in dataclasses.fields(cast("type[Any]", kind))}
    if names != data.keys():
        raise CheckpointError(
            f"The checkpoint contains a {name_of(kind)} with the fields {sorted(data)}; the class has {sorted(names)}."
        )
    # A dataclass may extend a mapping (ModelOutput of Hugging Face), whose items are its fields that are not None.
    mapping: Any = next((base for base in (OrderedDict, dict) if issubclass(kind, base)), None)
    value: Any = (mapping or object).__new__(kind)
    for name, field in data.items():
        object.__setattr__(value, name, field)
        if mapping is not None and field is not None:
            mapping.__setitem__(value, name, field)
    return value


_TOKENIZED = {"transformers.tokenization_utils_base.BatchEncoding"}


def _make_float(text: str) -> float:
    if text not in ("nan", "inf", "-inf"):
        raise CheckpointError(f"The checkpoint contains {text!r} in place of a number that is not finite.")
    return float(text)


def _make_dtype(name: str) -> torch.dtype:
    found = vars(torch).get(name)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"The checkpoint contains the dtype {name!r}, which this torch does not have.")
    return found


_FACTORIES: dict[str, Any] = {"None": None, **{kind.__name__: kind for kind in (int, float, list, dict, set, str)}}


def _from_default(value: Any) -> list[Any]:
    for name, factory in _FACTORIES.items():
        if value.default_factory is factory:
            return [name, list(value.items())]
    raise CheckpointError(
        f"A defaultdict with the factory {value.default_factory!r} cannot be saved. Use int, float, list, dict, set, "
        "str or None."
    )


def _make_default(data: Any) -> Any:
    name, items = data
    return defaultdict(_FACTORIES[name], items)


_FORMS: dict[type, Form] = {}
_TAGGED: dict[str, Form] = {}


def _add(kind: type, form: Form) -> None:
    _FORMS[kind] = form
    _TAGGED[form.tag] = form


_add(float, Form("float", repr, _make_float))  # those that are finite are numbers of JSON
_add(dict, Form("dict", lambda value: [list(item) for item in value.items()], dict))  # with keys that are no strings
_add(tuple, Form("tuple", list, tuple))
_add(torch.Size, Form("Size", list, torch.Size))
_add(set, Form("set", list, set))
_add(frozenset, Form("frozenset", list, frozenset))
_add(deque, Form("deque", lambda value: [list(value), value.maxlen], lambda data: deque(*data)))
_add(OrderedDict, Form("OrderedDict", lambda value: [list(item) for item in value.items()], OrderedDict))
_add(Counter, Form("Counter", lambda value: [list(item) for item in value.items()], lambda data: Counter(dict(data))))
_add(defaultdict, Form("defaultdict", _from_default, _make_default))
_add(complex, Form("complex", lambda value: [value.real, value.imag], lambda data: complex(*data)))
_add(bytes, Form("bytes", lambda value: base64.b64encode(value).decode(), base64.b64decode))
_add(slice, Form("slice", lambda value: [value.start, value.stop, value.step], lambda data: slice(*data)))
_add(range, Form("range", lambda value: [value.start, value.stop, value.step], lambda data: range(*data)))
_add(torch.dtype, Form("dtype", lambda value: str(value).removeprefix("torch."), _make_dtype))
_add(torch.device, Form("device", str, torch.device))

_PYTHON = (kind for kind in vars(builtins).values() if isinstance(kind, type))
_BUILT_IN = frozenset([*_FORMS, *_PYTHON, torch.Tensor, torch.nn.Parameter])
