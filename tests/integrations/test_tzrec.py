"""TorchEasyRec's own ``DINEncoder`` and ``Dice``, from the installed package.

The package imports TorchRec, FBGEMM and protocol buffers at its top; its DIN modules use none of them, so those imports are
answered with empty modules here and the two files under test are the real ones.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

import pytest
import torch

from ._parity import assert_parity, padded_inputs

spec = importlib.util.find_spec("tzrec")
if spec is None or not spec.submodule_search_locations:
    pytest.skip("tzrec is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def tzrec():
    class Unused:
        pass

    def arange(size, device):
        return torch.arange(size, device=device)

    stubs = {
        "tzrec": {"__path__": list(spec.submodule_search_locations)},
        "tzrec.modules.hstu": dict.fromkeys(
            ("HSTUCacheState", "RelativeBucketedTimeAndPositionBasedBias", "SequentialTransductionUnitJagged"), Unused
        ),
        "tzrec.protos.seq_encoder_pb2": {"SeqEncoderConfig": Unused},
        "tzrec.utils.config_util": {},
        "tzrec.utils.fx_util": {"fx_arange": arange},
    }
    before = {name for name in sys.modules if name.split(".")[0] == "tzrec"}
    for name, attributes in stubs.items():
        module = types.ModuleType(name)
        module.__dict__.update(attributes)
        sys.modules[name] = module
    yield types.SimpleNamespace(
        DINEncoder=importlib.import_module("tzrec.modules.sequence").DINEncoder,
        Dice=importlib.import_module("tzrec.modules.activation").Dice,
    )
    for name in [name for name in sys.modules if name.split(".")[0] == "tzrec" and name not in before]:
        del sys.modules[name]


@pytest.mark.parametrize("activation", ["nn.ReLU", "nn.Sigmoid", "nn.PReLU", "Dice", "nn.Tanh"])
@pytest.mark.parametrize("options", [{}, {"use_bn": True}, {"use_ln": True}, {"dropout_ratio": 0.3}])
def test_din_encoder(tzrec, activation, options):
    if activation == "Dice" and "dropout_ratio" in options:
        pytest.skip("behind the library's Dice dropout draws in another order: same distribution, no parity")
    mlp = {"hidden_units": [8, 4], "activation": activation, **options}
    encoder = tzrec.DINEncoder(5, 3, "click", mlp, max_seq_length=6)
    make = padded_inputs()

    def inputs(seed):
        query, keys, lengths = make(seed)
        return [query[:, :3], keys, lengths]

    def call(module, given):
        names = ("click.query", "click.sequence", "click.sequence_length")
        return module(dict(zip(names, given, strict=True)))

    assert_parity(encoder, inputs, call)


@pytest.mark.parametrize(("dim", "shape"), [(2, (12, 5)), (3, (4, 3, 5))])
def test_dice(tzrec, dim, shape):
    assert_parity(
        tzrec.Dice(5, dim=dim),
        lambda seed: [torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)],
        lambda module, inputs: module(*inputs),
    )
