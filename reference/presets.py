"""Training recipes by name, as changes to the defaults of ``Options``: ``--preset NAME``.

``lr_decay`` is the factor that the learning rate has lost by the end of the run, falling exponentially from step to step.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # Section 6.2 of the paper, for MovieLens and Amazon: "SGD as the optimizer with exponential decay, in which learning
    # rate starts at 1 and decay rate is set to 0.1. The mini-batch size is set to be 32."
    "paper-public": {"optimizer": "sgd", "lr": 1.0, "lr_decay": 0.1, "batch_size": 32, "mlp_hidden": (200, 80)},
    # Section 6.2, for Alibaba: Adam with exponential decay, "learning rate starts at 0.001 and decay rate is set to 0.9",
    # mini-batches of 5,000, embeddings of 12, layers 192 × 200 × 80 × 2. Section 6.4: λ of MBA is 0.01.
    "paper-alibaba": {
        "optimizer": "adam",
        "lr": 0.001,
        "lr_decay": 0.9,
        "batch_size": 5000,
        "field_dim": 12,
        "mlp_hidden": (200, 80),
        "reg_lambda": 0.01,
    },
    # Minutes on one CPU core for data sets of the size of Amazon Beauty: Adam at a larger batch, small initial embeddings.
    "quick": {
        "optimizer": "adam",
        "lr": 0.003,
        "lr_decay": 0.1,
        "batch_size": 256,
        "epochs": 2,
        "init_std": 0.02,
        "interaction": "product",
        "threads": 1,
    },
}
