"""``convert`` itself: what it reports, that it can be undone, and that it runs inside a whole model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import din_kernels
from reference.units import Dice, LocalActivationUnit

from ._parity import assert_parity, padded_inputs


class Model(nn.Module):
    """A small DIN of the project's own unfused parts."""

    def __init__(self, activation="dice", interaction="outer"):
        super().__init__()
        self.unit = LocalActivationUnit(5, (8, 4), activation, interaction, softmax=True)
        self.top = nn.Sequential(nn.Linear(10, 7), Dice(7), nn.Linear(7, 1))

    def forward(self, query, keys, lengths):
        return self.top(torch.cat([query, self.unit(query, keys, lengths=lengths)], dim=1))


@pytest.mark.parametrize("activation", ["dice", "prelu", "sigmoid"])
@pytest.mark.parametrize("interaction", ["outer", "product"])
def test_reference_modules(activation, interaction):
    make = padded_inputs()
    assert_parity(
        Model(activation, interaction), lambda seed: list(make(seed)), lambda model, inputs: model(*inputs),
        swapped={"LocalActivationUnit", "Dice"},
    )  # fmt: skip


def test_report_names_modules_and_undo_restores_with_what_was_trained():
    model = Model()
    reference = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # made before: parameters stay the same objects
    converted, report = din_kernels.convert(model)
    assert converted is model
    assert [entry.name for entry in report.swapped] == ["unit", "unit.activations.0", "unit.activations.1", "top.1"]
    assert isinstance(model.unit, din_kernels.LocalActivationUnit)
    assert "unit  LocalActivationUnit: whole unit" in str(report)
    query, keys, lengths = (x.float() if x.is_floating_point() else x for x in padded_inputs()(0))
    again, second = din_kernels.convert(model)
    assert again is model
    assert not second.entries
    assert "nothing to convert" in str(second)
    model(query, keys, lengths).sum().backward()
    optimizer.step()
    trained = copy.deepcopy(model.state_dict())
    report.undo()
    assert type(model.unit) is LocalActivationUnit
    assert type(model.top[1]) is Dice
    assert model.unit.__dict__.keys() == reference.unit.__dict__.keys()
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    assert any(not torch.equal(value, reference.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_model_that_is_itself_a_unit():
    unit = LocalActivationUnit(5)
    converted, report = din_kernels.convert(unit)
    assert converted is unit
    assert report.swapped[0].name == ""
    assert "(the model)" in str(report)


def test_subclasses_are_left_and_named():
    class Mine(LocalActivationUnit):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) * 2

    model = nn.Sequential(Mine(5, activation="relu"))
    _, report = din_kernels.convert(model)
    assert not report.swapped
    assert report.left[0].kind.endswith("Mine")
    assert "subclass of LocalActivationUnit" in str(report)
    assert type(model[0]) is Mine


def test_backend_is_checked_before_anything_changes():
    model = Model()
    with pytest.raises(ValueError, match="backend"):
        din_kernels.convert(model, backend="cuda")
    assert type(model.unit) is LocalActivationUnit
    _, report = din_kernels.convert(model, backend="torch")
    assert model.unit.backend == "torch"
    assert report.swapped


def test_explicit_triton_runs_the_kernels(device):
    pytest.importorskip("triton")
    model = Model("sigmoid", "product").to(device)
    query, keys, lengths = (x.float().to(device) if x.is_floating_point() else x.to(device) for x in padded_inputs()(0))
    expected = model(query, keys, lengths)
    din_kernels.convert(model, backend="triton")
    torch.testing.assert_close(model(query, keys, lengths), expected, rtol=1e-3, atol=1e-4)


def test_another_package_of_a_known_name_is_left_alone(monkeypatch):
    """Someone's own package called ``reference``, and a library in a version that lacks what the adapter is about."""
    import sys
    import types

    mine = type("LocalActivationUnit", (nn.Linear,), {"__module__": "reference.mine"})
    monkeypatch.setitem(sys.modules, "recbole", types.ModuleType("recbole"))
    for name in [name for name in sys.modules if name.startswith(("recbole.", "din_kernels.integrations.recbole"))]:
        monkeypatch.delitem(sys.modules, name)
    old = type("SequenceAttLayer", (nn.Linear,), {"__module__": "recbole.model.layers"})
    model = nn.Sequential(mine(3, 3), old(3, 3), old(3, 3), Dice(3))
    _, report = din_kernels.convert(model)
    assert [entry.name for entry in report.swapped] == ["3"]
    assert [entry.name for entry in report.left] == ["1"]
    assert "this recbole is not one that din_kernels knows" in str(report)
