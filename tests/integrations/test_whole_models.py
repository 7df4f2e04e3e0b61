"""Each library's own DIN, trained for twenty steps as it is and converted: the same losses."""

from __future__ import annotations

import copy

import pytest
import torch

import din_kernels


def losses(model, batches, forward, optimizer):
    optimizer = optimizer(model.parameters())
    found = []
    for batch in batches:
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy(forward(model, batch).reshape(-1), batch["label"])
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def compare(model, batches, forward, *, minimum):
    converted, report = din_kernels.convert(copy.deepcopy(model), backend="torch")
    assert len(report.swapped) >= minimum, report

    def optimizer(parameters):
        return torch.optim.SGD(parameters, lr=0.5)

    expected = losses(model, batches, forward, optimizer)
    assert losses(converted, batches, forward, optimizer) == pytest.approx(expected, rel=1e-8)
    assert expected[-1] != pytest.approx(expected[0], rel=1e-3)  # it did learn something


def click_batches(steps=20, batch=16, length=6, items=40):
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(steps):
        lengths = torch.randint(1, length + 1, (batch,), generator=generator)
        history = torch.randint(1, items, (batch, length), generator=generator)
        history[torch.arange(length) >= lengths[:, None]] = 0
        item = torch.randint(1, items, (batch,), generator=generator)
        label = (torch.rand(batch, generator=generator) < torch.sigmoid((item % 7 - 3).float())).double()
        made.append({"history": history, "item": item, "lengths": lengths, "label": label})
    return made


def spread(model):
    """Initial embeddings of 1e-4 would make every history look alike."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
            elif "alpha" in name:
                parameter.normal_(0, 0.2)
    return model.double()


def test_deepctr_torch():
    pytest.importorskip("deepctr_torch")
    from deepctr_torch.inputs import SparseFeat, VarLenSparseFeat
    from deepctr_torch.models.din import DIN

    columns = [
        SparseFeat("item", 40, embedding_dim=8),
        VarLenSparseFeat(SparseFeat("hist_item", 40, embedding_dim=8, embedding_name="item"), 6, length_name="length"),
    ]
    model = spread(
        DIN(columns, ["item"], dnn_hidden_units=(16,), att_activation="Dice", l2_reg_embedding=0, device="cpu")
    )
    model.train()

    def forward(model, batch):
        columns = [batch["item"][:, None], batch["history"], batch["lengths"][:, None]]
        return model(torch.cat(columns, dim=1).double())

    assert [*model.feature_index] == ["item", "hist_item", "length"]
    compare(model, click_batches(), forward, minimum=4)


def test_torch_rechub():
    pytest.importorskip("torch_rechub")
    from torch_rechub.basic.features import SequenceFeature, SparseFeature
    from torch_rechub.models.ranking.din import DIN

    item = SparseFeature("item", vocab_size=40, embed_dim=8, padding_idx=0)
    user = SparseFeature("lengths", vocab_size=10, embed_dim=4)
    history = SequenceFeature(
        "history", vocab_size=40, embed_dim=8, pooling="concat", shared_with="item", padding_idx=0
    )
    model = DIN(
        [user], [history], [item], mlp_params={"dims": [16]}, attention_mlp_params={"dims": [8], "activation": "prelu"}
    )
    model = spread(model)
    model.train()
    compare(model, click_batches(), lambda model, batch: model(batch), minimum=1)
