"""The package's promise, as a stranger would check it: random configurations through the public names only.

The expected values come from loops over single behaviours in float64 NumPy, written from the paper and sharing no code with
the package or with ``reference/``. Gradients are compared with central differences of that function along random directions.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

import din_kernels


def _activate(kind, z, state):
    if kind == "relu":
        return np.maximum(z, 0)
    if kind == "sigmoid":
        return 1 / (1 + np.exp(-z))
    if kind == "prelu":
        return np.where(z > 0, z, state["weight"] * z)
    p = 1 / (1 + np.exp(-(z - state["mean"]) / np.sqrt(state["var"] + state["eps"])))
    return p * z + (1 - p) * state["alpha"] * z


def _features(interaction, v, e):
    if interaction == "outer":
        return np.concatenate([e, np.outer(e, v).reshape(-1), v])
    return np.concatenate([v, e, v - e, v * e])


def unit_by_loops(config, parameters, query, lists, training):
    """Pooled [B, C, D] and the weights of every (list, candidate), one behaviour at a time.

    query [B, C, D]; lists: B arrays [n_b, D]. Dice statistics in training run over all (behaviour, candidate) pairs, layer
    by layer; the running ones are used when fewer than two pairs exist.
    """
    pairs = [(b, c, j) for b in range(len(lists)) for c in range(query.shape[1]) for j in range(len(lists[b]))]
    hidden = [_features(config["interaction"], query[b, c], lists[b][j]) for b, c, j in pairs]
    depth = len(config["hidden_units"])
    moments = []
    for layer in range(depth):
        weight, bias = parameters["weights"][layer], parameters["biases"][layer]
        z = [weight @ h + bias for h in hidden]
        state = dict(parameters["states"][layer])
        if config["activation"] == "dice" and training and len(z) > 1:
            state["mean"], state["var"] = np.mean(z, axis=0), np.var(z, axis=0)
            moments.append((state["mean"], np.var(z, axis=0, ddof=1)))
        hidden = [_activate(config["activation"], row, state) for row in z]
    scores = {
        pair: float((parameters["weights"][depth] @ h + parameters["biases"][depth])[0])
        for pair, h in zip(pairs, hidden, strict=True)
    }
    pooled = np.zeros(query.shape)
    weights = {}
    for b, rows in enumerate(lists):
        for c in range(query.shape[1]):
            s = np.array([scores[b, c, j] for j in range(len(rows))])
            if config["softmax"] and len(s):
                s = np.exp((s - s.max()) * (1.0 if config["scale"] is None else config["scale"]))
                s /= s.sum()
            for j in range(len(rows)):
                pooled[b, c] += s[j] * rows[j]
                weights[b, c, j] = s[j]
    return pooled, weights, moments


def _parameters(unit):
    n = lambda t: t.detach().double().cpu().numpy().copy()  # noqa: E731
    states = []
    for module in unit.activations:
        if isinstance(module, din_kernels.Dice):
            states.append(
                {
                    "alpha": n(module.alpha),
                    "mean": n(module.running_mean),
                    "var": n(module.running_var),
                    "eps": module.eps,
                }
            )
        elif isinstance(module, torch.nn.PReLU):
            states.append({"weight": n(module.weight)})
        else:
            states.append({})
    zero = [np.zeros(layer.out_features) for layer in unit.linears]
    return {
        "weights": [n(layer.weight) for layer in unit.linears],
        "biases": [z if layer.bias is None else n(layer.bias) for z, layer in zip(zero, unit.linears, strict=True)],
        "states": states,
    }


def _draw(rng):
    config = {
        "embedding_dim": rng.choice([1, 2, 3, 5, 8, 12]),
        "hidden_units": tuple(rng.choice([1, 2, 5, 8, 17, 36]) for _ in range(rng.choice([1, 1, 2, 3]))),
        "activation": rng.choice(["dice", "prelu", "sigmoid", "relu"]),
        "interaction": rng.choice(["outer", "product"]),
        "softmax": rng.random() < 0.5,
        "scale": rng.choice([None, 0.5, 2.0]),
        "bias": rng.random() < 0.7,
    }
    batch = rng.choice([0, 1, 2, 4])
    lengths = [rng.choice([0, 0, 1, 2, 3, 7]) for _ in range(batch)]
    candidates = rng.choice([None, None, 1, 3])
    layout = rng.choice(["offsets32", "offsets64", "lengths", "mask", "nested", "full"])
    if layout == "nested" and batch == 0:
        layout = "offsets64"  # torch.nested has no empty batch
    if layout == "full":
        lengths = [4] * batch
    return config, lengths, candidates, layout


@pytest.mark.parametrize("seed", range(80))
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_local_activation_unit(seed, backend, device):
    rng = random.Random(seed)
    config, lengths, candidates, layout = _draw(rng)
    torch.manual_seed(seed)
    dtype = torch.float64 if backend == "torch" else torch.float32
    if backend == "triton":
        pytest.importorskip("triton")
    unit = din_kernels.LocalActivationUnit(**config, backend=backend).to(device, dtype)
    for module in unit.activations:
        if isinstance(module, din_kernels.Dice):
            with torch.no_grad():
                module.alpha.uniform_(-0.5, 0.5)
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 2.0)
    training = rng.random() < 0.5
    unit.train(training)
    dim, batch = config["embedding_dim"], len(lengths)
    shape = (batch, dim) if candidates is None else (batch, candidates, dim)
    query = torch.randn(shape, dtype=dtype, device=device)
    lists = [torch.randn(n, dim, dtype=dtype, device=device) for n in lengths]
    mask = None
    if layout in ("offsets32", "offsets64", "nested"):
        keys = torch.cat([*lists, torch.zeros(0, dim, dtype=dtype, device=device)])
        offsets = torch.tensor([0, *np.cumsum(lengths)], device=device)
        how = {"offsets": offsets.int() if layout == "offsets32" else offsets}
        given = keys
        if layout == "nested":
            how, given = {}, torch.nested.nested_tensor_from_jagged(keys, offsets)
    else:
        width = max([4, *lengths])
        keys = torch.full((batch, width, dim), float("nan"), dtype=dtype, device=device)
        mask = torch.zeros(batch, width, dtype=torch.bool, device=device)
        for b, rows in enumerate(lists):
            places = range(len(rows)) if layout in ("lengths", "full") else sorted(rng.sample(range(width), len(rows)))
            for j, place in enumerate(places):
                keys[b, place] = rows[j]
                mask[b, place] = True
        if layout == "full":
            keys, mask = keys[:, :4], mask[:, :4]
        how = {
            "lengths": {"lengths": torch.tensor(lengths, device=device, dtype=torch.int64)},
            "mask": {"mask": mask},
        }.get(layout, {})
        given = keys
    before = _parameters(unit)
    n = lambda t: t.detach().double().cpu().numpy().copy()  # noqa: E731
    query3 = n(query).reshape(batch, -1, dim) if batch else np.zeros((0, candidates or 1, dim))
    expected, expected_weights, moments = unit_by_loops(config, before, query3, [n(rows) for rows in lists], training)
    query.requires_grad_(), keys.requires_grad_()
    if layout == "nested":
        given = torch.nested.nested_tensor_from_jagged(keys, offsets)
    pooled, weights = unit(query, given, **how, return_weights=True)
    tolerance = {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-5}
    assert pooled.shape == query.shape
    np.testing.assert_allclose(n(pooled).reshape(expected.shape), expected, **tolerance)

    # Weights: [N] ([N, C]) jagged, [B, T] ([B, C, T]) padded with 0 at padding.
    many = query3.shape[1] if candidates is not None else None
    if mask is None:
        flat = n(weights.values() if layout == "nested" else weights)
        start = 0
        for b, length in enumerate(lengths):
            for j in range(length):
                for c in range(many or 1):
                    got = flat[start + j] if many is None else flat[start + j, c]
                    np.testing.assert_allclose(got, expected_weights[b, c, j], **tolerance)
            start += length
    else:
        assert weights.shape == ((batch, mask.shape[1]) if many is None else (batch, many, mask.shape[1]))
        for b in range(batch):
            j = 0
            for t in range(mask.shape[1]):
                for c in range(many or 1):
                    got = n(weights)[b, t] if many is None else n(weights)[b, c, t]
                    if mask[b, t]:
                        np.testing.assert_allclose(got, expected_weights[b, c, j], **tolerance)
                    else:
                        assert got == 0
                j += int(mask[b, t])

    if training and config["activation"] == "dice":
        for module, state, (mean, var) in zip(unit.activations, before["states"], moments, strict=False):
            np.testing.assert_allclose(n(module.running_mean), 0.9 * state["mean"] + 0.1 * mean, **tolerance)
            close = 1e-3 if dtype == torch.float32 else 1e-9
            np.testing.assert_allclose(n(module.running_var), 0.9 * state["var"] + 0.1 * var, rtol=close)
        assert all(int(m.num_batches_tracked) == (1 if moments else 0) for m in unit.activations)

    if not batch or config["activation"] in ("relu", "prelu"):
        return  # a kink makes differences unreliable; other tests cover those gradients
    # Gradients of Σ pooled·g along a random direction of everything, against central differences of the loops.
    g = np.random.default_rng(seed).standard_normal(expected.shape)
    leaves = [query, keys, *unit.parameters()]
    loss = (pooled.reshape(expected.shape) * torch.from_numpy(g).to(pooled)).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    directions = [torch.randn_like(leaf) for leaf in leaves]
    slope = sum(float((d * x).sum()) for d, x in zip(directions, grads, strict=True) if x is not None)

    if dtype != torch.float64:  # the differences are taken in float64 whatever the kernels compute in
        unit = unit.double()
        query, keys = query.detach().double(), keys.detach().double()
        leaves = [query, keys, *unit.parameters()]
        directions = [d.double() for d in directions]

    def at(step):
        with torch.no_grad():
            for leaf, d in zip(leaves, directions, strict=True):
                leaf.add_(d, alpha=step)
            moved = _parameters(unit)
            for state, old in zip(moved["states"], before["states"], strict=True):
                state.update({name: old[name] for name in ("mean", "var") if name in old})  # before their update
            if mask is None:
                rows = list(torch.split(keys, lengths))
            else:
                rows = [keys[b][mask[b]] for b in range(batch)]
            value, _, _ = unit_by_loops(config, moved, n(query).reshape(batch, -1, dim), [n(r) for r in rows], training)
            for leaf, d in zip(leaves, directions, strict=True):
                leaf.sub_(d, alpha=step)
        return float((value * g).sum())

    step = 1e-7  # Dice over two rows has tiny variances: larger steps leave the linear range
    numeric = (at(step) - at(-step)) / (2 * step)
    exact = dtype == torch.float64
    assert slope == pytest.approx(numeric, rel=2e-4 if exact else 2e-3, abs=2e-6 if exact else 1e-3)
