"""``convert``: fuse the DIN modules inside a model of another library, in place, numbers unchanged."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

from . import _backend
from .integrations.adapter import BACKEND, EMPTY_AS_ZERO, Adapter

# Adapter files, by the package (or module) that the classes of a library live in.
LIBRARIES = {
    "deepctr_torch": "deepctr_torch",
    "fuxictr": "fuxictr",
    "recbole": "recbole",
    "reference.units": "reference",  # the whole name: others may have a package called "reference"
    "torch_rechub": "torch_rechub",
    "tzrec": "tzrec",
}

_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True)
class Entry:
    """One module of a model: ``name`` as in ``named_modules`` ("" is the model itself), its class, what became of it."""

    name: str
    kind: str
    swapped: bool
    detail: str


@dataclass
class Report:
    """What ``convert`` did. ``swapped`` and ``left`` list modules; printing it shows both; ``undo()`` takes it all back."""

    entries: list[Entry] = field(default_factory=list)
    _originals: list[tuple[nn.Module, type[nn.Module], list[str]]] = field(default_factory=list, repr=False)

    @property
    def swapped(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.swapped]

    @property
    def left(self) -> list[Entry]:
        return [entry for entry in self.entries if not entry.swapped]

    def undo(self) -> None:
        """Give every converted module its own class back. Parameters and buffers are the same objects throughout, so what
        was trained in between stays."""
        for module, cls, added in self._originals:
            module.__class__ = cls
            for name in added:
                del module.__dict__[name]
        self._originals.clear()
        self.entries.clear()

    def __str__(self) -> str:
        if not self.entries:
            return "nothing to convert: the model holds no DIN module of " + ", ".join(LIBRARIES.values())
        lines = []
        for title, entries in (("swapped", self.swapped), ("left as it was", self.left)):
            lines += [f"{title}: {len(entries)}"] if entries else []
            lines += [f"  {entry.name or '(the model)'}  {entry.kind}: {entry.detail}" for entry in entries]
        return "\n".join(lines)


def _adapter_file(cls: type) -> str | None:
    """The name of the adapter file for the library that ``cls`` is from."""
    return LIBRARIES.get(cls.__module__) or LIBRARIES.get(cls.__module__.split(".", 1)[0])


def _adapter(cls: type) -> tuple[type | None, Adapter | None]:
    """The class an adapter exists for among ``cls`` and its bases, and the adapter.

    ``ImportError`` where the library lacks what its adapter is about: another version, or another package of that name.
    """
    for base in cls.__mro__:
        library = _adapter_file(base)
        if library is not None and issubclass(base, nn.Module):
            try:
                adapters = importlib.import_module(f"din_kernels.integrations.{library}").ADAPTERS
            except AttributeError as error:
                raise ImportError(str(error)) from error
            if base in adapters:
                return base, adapters[base]
    return None, None


def convert(model: _Model, *, backend: str | None = None, empty_as_zero: bool = False) -> tuple[_Model, Report]:
    """Make the DIN modules inside ``model`` run fused, in place; returns (model, report).

    Knows the attention units and Dice of DeepCTR-Torch, FuxiCTR, RecBole, torch-rechub, TorchEasyRec and of this project's
    ``reference``. A converted module keeps its parameters (the same objects: optimizers stay valid), buffers, ``state_dict``
    keys, call signature, output shapes, training and evaluation behaviour, including each library's own treatment of padding
    and of empty histories. Where a unit holds what cannot be fused (dropout while training, say), its first layer is
    factorised and the library's modules do the rest; where nothing can be, it stays and ``report.left`` says why.

    backend: for the converted modules; None (automatic), "triton" or "torch".
    empty_as_zero: an empty history pools to 0 where the library gives NaN (RecBole under a softmax); otherwise it stays NaN.

    While a part of a converted module carries hooks (the old ``weight_norm``, pruning, a probe) the library's own ``forward``
    runs, so that they do. There is no double backward. Converting twice changes nothing.
    Convert before ``torch.compile`` and before wrapping in ``DistributedDataParallel``.
    """
    _backend.check_name(backend)
    report = Report()
    unknown: set[str] = set()  # packages that are not what their adapters know
    for name, module in model.named_modules():
        cls = type(module)
        package = cls.__module__.split(".", 1)[0]
        if package == "din_kernels" or package in unknown:
            continue
        try:
            base, adapter = _adapter(cls)
        except ImportError as error:
            unknown.add(package)
            reason = f"this {package} is not one that din_kernels knows, all of it stays as it is ({error})"
            report.entries.append(Entry(name, cls.__qualname__, False, reason))
            continue
        if base is None or adapter is None:
            continue
        why: str | None
        if cls is not base:
            why = f"a subclass of {base.__name__}, which may do something else"
        else:
            why = adapter.why_not(module)
        if why is None and adapter.fused is not None:
            detail = adapter.how(module)
            before = set(module.__dict__)
            module.__class__ = adapter.fused
            _set_up(module, backend, empty_as_zero)
            added = [key for key in module.__dict__ if key not in before]
            report._originals.append((module, cls, added))
            report.entries.append(Entry(name, cls.__qualname__, True, detail))
        else:
            report.entries.append(Entry(name, cls.__qualname__, False, why or "not supported"))
    return model, report


def _set_up(module: nn.Module, backend: str | None, empty_as_zero: bool) -> None:
    """Attributes that a converted module needs beyond those of its original."""
    if type(module).__module__.startswith("din_kernels.modules"):
        module.backend = backend  # type: ignore[assignment]
        if not hasattr(module, "process_group"):
            module.process_group = None  # type: ignore[assignment]
    else:
        setattr(module, BACKEND, backend)
        setattr(module, EMPTY_AS_ZERO, empty_as_zero)
