"""Launches of the universal backward kernels (``kernels_universal_backward.py``)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..._launch import launch, on_device
from . import kernels_universal_backward as kernels
from .factorise import FirstLayerGradients, first_layer_backward
from .problem import UnitConfig, UnitGradients, UnitOutputs, UnitTensors
from .universal import Prepared, launch_options, num_programs, scratch_columns

# Sums that programs keep apart until the end; beyond this fewer programs run than the GPU could hold.
PRIVATE_BYTES = 96 << 20


def private_columns(config: UnitConfig) -> int:
    """Floats in one program's row of sums (see kernels_universal_backward.py)."""
    widths, dim = config.hidden_units, config.embedding_dim
    upper = sum(a * b for a, b in pairwise(widths))
    first = 2 * widths[0] * dim if config.interaction == "product" else 0
    return 2 * sum(widths) + widths[-1] + 1 + upper + first


class Backward:
    """One call: operands shared by the passes that gather Dice's sums and by the main one. What is the universal
    kernel's alone is in the methods up to ``launch``, which the tiled path has its own of."""

    def __init__(
        self, config: UnitConfig, tensors: UnitTensors, saved: UnitOutputs, grad_pooled: Tensor,
        grad_weights: Tensor | None, inv_count: Tensor | None,
    ) -> None:  # fmt: skip
        keys = tensors.keys
        self.config, self.tensors, self.inv_count = config, tensors, inv_count
        self.call = self.prepare()
        call = self.call
        most = call.most_programs
        self.groups = max(1, min(config.candidates, most // max(1, call.items.bound)))
        self.columns = self.private_columns()
        least = num_programs(keys.device, 1)
        most = min(most, max(least, PRIVATE_BYTES // (4 * self.columns)))
        call.programs = max(1, min(most, call.items.bound * self.groups))

        self.grad_pooled = grad_pooled.contiguous()
        self.grad_weights = None if grad_weights is None else grad_weights.contiguous()
        self.delta = self._delta(saved) if config.softmax else call.params
        self.sums = torch.zeros(2 * sum(config.hidden_units), device=keys.device)
        nothing = call.params
        self.arguments: dict[str, Any] = {
            **call.layer_operands(), **call.weight_strides(),
            "grad_pooled": self.grad_pooled,
            "grad_weights": nothing if self.grad_weights is None else self.grad_weights,
            "log_normaliser": nothing if saved.log_normaliser is None else saved.log_normaliser.contiguous(),
            "delta": self.delta, "sums": self.sums,
            "num_rows": keys.shape[0], "groups": self.groups, "scale": float(config.scale),
            "SOFTMAX": config.softmax, "HAS_GRAD_WEIGHTS": grad_weights is not None,
            "BATCH_STATISTICS": inv_count is not None, "MANY": config.candidates > 1,
        }  # fmt: skip
        self.arguments |= self.kernel_arguments()

    def private_columns(self) -> int:
        return private_columns(self.config)

    def in_order(self, sums: Tensor) -> Tensor:
        """A row of ``private`` in the order of kernels_universal_backward.py."""
        return sums

    def prepare(self) -> Prepared:
        return Prepared(self.config, self.tensors, layers=len(self.config.hidden_units), backward=True)

    def kernel_arguments(self) -> dict[str, Any]:
        """What this kernel takes besides."""
        depth, call = len(self.config.hidden_units), self.call
        hidden = scratch_columns(self.config, call.tiles, depth)
        many = self.config.candidates > 1
        return {
            **call.constants(), "DEPTH": depth,
            "inputs_scratch": call.scratch(hidden, torch.float32), "hidden_scratch": call.scratch(2 * hidden),
            "keys_scratch": call.scratch(self.config.embedding_dim, torch.float32) if many else call.params,
        }  # fmt: skip

    def launch(self, gather: int, **arguments: Any) -> None:
        operands = {**self.arguments, **arguments, "GATHER": gather}
        launch(
            kernels.backward_items, (self.call.programs,), operands,
            **launch_options(self.call.tiles, crowded=gather < 0),
        )  # fmt: skip

    def _add_slots(self, slots: Tensor) -> None:
        """slots [·, …]: afterwards the first Q are complete."""
        call = self.call
        queries, width = self.tensors.query.shape[0], slots[0].numel()
        if call.items.slots == queries:
            return
        block = 128
        grid = (min(queries, num_programs(slots.device, 8)), -(-width // block))
        operands = {**call.item_operands(), "slots": slots, "width": width, "BLOCK": block, "BLOCK_K": 8}
        launch(kernels.add_slots, grid, operands, num_warps=4)

    def _delta(self, saved: UnitOutputs) -> Tensor:
        """δ_q = g · u_q + Σ_j a_j · ∂L/∂a_j, fp32 [Q]."""
        delta = (self.grad_pooled.float() * saved.pooled.float()).sum(1)
        if self.grad_weights is None:
            return delta
        assert saved.weights is not None
        call = self.call
        slots = torch.empty(call.items.slots, 1, device=delta.device)
        operands = {
            "weights": saved.weights, "grad_weights": self.grad_weights, "slots": slots,
            **call.item_operands(), **call.weight_strides(), "T": 128, "HAS_MASK": self.tensors.row_mask is not None,
        }  # fmt: skip
        with on_device(self.tensors.keys):
            programs = min(call.items.bound * self.config.candidates, num_programs(delta.device, 8))
            launch(kernels.weighted_gradients, (programs,), operands, num_warps=4)
            self._add_slots(slots)
        return delta + slots[: delta.shape[0], 0]

    def gather(self, layer: int) -> None:
        """Σ dx̂ and Σ dx̂ · x̂ of a Dice layer, times 1 / count, what batch statistics add to its gradients: for the passes that
        follow."""
        assert self.inv_count is not None
        width, before = self.config.hidden_units[layer], sum(self.config.hidden_units[:layer])
        private = torch.zeros(self.call.programs, 2 * width, device=self.sums.device)
        unused = self.call.params
        with on_device(self.tensors.keys):
            self.launch(layer, private=private, private_size=2 * width, offset_slots=unused, first_slots=unused,
                        grad_keys=unused)  # fmt: skip
        torch.mul(private.sum(0), self.inv_count, out=self.sums[2 * before : 2 * (before + width)])

    def gather_all(self) -> None:
        """``sums``: those of every layer, [H1, H1, H2, H2, …] flat."""
        for layer in reversed(range(len(self.config.hidden_units))):
            self.gather(layer)

    def run(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(sums of the programs [columns], γ [Q, H1], first-layer gradient per query row, gradient of keys)."""
        config, call, keys = self.config, self.call, self.tensors.keys
        rows, dim = keys.shape
        width, queries = config.hidden_units[0], self.tensors.query.shape[0]
        private = torch.zeros(call.programs, self.columns, device=keys.device)
        offset_slots = torch.empty(call.items.slots, width, device=keys.device)
        first_shape = (width, dim) if config.interaction == "outer" else (dim,)
        first_slots = torch.empty(call.items.slots, *first_shape, device=keys.device)
        # Rows of padded keys beyond their list's length belong to no item.
        make = torch.zeros if config.padded_length else torch.empty
        dtype = keys.dtype if self.groups == 1 else torch.float32
        grad_keys = make(self.groups * rows, dim, dtype=dtype, device=keys.device)
        with on_device(keys):
            self.launch(-1, private=private, private_size=self.columns, offset_slots=offset_slots,
                        first_slots=first_slots, grad_keys=grad_keys)  # fmt: skip
            self._add_slots(offset_slots)
            self._add_slots(first_slots)
        if self.groups > 1:
            grad_keys = grad_keys.view(self.groups, rows, dim).sum(0).to(keys.dtype)
        return self.in_order(private.sum(0)), offset_slots[:queries], first_slots[:queries], grad_keys


def zeros(tensors: UnitTensors) -> UnitGradients:
    def like(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.zeros_like(tensor, memory_format=torch.contiguous_format)

    return UnitGradients(
        torch.zeros_like(tensors.query), tensors.keys.new_zeros(tensors.keys.shape),
        [torch.zeros_like(w, memory_format=torch.contiguous_format) for w in tensors.weights],
        [like(b) for b in tensors.biases], [like(a) for a in tensors.alphas],
    )  # fmt: skip


def own(piece: Tensor, parameter: Tensor) -> Tensor:
    """``piece`` of the sums as a gradient of ``parameter``, in its own memory: an operator's results may not alias."""
    return piece.view(parameter.shape).to(parameter.dtype, copy=True)


def backward(
    config: UnitConfig,
    tensors: UnitTensors,
    saved: UnitOutputs,
    grad_pooled: Tensor,
    grad_weights: Tensor | None,
    inv_count: Tensor | None,
) -> UnitGradients:
    """Gradients of everything; ``saved.weights`` is needed with ``grad_weights`` and softmax. See
    torch_impl.backward."""
    if tensors.query.shape[0] == 0:
        return zeros(tensors)
    return gradients(Backward(config, tensors, saved, grad_pooled, grad_weights, inv_count))


def gradients(work: Backward) -> UnitGradients:
    """Every pass of ``work``, and its results put together."""
    config, tensors = work.config, work.tensors
    depth, dim = len(config.hidden_units), config.embedding_dim
    if work.inv_count is not None:
        work.gather_all()
    sums, offset, per_query, grad_keys = work.run()

    # The row of sums, piece by piece.
    widths = config.hidden_units
    sizes = [size for width in widths for size in (width, width)] + [widths[-1], 1]
    sizes += [a * b for a, b in pairwise(widths)]
    outer = config.interaction == "outer"
    sizes += [] if outer else [widths[0] * dim] * 2
    pieces = sums.split_with_sizes(sizes)
    of_layers, out_weight, out_bias = pieces[: 2 * depth], pieces[2 * depth], pieces[2 * depth + 1]
    matrices = pieces[2 * depth + 2 :]
    if outer:
        first = FirstLayerGradients(offset, matrix=per_query)
    else:
        shared, product = (m.view(widths[0], dim) for m in matrices[-2:])
        first = FirstLayerGradients(offset, shared, product, per_query)
    grad_first, grad_bias, grad_query = first_layer_backward(config, tensors, first)

    weights = [grad_first]
    weights += [own(matrices[i], w) for i, w in enumerate(tensors.weights[1:-1])]
    weights.append(own(out_weight, tensors.weights[-1]))
    biases: list[Tensor | None] = [grad_bias]
    for value, bias in zip([*of_layers[2::2], out_bias], tensors.biases[1:], strict=True):
        biases.append(None if bias is None else own(value, bias))
    alphas: list[Tensor | None] = []
    for value, alpha in zip(of_layers[1::2], tensors.alphas, strict=True):
        if alpha is None:
            alphas.append(None)
        else:
            total = value.sum() if alpha.numel() == 1 and value.numel() > 1 else value
            alphas.append(own(total, alpha))
    return UnitGradients(grad_query, grad_keys, weights, biases, alphas)
