"""Other libraries' own modules with the parameters of a reference unit, so that they must give the same numbers.

Each builder imports its library when called and raises ``Skip`` where it is not installed or cannot compute this unit.
They are imported by the modules that define the layers; where a library's package pulls in more than is installed, the
missing module is named. ``make peers`` installs them.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from reference import units

from .arena import Skip

Built = tuple[Callable[[Any], Tensor], Sequence[Tensor]]  # forward on ActivationInputs, and its parameters
Build = Callable[[units.LocalActivationUnit, int], Built]


def load(package: str, module: str) -> ModuleType:
    """The module, or ``Skip`` with what is missing."""
    if importlib.util.find_spec(package) is None:
        raise Skip(f"{package} is not installed (make peers)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except (ImportError, OSError, AttributeError) as error:
        raise Skip(f"{package} is installed but cannot be imported: {type(error).__name__}: {error}") from error


@torch.no_grad()
def _copy_linears(target: nn.Module, unit: units.LocalActivationUnit, last_scale: float = 1.0) -> None:
    """Give the linear layers of ``target``, in order, the parameters of the unit's."""
    sources, targets = ([m for m in module.modules() if isinstance(m, nn.Linear)] for module in (unit, target))
    if [m.weight.shape for m in sources] != [m.weight.shape for m in targets]:
        raise Skip(f"its linear layers {[tuple(m.weight.shape) for m in targets]} are not the unit's")
    for mine, theirs in zip(sources, targets, strict=True):
        factor = last_scale if theirs is targets[-1] else 1.0
        theirs.weight.copy_(mine.weight * factor)
        theirs.bias.copy_(mine.bias * factor)


def _place(module: nn.Module, unit: units.LocalActivationUnit) -> None:
    weight = next(unit.parameters())
    module.to(weight.device, weight.dtype)


def _require_sigmoid(unit: units.LocalActivationUnit) -> None:
    if unit.activation != "sigmoid":
        raise Skip(
            f"compared with sigmoid only: its {unit.activation} keeps other statistics (padding counts, other ε)"
        )


def deepctr_torch(unit: units.LocalActivationUnit, padded_length: int) -> Built:
    _require_sigmoid(unit)
    layer = load("deepctr_torch", "deepctr_torch.layers.sequence").AttentionSequencePoolingLayer(
        att_hidden_units=unit.hidden_units, att_activation="sigmoid", weight_normalization=unit.softmax,
        embedding_dim=unit.embedding_dim,
    )  # fmt: skip
    _place(layer, unit)
    _copy_linears(layer, unit)

    def forward(inputs: Any) -> Tensor:
        return layer(inputs.query.unsqueeze(1), inputs.padded, inputs.lengths.unsqueeze(1)).squeeze(1)

    return forward, list(layer.parameters())


def fuxictr(unit: units.LocalActivationUnit, padded_length: int) -> Built:
    _require_sigmoid(unit)
    layer = load("fuxictr", "fuxictr.pytorch.layers.attentions.target_attention").DIN_Attention(
        embedding_dim=unit.embedding_dim, attention_units=list(unit.hidden_units), hidden_activations="Sigmoid",
        use_softmax=unit.softmax,
    )  # fmt: skip
    _place(layer, unit)
    _copy_linears(layer, unit)

    def forward(inputs: Any) -> Tensor:
        mask = torch.arange(inputs.padded.shape[1], device=inputs.padded.device) < inputs.lengths.unsqueeze(1)
        return layer(inputs.query, inputs.padded, mask)

    return forward, list(layer.parameters())


def recbole(unit: units.LocalActivationUnit, padded_length: int) -> Built:
    """RecBole divides the scores by √D, which the output layer's parameters undo here."""
    _require_sigmoid(unit)
    positions = torch.arange(padded_length, device=next(unit.parameters()).device).view(1, -1)
    layer = load("recbole", "recbole.model.layers").SequenceAttLayer(
        positions, [4 * unit.embedding_dim, *unit.hidden_units], activation="sigmoid", softmax_stag=unit.softmax,
        return_seq_weight=False,
    )  # fmt: skip
    _place(layer, unit)
    _copy_linears(layer, unit, last_scale=math.sqrt(unit.embedding_dim))

    def forward(inputs: Any) -> Tensor:
        return layer(inputs.query, inputs.padded, inputs.lengths).squeeze(1)

    return forward, list(layer.parameters())


def torch_rechub(unit: units.LocalActivationUnit, padded_length: int) -> Built:
    """Its unit has a BatchNorm in every layer and no mask: whatever its parameters, it is another function."""
    load("torch_rechub", "torch_rechub.models.ranking.din")
    raise Skip(
        "torch-rechub's ActivationUnit puts BatchNorm into every layer and has no mask: it computes something else"
    )


ACTIVATION: dict[str, Build] = {
    "deepctr-torch": deepctr_torch,
    "fuxictr": fuxictr,
    "recbole": recbole,
    "torch-rechub": torch_rechub,
}


# ---- Dice: builders take the number of channels; ``alpha`` of the module is the slope ----------------------------------


def _deepctr_dice(channels: int) -> nn.Module:
    return load("deepctr_torch", "deepctr_torch.layers.activation").Dice(channels, dim=2, epsilon=1e-8)


def _fuxictr_dice(channels: int) -> nn.Module:
    return load("fuxictr", "fuxictr.pytorch.layers.activations").Dice(channels, eps=1e-8)


DICE: dict[str, Callable[[int], nn.Module]] = {"deepctr-torch": _deepctr_dice, "fuxictr": _fuxictr_dice}


# ---- sparse update: fbgemm's table with the optimizer inside its backward -----------------------------------------------


def fbgemm_table(weight: Tensor, lr: float) -> nn.Module:
    """FBGEMM's unpooled lookup with exact row-wise SGD in its backward, holding a copy of ``weight`` [V, D]."""
    module = load("fbgemm_gpu", "fbgemm_gpu.split_table_batched_embeddings_ops_training")
    common = load("fbgemm_gpu", "fbgemm_gpu.split_table_batched_embeddings_ops_common")
    on_gpu = weight.device.type == "cuda"
    table = module.SplitTableBatchedEmbeddingBagsCodegen(
        [(
            weight.shape[0], weight.shape[1],
            common.EmbeddingLocation.DEVICE if on_gpu else common.EmbeddingLocation.HOST,
            module.ComputeDevice.CUDA if on_gpu else module.ComputeDevice.CPU,
        )],
        optimizer=module.OptimType.EXACT_SGD, learning_rate=lr, pooling_mode=common.PoolingMode.NONE,
    )  # fmt: skip
    with torch.no_grad():
        table.split_embedding_weights()[0].copy_(weight)
    return table
