"""Launches of the universal backward kernels (``kernels_universal_backward.py``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..._launch import launch, on_device
from . import kernels_parameters
from . import kernels_universal_backward as kernels
from .factorise import FirstLayerGradients, first_layer_backward
from .first_layer import outer_gradients
from .parameters import Slopes, like
from .problem import UnitConfig, UnitGradients, UnitOutputs, UnitTensors
from .universal import Prepared, launch_options, num_programs, scratch_columns

# Sums that programs keep apart until the end; beyond this fewer programs run than the GPU could hold.
PRIVATE_BYTES = 96 << 20
COLLECTED = 64  # numbers of a program that adds up those of all programs


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
        nothing = call.params
        self.sums = nothing
        if inv_count is not None:
            self.sums = torch.zeros(2 * sum(config.hidden_units), dtype=torch.float32, device=keys.device)
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

    def places(self, vectors: int, matrices: int) -> tuple[int, int]:
        """Where in a row of ``private`` the vectors and the matrices begin, as many numbers as there are of each."""
        return 0, vectors

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
        slots = torch.empty(call.items.slots, 1, dtype=torch.float32, device=delta.device)
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
        private = torch.zeros(self.call.programs, 2 * width, dtype=torch.float32, device=self.sums.device)
        unused = self.call.params
        with on_device(self.tensors.keys):
            self.launch(layer, private=private, private_size=2 * width, first_slots=unused, grad_keys=unused)
        torch.mul(private.sum(0), self.inv_count, out=self.sums[2 * before : 2 * (before + width)])

    def gather_all(self) -> None:
        """``sums``: those of every layer, [H1, H1, H2, H2, …] flat."""
        for layer in reversed(range(len(self.config.hidden_units))):
            self.gather(layer)

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """(sums by program [P, columns], first-layer gradient and γ per query row [Q, ·], gradient of keys)."""
        config, call, keys = self.config, self.call, self.tensors.keys
        rows, dim = keys.shape
        width, queries = config.hidden_units[0], self.tensors.query.shape[0]
        private = torch.zeros(call.programs, self.columns, dtype=torch.float32, device=keys.device)
        first = width * dim if config.interaction == "outer" else dim
        slots = torch.empty(call.items.slots, first + width, dtype=torch.float32, device=keys.device)
        # Rows of padded keys beyond their list's length belong to no item.
        make = torch.zeros if config.padded_length else torch.empty
        dtype = keys.dtype if self.groups == 1 else torch.float32
        grad_keys = make(self.groups * rows, dim, dtype=dtype, device=keys.device)
        with on_device(keys):
            self.launch(-1, private=private, private_size=self.columns, first_slots=slots, grad_keys=grad_keys)
            self._add_slots(slots)
        if self.groups > 1:
            grad_keys = grad_keys.view(self.groups, rows, dim).sum(0).to(keys.dtype)
        return private, slots[:queries], grad_keys

    def collect(self, private: Tensor, vectors: Sequence[Piece], matrices: Sequence[Piece]) -> None:
        """Write the sums over programs to where ``vectors`` and ``matrices``, in their order in a row, want them."""
        at_vectors, at_matrices = self.places(*(sum(size for size, _ in pieces) for pieces in (vectors, matrices)))
        wanted = [*_placed(at_vectors, vectors), *_placed(at_matrices, matrices)]
        places, targets = zip(*wanted, strict=True)
        sizes = tuple(target.numel() for target in targets)
        operands = {
            "private": private, "targets": targets, "programs": private.shape[0], "ROW": private.shape[1],
            "PLACES": places, "SIZES": sizes, "BLOCK": COLLECTED,
        }  # fmt: skip
        grid = sum(-(-size // COLLECTED) for size in sizes)
        with on_device(private):
            launch(kernels_parameters.scatter_parameters, (grid,), operands, num_warps=4)


Piece = tuple[int, Tensor | None]  # so many numbers of a row, and the tensor that wants their sums, if one does


def _placed(begin: int, pieces: Sequence[Piece]) -> Iterator[tuple[int, Tensor]]:
    """Where in a row each piece begins that is wanted."""
    for size, target in pieces:
        if target is not None:
            yield begin, target
        begin += size


def zeros(tensors: UnitTensors) -> UnitGradients:
    def like(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.zeros_like(tensor, memory_format=torch.contiguous_format)

    return UnitGradients(
        torch.zeros_like(tensors.query), tensors.keys.new_zeros(tensors.keys.shape),
        [torch.zeros_like(w, memory_format=torch.contiguous_format) for w in tensors.weights],
        [like(b) for b in tensors.biases], [like(a) for a in tensors.alphas],
    )  # fmt: skip


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
    dim = config.embedding_dim
    if work.inv_count is not None:
        work.gather_all()
    private, slots, grad_keys = work.run()

    widths, outer = config.hidden_units, config.interaction == "outer"
    upper = [like(weight) for weight in tensors.weights[1:-1]]
    out_weight = like(tensors.weights[-1])
    upper_biases = [
        None if bias is None else like(bias) for bias in tensors.biases[1:]
    ]  # that of the first is the sum of γ
    slopes = Slopes(tensors.alphas, widths)
    vectors: list[Piece] = []
    for h, bias, alpha in zip(widths, [None, *upper_biases[:-1]], slopes.memory, strict=True):
        vectors += [(h, bias), (h, alpha)]
    vectors += [(widths[-1], out_weight), (1, upper_biases[-1])]
    of_first = [] if outer else [private.new_empty(widths[0], dim) for _ in range(2)]
    work.collect(private, vectors, [(matrix.numel(), matrix) for matrix in (*upper, *of_first)])
    if outer:
        grad_first, grad_bias, grad_query = outer_gradients(config, tensors, work.call.wide, slots)
    else:
        shared, product = of_first
        gradients_of_first = FirstLayerGradients(slots[:, dim:], shared, product, slots[:, :dim])
        grad_first, grad_bias, grad_query = first_layer_backward(config, tensors, gradients_of_first)
    weights = [grad_first, *upper, out_weight]
    return UnitGradients(grad_query, grad_keys, weights, [grad_bias, *upper_biases], slopes.gradients())
