"""Fixtures that several libraries' tests share."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

import pytest
import torch


@pytest.fixture(scope="module")
def tzrec():
    """TorchEasyRec's ``DINEncoder`` and ``Dice``.

    The package imports TorchRec, FBGEMM and protocol buffers at its top; its DIN modules use none of them, so those imports
    are answered with empty modules here and the files under test are the real ones.
    """
    spec = importlib.util.find_spec("tzrec")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("tzrec is not installed (make peers)")

    class Unused:
        pass

    def fx_arange(size, device):  # torch.fx.wrap, called on it at import, remembers this name for good
        return torch.arange(size, device=device)

    stubs = {
        "tzrec": {"__path__": list(spec.submodule_search_locations)},
        "tzrec.modules.hstu": dict.fromkeys(
            ("HSTUCacheState", "RelativeBucketedTimeAndPositionBasedBias", "SequentialTransductionUnitJagged"), Unused
        ),
        "tzrec.protos.seq_encoder_pb2": {"SeqEncoderConfig": Unused},
        "tzrec.utils.config_util": {},
        "tzrec.utils.fx_util": {"fx_arange": fx_arange},
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
    ours = "din_kernels.integrations.tzrec"  # it holds the classes of these modules
    for name in [name for name in sys.modules if name.split(".")[0] == "tzrec" and name not in before]:
        del sys.modules[name]
    sys.modules.pop(ours, None)
