"""One call of the local activation unit, in the normal form that every backend receives.

The public call accepts several layouts (padded keys with lengths or a mask, jagged keys with offsets, one or many
candidates). They all become *lists of rows*: sample ``s`` owns the rows ``starts[s] … ends[s] − 1`` of ``keys`` [R, D], and
query row ``q`` belongs to sample ``q // C``. Padded keys are the same memory seen as [B·T, D]; nothing is copied.

The mathematics (DESIGN: first layer factorised; paper eq. 3)::

    z1 = c_q + A_q e                c_q [H1] and A_q [H1, D] per query row, see factorise.py
    h1 = φ(z1);  z2 = W2 h1 + b2;  …  s = w · h_L + b
    a  = s                          or softmax over the list of scale · s
    u_q = Σ_j a_j e_j               an empty list gives 0

Backends implement three functions over ``(UnitConfig, UnitTensors)``: ``statistics`` (Dice in training), ``forward`` and
``backward``; see ``torch_impl.py`` for the plain statement of each.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

ACTIVATIONS = ("dice", "prelu", "sigmoid", "relu")
INTERACTIONS = ("outer", "product")


@dataclass(frozen=True)
class UnitConfig:
    """What is known before any data is: hashable, so it can select a compiled kernel.

    interaction     "outer" or "product"
    activation      "dice", "prelu", "sigmoid" or "relu"
    embedding_dim   D
    hidden_units    widths of the hidden layers, 1 to 3 of them on the Triton backend
    softmax, scale  a = softmax(scale · s) over each list, or a = s (scale unused)
    candidates      C: query rows per sample
    padded_length   T when rows come from padded keys [B, T, D]; 0 when keys are jagged
    precision       how fp32 products are taken: "ieee" (or an emulation as accurate) or "tf32"
    """

    interaction: str
    activation: str
    embedding_dim: int
    hidden_units: tuple[int, ...]
    softmax: bool = False
    scale: float = 1.0
    candidates: int = 1
    padded_length: int = 0
    precision: str = "ieee"

    @functools.cached_property
    def _hash(self) -> int:
        return hash(dataclasses.astuple(self))

    def __hash__(self) -> int:
        """Every launch looks something up by it."""
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        """Without the hash, which is of this process."""
        return UnitConfig, dataclasses.astuple(self)

    @property
    def uses_dice(self) -> bool:
        return self.activation == "dice"


class Gathered(NamedTuple):
    """Behaviours as ids: row r of the keys is [item_table[item_ids[r]] ; category_table[category_ids[r]]].

    Tables [V, d] and [K, d'] of one dtype with unit stride along their columns; ids [R], contiguous, int32 or int64.
    """

    item_table: Tensor
    category_table: Tensor
    item_ids: Tensor
    category_ids: Tensor

    def tables_and_ids(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A plain tuple, which the kernels take for one argument."""
        return self.item_table, self.category_table, self.item_ids, self.category_ids

    def strides(self) -> tuple[int, int, int]:
        return self.item_table.stride(0), self.category_table.stride(0), self.item_table.shape[1]


class UnitTensors(NamedTuple):
    """The data of one call.

    query     [Q, D], Q = S · C
    keys      [R, D], unit stride along D, any row stride
    starts    [S] int32 or int64, first row of each list
    ends      [S] same dtype, one past the last row
    row_mask  [R] bool (True = real behaviour) or None; rows outside every list need not be masked
    weights   one [out, in] per linear layer, the last [1, H_L]
    biases    one [out] or None per linear layer
    alphas    one per hidden layer: Dice alpha [H], PReLU weight [1] or [H]; None otherwise
    means, rstds  one [H] per hidden layer for Dice: p = σ((z − mean) · rstd), batch or running statistics alike
    gathered  where the keys are to be read instead (universal Triton kernels only); ``keys`` then has their shape, dtype
              and device, but no memory worth reading
    """

    query: Tensor
    keys: Tensor
    starts: Tensor
    ends: Tensor
    row_mask: Tensor | None
    weights: list[Tensor]
    biases: list[Tensor | None]
    alphas: list[Tensor | None]
    means: list[Tensor]
    rstds: list[Tensor]
    gathered: Gathered | None = None


class UnitOutputs(NamedTuple):
    """pooled [Q, D]; weights [R·C] in the layout of the keys (see ``weight_index``) or None; log_normaliser [Q] fp32:
    log Σ exp(scale · s) of each list (−inf for an empty one) when ``softmax``, else None. Saved for backward instead of
    the weights, which are recomputed."""

    pooled: Tensor
    weights: Tensor | None
    log_normaliser: Tensor | None


class UnitGradients(NamedTuple):
    """Gradients in the shapes of ``UnitTensors``; ``keys`` is contiguous [R, D] with 0 in rows outside every list."""

    query: Tensor
    keys: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    alphas: list[Tensor | None]


def weight_index(row: Tensor, candidate: Tensor, config: UnitConfig) -> Tensor:
    """Where the weight of (row of keys, candidate of its sample) lies in the flat weights [R·C].

    Jagged keys: weights [N, C], row·C + c. Padded keys: weights [B, C, T], (b·C + c)·T + t.
    """
    if config.padded_length:
        sample = row // config.padded_length
        return row + config.padded_length * (sample * (config.candidates - 1) + candidate)
    return row * config.candidates + candidate
