"""FBGEMM's CPU tables as a second opinion, where ``fbgemm_gpu`` is installed (``fbgemm-gpu-cpu==1.8.0`` fits torch 2.13).

Its nearest optimizer is row-wise Adagrad with a counter-based decay. With eps = 1, a learning rate that does not look at the
sums (COUNTER_SGD) and the counter set to n_j − 1 before the step, it takes the paper's step.
"""

from __future__ import annotations

import pytest
import torch

from din_kernels.functional import sparse_update_

pytest.importorskip("fbgemm_gpu")

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    CounterBasedRegularizationDefinition,
    CounterWeightDecayMode,
    LearningRateMode,
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)

HALF_LIFE = 2**30  # so long that the counter does not fade; the decay is weight_decay · half-life / counter


@pytest.mark.parametrize("reg_lambda", [0.0, 0.7])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_fbgemm_takes_the_same_step(backend, reg_lambda):
    rows, width, lr = 40, 8, 0.3
    weight, counts = torch.randn(rows, width), torch.randint(1, 50, (rows,))
    ids, grad = torch.randint(0, rows, (70,)), torch.randn(70, width)
    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, width, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD, pooling_mode=PoolingMode.SUM, learning_rate=lr, eps=1.0,
        weight_decay=reg_lambda / HALF_LIFE, weight_decay_mode=WeightDecayMode.COUNTER,
        counter_based_regularization=CounterBasedRegularizationDefinition(
            counter_weight_decay_mode=CounterWeightDecayMode.DECOUPLE, counter_halflife=HALF_LIFE, adjustment_ub=0.0,
            learning_rate_mode=LearningRateMode.COUNTER_SGD,
        ),
    )  # fmt: skip
    table.split_embedding_weights()[0].copy_(weight)
    with torch.no_grad():
        table.row_counter_host.copy_(counts - 1)
    table(ids, torch.arange(71)).backward(grad)
    ours = weight.clone()
    sparse_update_(
        ours, ids, grad, lr=lr, regularizer="mba", reg_lambda=reg_lambda, occurrences=counts, backend=backend
    )
    torch.testing.assert_close(ours, table.split_embedding_weights()[0], rtol=1e-5, atol=1e-5)
    absent = torch.ones(rows, dtype=torch.bool)
    absent[ids] = False
    assert torch.equal(ours[absent], weight[absent])
