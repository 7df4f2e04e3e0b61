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


def test_recbole():
    """RecBole's DIN over a data set of three fields that exists in memory only."""
    pytest.importorskip("recbole")
    pytest.importorskip("recbole.model.sequential_recommender.din")
    from recbole.data.interaction import Interaction
    from recbole.model.sequential_recommender.din import DIN
    from recbole.utils import FeatureType

    class Dataset:
        field2type = {"user": FeatureType.TOKEN, "item": FeatureType.TOKEN}  # noqa: RUF012
        config = {"numerical_features": []}  # noqa: RUF012

        def num(self, field):
            return {"user": 5, "item": 40}[field]

        def get_user_feature(self):
            return Interaction({"user": torch.arange(5)})

        def get_item_feature(self):
            return Interaction({"item": torch.arange(40)})

    config = {
        "USER_ID_FIELD": "user", "ITEM_ID_FIELD": "item", "LIST_SUFFIX": "_list", "ITEM_LIST_LENGTH_FIELD": "length",
        "NEG_PREFIX": "neg_", "MAX_ITEM_LIST_LENGTH": 6, "LABEL_FIELD": "label", "device": torch.device("cpu"),
        "embedding_size": 8, "mlp_hidden_size": [16, 8], "pooling_mode": "mean", "dropout_prob": 0.0,
        "numerical_features": [],
    }  # fmt: skip
    model = spread(DIN(config, Dataset()))
    model.train()

    def forward(model, batch):
        users = batch["item"] % 5
        return torch.sigmoid(model(users, batch["history"], batch["lengths"], batch["item"]))

    compare(model, click_batches(), forward, minimum=3)


class TwoTowers(torch.nn.Module):
    """Attention over a history, then an MLP on (item, pooled): how FuxiCTR's model zoo and TorchEasyRec's configurations put
    their layers together. (The wheels of both hold the layers, not a model that runs without their data pipelines.)"""

    def __init__(self, attention, top, attend):
        super().__init__()
        self.table = torch.nn.Embedding(40, 8, padding_idx=0)
        self.attention, self.top, self.attend = attention, top, attend

    def forward(self, batch):
        item, history = self.table(batch["item"]), self.table(batch["history"])
        pooled = self.attend(self.attention, item, history, batch)
        return torch.sigmoid(self.top(torch.cat([item, pooled], dim=1)))


@pytest.mark.parametrize("softmax", [False, True])
def test_fuxictr(softmax):
    pytest.importorskip("fuxictr")
    from fuxictr.pytorch.layers.attentions.target_attention import DIN_Attention
    from fuxictr.pytorch.layers.blocks.mlp_block import MLP_Block

    model = spread(
        TwoTowers(
            DIN_Attention(8, [16], "Dice", use_softmax=softmax),
            MLP_Block(16, [16, 8], "ReLU", output_dim=1, batch_norm=True),
            lambda attention, item, history, batch: attention(item, history, mask=batch["history"] != 0),
        )
    )
    compare(model.train(), click_batches(), lambda model, batch: model(batch), minimum=2)


def test_tzrec(tzrec):
    from tzrec.modules.mlp import MLP

    def attend(encoder, item, history, batch):
        return encoder({"c.query": item, "c.sequence": history, "c.sequence_length": batch["lengths"]})

    top = torch.nn.Sequential(MLP(16, [16, 8], activation="Dice", dim=2), torch.nn.Linear(8, 1))
    encoder = tzrec.DINEncoder(8, 8, "c", {"hidden_units": [16, 8], "activation": "Dice"})
    model = spread(TwoTowers(encoder, top, attend))
    compare(model.train(), click_batches(), lambda model, batch: model(batch), minimum=5)
