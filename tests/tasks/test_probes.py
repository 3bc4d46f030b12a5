"""Neighbours and probes: the published rules, the exact minimum, and files that refuse another backbone."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import SMALL, randomise
from pictures import complaint, photo
from safetensors.torch import save_file
from torch import Tensor, nn

from dinov3_infer import Backbone, CheckpointError, InputError, MissingFileError
from dinov3_infer.tasks import (
    KNN,
    AttentiveProbe,
    LinearProbe,
    LogisticProbe,
    OneShotSegmenter,
    Probe,
    SegmentationHead,
    nearest,
)
from dinov3_infer.tasks.attentive import _logits
from dinov3_infer.tasks.fitted import Fitted, descend
from dinov3_infer.tasks.probes import best


def blobs(count: int, classes: int = 3, width: int = 16, spread: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features around one centre per class, [count, width], and the classes; all seeds share the centres."""
    centres = 1.5 * torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (count,), generator=generator)
    return centres[targets] + spread * torch.randn(count, width, generator=generator), targets


PROBES: dict[str, Probe] = {
    "knn": KNN(k=5),
    "linear": LinearProbe(steps=200, learning_rates=(1e-3, 0.1)),
    "logistic": LogisticProbe(C=1.0),
    "attentive": AttentiveProbe(num_heads=4, epochs=10, batch_size=32, learning_rates=(1e-3, 1e-2)),
}
by_probe = pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES)


def shaped(probe: Probe, features: Tensor) -> Tensor:
    """[N, C], or for the attentive probe [N, 3, C]: each vector in one of three patches, noise in the others."""
    if probe.dims == 2:
        return features
    tokens = 0.5 * torch.randn(len(features), 3, features.shape[1], generator=torch.Generator().manual_seed(5))
    tokens[torch.arange(len(features)), torch.arange(len(features)) % 3] = features
    return tokens


@by_probe
def test_every_probe_learns_what_can_be_told_apart(probe: Probe) -> None:
    """Probes are right on unseen examples, give the same result for the same seed, and take numpy and torch."""
    (x, y), (asked, truth) = blobs(240), blobs(200, seed=1)
    x, asked = shaped(probe, x), shaped(probe, asked)
    score = probe.fit(x, y).score(asked, truth)
    proba = probe.predict_proba(asked)
    assert score > 0.9 and proba.shape == (200, 3)
    assert torch.allclose(proba.sum(-1), torch.ones(200), atol=1e-5)
    assert torch.equal(probe.predict(asked), proba.argmax(-1)) and probe.predict(asked).dtype == torch.int64
    again = type(probe)(**probe.settings()).fit(x.numpy(), y.tolist())
    assert np.array_equal(again.predict_proba(asked.numpy()), proba.numpy())


@pytest.mark.parametrize("k", [1, 10, 20])
def test_knn_is_the_published_vote(k: int) -> None:
    """Compared with loops: one softmax over the neighbours of the largest k, and votes are its partial sums."""
    (x, y), (asked, _) = blobs(100, spread=4.0), blobs(40, spread=4.0, seed=1)
    found = KNN(k=k).fit(x, y).predict(asked)
    for query, label in zip(asked, found, strict=True):
        cosines = [float(F.cosine_similarity(query, one, dim=0)) for one in x]
        order = sorted(range(100), key=lambda i, c=cosines: -c[i])[:20]  # type: ignore[misc]
        weights = np.exp(np.array([cosines[i] for i in order]) / 0.07)
        weights /= weights.sum()
        votes = np.zeros(3)
        for i, weight in list(zip(order, weights, strict=True))[:k]:
            votes[y[i]] += weight
        assert int(label) == votes.argmax()


def test_nearest_does_not_depend_on_its_chunks(monkeypatch: Any) -> None:
    bank, queries = torch.randn(50, 8), 7 * torch.randn(30, 8)
    cosines, rows = nearest(queries, bank, 4)
    expected = F.cosine_similarity(queries[:, None], bank[None], dim=-1).topk(4)
    assert torch.equal(rows, expected.indices) and torch.allclose(cosines, expected.values, atol=1e-6)
    monkeypatch.setattr("dinov3_infer.tasks.probes.CELLS", 350)  # seven queries at a time
    assert torch.equal(nearest(queries.numpy(), bank.numpy(), 4)[1], rows)


def test_linear_probes_are_torchs_sgd() -> None:
    """Each rate equals a separate run of torch's SGD, with decay to 0 and scaling by batch size."""
    x, y = blobs(90, width=6)
    probe = LinearProbe(learning_rates=(0.02, 0.5), steps=40, batch_size=32, seed=3)
    weight, bias = probe._train(x, y, 3, torch.tensor(probe.learning_rates))
    for i, rate in enumerate(probe.learning_rates):
        generator = torch.Generator().manual_seed(3)
        layer = nn.Linear(6, 3)
        with torch.no_grad():
            layer.weight.copy_(0.01 * torch.randn(3, 7, generator=generator)[:, :6])
            layer.bias.zero_()
        solver = torch.optim.SGD(layer.parameters(), lr=rate * 32 / 256, momentum=0.9)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(solver, 40)
        for step in range(40):
            if step % 2 == 0:  # 90 examples are two batches of 32; the rest is left out of this epoch
                order = torch.randperm(90, generator=generator)
            rows = order[step % 2 * 32 :][:32]
            solver.zero_grad()
            F.cross_entropy(layer(x[rows]), y[rows]).backward()
            solver.step()
            decay.step()
        assert torch.allclose(weight[i], layer.weight, atol=1e-5) and torch.allclose(bias[i], layer.bias, atol=1e-5)


def test_a_rate_that_diverges_is_never_chosen() -> None:
    x, y = blobs(100)
    probe = LinearProbe(learning_rates=(1e-3, 1e30), steps=50).fit(100 * x, y)
    assert probe.tensors["learning_rate"].tolist() == pytest.approx([1e-3])
    said = complaint(InputError, lambda: LinearProbe(learning_rates=(1e38, 2e38), steps=50).fit(100 * x, y))
    assert "no learning rate converged" in said
    logits = torch.stack((torch.full((5, 3), math.nan), -F.one_hot(torch.zeros(5).long(), 3).float()))
    assert logits[0].argmax(-1).eq(0).all() and best(logits, torch.zeros(5).long()) == 1  # all hits are NaN


@pytest.mark.parametrize("strength", [1e-4, 1.0, 100.0])
def test_logistic_regression_is_at_its_minimum(strength: float) -> None:
    """The gradient of C * (sum of losses) + |weight|^2 / 2, by autograd in float64, is zero."""
    x, y = blobs(120, spread=3.0)
    probe = LogisticProbe(C=strength, tolerance=1e-9).fit(x, y)
    weight, bias = (probe.tensors[name].double().requires_grad_() for name in ("weight", "bias"))
    loss = strength * F.cross_entropy(x.double() @ weight.T + bias, y, reduction="sum") + weight.square().sum() / 2
    loss.backward()
    assert weight.grad.abs().max() < 1e-5 * strength * 120 and bias.grad.abs().max() < 1e-5 * strength * 120


@pytest.mark.peers
@pytest.mark.parametrize("strength", [1e-3, 1.0, 100.0])
def test_logistic_regression_is_scikit_learns(strength: float) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = blobs(200, classes=5, spread=3.0)
    theirs = linear_model.LogisticRegression(C=strength, tol=1e-10, max_iter=10_000).fit(x.double().numpy(), y)
    ours = LogisticProbe(C=strength, tolerance=1e-9).fit(x, y)
    assert np.abs(ours.tensors["weight"].numpy() - theirs.coef_).max() < 1e-4
    assert np.abs(ours.predict_proba(x).numpy() - theirs.predict_proba(x.double().numpy())).max() < 1e-4


@pytest.mark.peers
def test_neighbours_are_scikit_learns() -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    (x, y), (asked, _) = blobs(200, classes=5, spread=3.0), blobs(100, classes=5, spread=3.0, seed=1)
    theirs = neighbors.KNeighborsClassifier(
        10, metric="cosine", algorithm="brute", weights=lambda distances: np.exp((1 - distances) / 0.07)
    ).fit(x.numpy(), y)
    assert np.array_equal(KNN(k=10).fit(x, y).predict(asked).numpy(), theirs.predict(asked.numpy()))


def test_the_penalty_is_chosen_on_what_was_held_out() -> None:
    """With overlapping classes and few examples, the sweep is better than nearly no penalty and than a huge one."""
    (x, y), (asked, truth) = blobs(300, width=60, spread=6.0), blobs(400, width=60, spread=6.0, seed=1)
    swept, weak, strong = (LogisticProbe(C=strength).fit(x, y) for strength in (None, 1e5, 1e-6))
    assert float(swept.tensors["strength"]) < 1
    assert swept.score(asked, truth) > max(weak.score(asked, truth), strong.score(asked, truth)) + 0.02


def test_attention_is_that_of_torch() -> None:
    """With query and key projections separated, the probe equals nn.MultiheadAttention with one query."""
    width, heads = 12, 3
    head = width // heads
    theirs = nn.MultiheadAttention(width, heads, bias=False, batch_first=True)
    query, tokens = torch.randn(1, 1, width), torch.randn(5, 7, width)
    to_query, to_key, to_value = theirs.in_proj_weight.detach().split(width)
    asked = (to_query @ query[0, 0]).view(heads, head)
    made = {
        "query": torch.einsum("hd,hdc->hc", asked, to_key.view(heads, head, width)),
        "value": to_value.view(heads, head, width),
        "norm": torch.ones(width),
        "shift": torch.zeros(width),
        "weight": torch.randn(4, width),
        "bias": torch.randn(4),
    }
    with torch.no_grad():
        theirs.out_proj.weight.copy_(torch.eye(width))
        pooled = theirs(query.expand(5, -1, -1), tokens, tokens)[0][:, 0]
    expected = F.linear(F.layer_norm(pooled, (width,)), made["weight"], made["bias"])
    assert torch.allclose(_logits(tokens, made), expected, atol=1e-5)


def test_the_attentive_probe_looks_at_the_patch_that_tells() -> None:
    """If the mean over patches is mostly noise, attention is better than a linear probe on the mean."""

    def sample(seed: int) -> tuple[Tensor, Tensor]:
        x, y = blobs(400, width=16, spread=0.7, seed=seed)
        generator = torch.Generator().manual_seed(seed + 50)
        tokens = 4 * torch.randn(400, 12, 16, generator=generator)
        tokens = torch.cat((tokens, torch.zeros(400, 12, 1)), dim=-1)
        place = torch.randint(12, (400,), generator=generator)
        tokens[torch.arange(400), place] = torch.cat((x, torch.full((400, 1), 4.0)), dim=-1)  # one channel marks it
        return tokens, y

    (tokens, y), (asked, truth) = sample(0), sample(1)
    tokens, asked = (F.pad(t, (0, 3)) for t in (tokens, asked))
    probe = AttentiveProbe(num_heads=2, epochs=12, batch_size=32, learning_rates=(1e-2,)).fit(tokens, y)
    mean = LogisticProbe(C=1.0).fit(tokens.mean(1), y)
    assert probe.score(asked, truth) > mean.score(asked.mean(1), truth) + 0.2
    half = AttentiveProbe(num_heads=2, epochs=1, learning_rates=(1e-3,)).fit(tokens.half(), y)  # as in caches
    assert half.predict_proba(asked.half()).dtype == torch.float32


def test_training_warms_up_and_decays() -> None:
    """With a constant loss, each step only shrinks the weights by rate times decay."""
    free, held = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    descend([free, held], [0.5, 0.0], 40, 0.1, 0.25, lambda: (free.sum() + held.sum()) * 0)
    rates = [0.1 * min(1, (i + 1) / 10) * (1 + math.cos(math.pi * i / 40)) / 2 for i in range(40)]
    assert torch.allclose(free, torch.full((3,), float(np.prod([1 - 0.5 * rate for rate in rates]))))
    assert torch.equal(held, torch.ones(3))


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bb() -> Backbone:
    return randomise(Backbone.from_config(SMALL["dinov3"]))  # type: ignore[return-value]


def fitted(kind: str, bb: Backbone) -> tuple[Fitted, Any]:
    """An object fitted to features of this backbone, and input for it."""
    if kind in PROBES:
        probe = type(PROBES[kind])(**PROBES[kind].settings())
        x, y = blobs(60, width=bb.embed_dim)
        return probe.fit(shaped(probe, x), y), shaped(probe, x)
    features = bb.extract_features(photo(64, 96), size=96, fit="native")
    mask = np.zeros((64, 96), bool)
    mask[10:40, 20:60] = True
    segmenter = OneShotSegmenter() if kind == "one_shot" else SegmentationHead(steps=20)
    return segmenter.fit(features, mask), features


@pytest.mark.parametrize("kind", [*PROBES, "one_shot", "head"])
def test_what_was_learnt_comes_back(kind: str, bb: Backbone, tmp_path: Path) -> None:
    """Results are equal bit for bit, settings and options are restored, and another backbone is refused."""
    learnt, asked = fitted(kind, bb)
    path = learnt.save(tmp_path / "head.safetensors", bb, pooling="mean", size=64)  # type: ignore[arg-type]
    back = type(learnt).load(path, bb)
    assert back.settings() == json.loads(json.dumps(learnt.settings())) and repr(back).startswith(type(back).__name__)
    assert back.options == {"pooling": "mean", "size": 64} and list(tmp_path.iterdir()) == [path]
    assert all(torch.equal(*two) for two in zip(learnt.predict(asked), back.predict(asked), strict=True))  # type: ignore[attr-defined]
    other = randomise(Backbone.from_config(SMALL["dinov3"]), seed=1)
    said = complaint(CheckpointError, lambda: type(learnt).load(path, other))  # type: ignore[arg-type]
    assert "fitted to features of other weights" in said and bb.fingerprint()[:12] in said
    wrong = LinearProbe if kind == "knn" else KNN
    assert f"holds a {type(learnt).__name__}, not a {wrong.__name__}" in complaint(
        CheckpointError, lambda: wrong.load(path, bb)
    )
    assert type(Fitted.load(path, bb)) is type(learnt)
    (other_file := tmp_path / "any").touch()
    assert path.stat().st_mode == other_file.stat().st_mode  # the same permissions as any new file


def test_files_of_others_are_refused(bb: Backbone, tmp_path: Path) -> None:
    learnt, _ = fitted("knn", bb)
    with pytest.raises(InputError, match="call fit"):
        KNN().save(tmp_path / "x", bb)
    assert "options are numbers, strings" in complaint(InputError, lambda: learnt.save(tmp_path / "x", bb, f=print))
    assert "no file at" in complaint(MissingFileError, lambda: KNN.load(tmp_path / "none", bb))
    damaged = tmp_path / "damaged.safetensors"
    whole = learnt.save(tmp_path / "whole.safetensors", bb).read_bytes()
    foreign = {"targets": torch.zeros(2), "other": torch.zeros(2)}
    stored = dict(kind="KNN", settings={"k": 2}, options={}, backbone=bb.fingerprint(), model=None)
    wrongs: list[Any] = [
        b"", b"{}", whole[:-5], {"dinov3_infer": "no JSON"}, {"dinov3_infer": "[]"}, {}, {"dinov3_infer": "{}"},
        {"dinov3_infer": json.dumps(stored | {"settings": {"neighbours": 3}})}, {"dinov3_infer": json.dumps(stored)},
    ]  # fmt: skip
    for wrong in wrongs:
        if isinstance(wrong, bytes):
            damaged.write_bytes(wrong)
        else:
            save_file(foreign, damaged, wrong)
        said = complaint(CheckpointError, lambda: KNN.load(damaged, bb))
        assert "was not written by save()" in said or "holds the tensors ['other', 'targets']" in said


# --- wrong inputs -----------------------------------------------------------------------------------------------------

X, Y = blobs(30)
NAN = X.clone()
NAN[7, 3] = math.nan


@pytest.mark.parametrize(
    "features, targets, said",
    [
        (X[0], Y, "features are float [N, C]"), (X[:0], Y[:0], "one row per example"), (X > 0, Y, "torch.bool"),
        (X[:, None], Y, "[30, 1, 16]"), (NAN, Y, "1 of 30 rows of the features are not finite, the first is number 7"),
        (X, Y[:20], "one for each of 30 rows, got int64 [20]"),
        (X, Y + 0.5, "targets are class names or whole numbers"),
        (X, F.one_hot(Y), "[30, 3]"), (X, torch.full((30,), 4), "all 30 targets are class 4"),
    ],
)  # fmt: skip
def test_wrong_examples_are_said(features: Tensor, targets: Tensor, said: str) -> None:
    for probe in (KNN(), LinearProbe(steps=2), LogisticProbe()):
        assert said in complaint(InputError, lambda p=probe: p.fit(features, targets))  # type: ignore[misc]


def test_wrong_questions_are_said() -> None:
    probe = KNN(k=3).fit(X, Y)
    assert "fitted to features of width 16, got 15" in complaint(InputError, lambda: probe.predict(X[:, :15]))
    assert "call fit() first" in complaint(InputError, lambda: LogisticProbe().predict(X))
    assert "k is 31 and there are 30 examples" in complaint(InputError, lambda: KNN(k=31).fit(X, Y))
    assert "[N, P, C]" in complaint(InputError, lambda: AttentiveProbe().fit(X, Y))
    assert "16 channels do not split into 5 heads" in complaint(
        InputError, lambda: AttentiveProbe(num_heads=5).fit(X[:, None], Y)
    )
    assert "queries have width 16 and the bank 4" in complaint(InputError, lambda: nearest(X, X[:, :4], 1))
    assert "k is 0 and the bank holds 30" in complaint(InputError, lambda: nearest(X, X, 0))
