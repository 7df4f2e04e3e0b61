"""Ways into and out of the packed layout: round trips, gradients, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from din_kernels import jagged
from din_kernels.jagged import Jagged
from din_kernels.testing import jagged_lengths, offsets_of


def packed(lengths, *trailing, dtype=torch.int64):
    values = torch.arange(float(sum(lengths) * max(1, int(torch.tensor(trailing).prod()))), dtype=torch.float64)
    return Jagged(values.view(sum(lengths), *trailing), offsets_of(lengths, dtype=dtype))


class TorchRecLike:
    """The two methods of TorchRec's JaggedTensor that are used."""

    def __init__(self, values, offsets):
        self._values, self._offsets = values, offsets

    def values(self):
        return self._values

    def offsets(self):
        return self._offsets


@settings(max_examples=60, deadline=None)
@given(lengths=jagged_lengths(), trailing=st.sampled_from([(), (3,), (2, 3)]), extra=st.integers(0, 3),
       dtype=st.sampled_from([torch.int32, torch.int64]))  # fmt: skip
def test_padded_and_back(lengths, trailing, extra, dtype):
    start = packed(lengths, *trailing, dtype=dtype)
    longest = max(lengths, default=0) + extra
    padded = jagged.to_padded(start, longest, fill=-1.0)
    assert padded.shape == (len(lengths), longest, *trailing)
    for sample, length in enumerate(lengths):
        first = sum(lengths[:sample])
        assert torch.equal(padded[sample, :length], start.values[first : first + length])
        assert bool((padded[sample, length:] == -1).all())
    back = jagged.from_padded(padded, start.lengths)
    assert torch.equal(back.values, start.values)
    assert torch.equal(back.offsets, start.offsets)
    assert back.offsets.dtype == dtype
    assert torch.equal(jagged.lengths_to_offsets(start.lengths), start.offsets)


@settings(max_examples=40, deadline=None)
@given(lengths=jagged_lengths(), seed=st.integers(0, 99))
def test_masks_of_any_pattern(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(len(lengths), max(lengths, default=0), generator=generator) < 0.5
    values = torch.randn(*mask.shape, 2, generator=generator)
    found = jagged.from_mask(values, mask)
    assert found.lengths.tolist() == mask.sum(1).tolist()
    expected = [values[b, t] for b in range(mask.shape[0]) for t in range(mask.shape[1]) if mask[b, t]]
    assert torch.equal(found.values, torch.stack(expected) if expected else values.new_zeros(0, 2))


def test_longest_list_decides_the_width():
    assert jagged.to_padded(packed([2, 0, 5], 3)).shape == (3, 5, 3)
    assert jagged.to_padded(packed([], 3)).shape == (0, 0, 3)


def test_nested_without_a_copy():
    start = packed([2, 0, 3], 4)
    nested = jagged.to_nested(start)
    assert nested.is_nested
    back = jagged.from_nested(nested)
    assert back.values.data_ptr() == start.values.data_ptr()
    assert torch.equal(back.offsets, start.offsets)


def test_torchrec_without_importing_it():
    start = packed([2, 0, 3], 4)
    assert jagged.from_jagged_tensor(TorchRecLike(*start)) == start
    with pytest.raises(TypeError, match=r"expected a TorchRec JaggedTensor with .* got Tensor"):
        jagged.from_jagged_tensor(torch.ones(3))
    keyed = TorchRecLike(*start)
    keyed.keys = lambda: ["history"]
    with pytest.raises(TypeError, match="holds several lists per sample: pick one"):
        jagged.from_jagged_tensor(keyed)


def test_gradients_flow_to_the_values():
    values = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    lengths, mask = torch.tensor([2, 0, 4]), torch.rand(3, 4) > 0.4
    assert torch.autograd.gradcheck(lambda v: jagged.from_padded(v, lengths).values, values)
    assert torch.autograd.gradcheck(lambda v: jagged.from_mask(v, mask).values, values)
    flat = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, 2, 2, 6])
    assert torch.autograd.gradcheck(lambda v: jagged.to_padded(Jagged(v, offsets), 5), flat)
    (grad,) = torch.autograd.grad(jagged.to_nested(Jagged(flat, offsets)).values().sum(), flat)
    assert torch.equal(grad, torch.ones_like(flat))


def test_errors_name_the_argument():
    values = torch.zeros(3, 4, 2)
    for call, error, message in (
        (lambda: jagged.from_padded(values, torch.tensor([1, 2])), ValueError, r"lengths must have shape \[3\]"),
        (lambda: jagged.from_padded(values, torch.tensor([1, 2, 5])), ValueError, "lengths must not exceed .* T = 4"),
        (lambda: jagged.from_padded(values, torch.ones(3)), TypeError, "lengths must have dtype int32, int64"),
        (lambda: jagged.from_mask(values, torch.ones(3, 4)), TypeError, "mask must have dtype bool"),
        (
            lambda: jagged.from_mask(values, torch.ones(3, 5, dtype=torch.bool)),
            ValueError,
            r"mask must have shape \[3, 4\]",
        ),
        (
            lambda: jagged.lengths_to_offsets(torch.ones(2, 2, dtype=torch.int64)),
            ValueError,
            "lengths must have 1 dimension",
        ),
        (lambda: jagged.offsets_to_lengths(torch.ones(2)), TypeError, "offsets must have dtype int32, int64"),
        (lambda: jagged.to_padded(packed([2, 5]), 3), ValueError, "length = 3 is shorter than the longest list, 5"),
        (lambda: jagged.from_nested(values), TypeError, r"layout=torch\.jagged"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_nested_layouts_that_are_not_lists_of_rows():
    nested = jagged.to_nested(packed([2, 3], 4))
    with pytest.raises(ValueError, match="only dimension 1 may be ragged"):
        jagged.from_nested(nested.transpose(1, 2))
    holes = torch.nested.narrow(
        torch.zeros(2, 5, 3), 1, torch.tensor([0, 1]), torch.tensor([2, 3]), layout=torch.jagged
    )
    with pytest.raises(ValueError, match="holes"):
        jagged.from_nested(holes)
