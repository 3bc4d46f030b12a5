"""Probes as estimators: class names, all containers of rows, the interface of scikit-learn."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import SMALL, randomise
from pictures import complaint
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from dinov3_infer import Backbone, CheckpointError, InputError, InputTypeError
from dinov3_infer.tasks import KNN, AttentiveProbe, LinearProbe, LogisticProbe, Probe

MAKERS: dict[str, Callable[[], Probe]] = {
    "knn": lambda: KNN(k=3),
    "linear": lambda: LinearProbe(steps=60, learning_rates=(0.1,)),
    "logistic": lambda: LogisticProbe(C=1.0),
    "attentive": lambda: AttentiveProbe(num_heads=2, epochs=12, batch_size=16, learning_rates=(1e-2,)),
}
by_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
by_vector_maker = pytest.mark.parametrize("make", list(MAKERS.values())[:3], ids=list(MAKERS)[:3])

Y = np.arange(60) % 3
DRAWN = np.random.default_rng(0)
X = (DRAWN.normal(size=(60, 8)) + 4 * np.eye(8)[Y]).astype(np.float32)
NAMES = np.array(["cat", "dog", "owl"])[Y]


def rows(probe: Probe, x: np.ndarray = X) -> np.ndarray:
    return x if probe.dims == 2 else np.repeat(x[:, None], 2, axis=1)


@pytest.mark.parametrize(
    "targets",
    [
        NAMES, NAMES.tolist(), NAMES.astype(object), tuple(NAMES), Y, Y.tolist(), torch.from_numpy(Y), Y * 7 - 3,
        Y.astype(np.uint8), Y.astype(float), Y[:, None], NAMES[:, None], Y == 1, np.array(["ö", "", "猫"])[Y],
    ],
    ids=["names", "list", "objects", "tuple", "numbers", "list of numbers", "tensor", "gaps", "uint8", "whole floats",
         "column", "column of names", "bool", "odd names"],
)  # fmt: skip
@by_maker
def test_classes_come_back_as_they_were_given(make: Callable[[], Probe], targets: Any) -> None:
    probe, truth = make(), np.asarray(targets).ravel()
    x = rows(probe)
    found = probe.fit(x, targets).predict(x)
    assert isinstance(found, np.ndarray) and found.dtype.kind == probe.classes_.dtype.kind
    assert (found == truth).mean() > 0.95 and probe.score(x, targets) == (found == truth).mean()
    assert probe.classes_.tolist() == sorted(set(truth.tolist()))
    chances = probe.predict_proba(x)
    assert chances.shape == (60, len(probe.classes_)) and (probe.classes_[chances.argmax(1)] == found).all()
    inside = probe.predict(torch.from_numpy(x))
    assert (
        isinstance(inside, np.ndarray if found.dtype.kind == "U" else torch.Tensor)
        and (np.asarray(inside) == found).all()
    )


@by_maker
def test_names_are_saved(make: Callable[[], Probe], tmp_path: Path) -> None:
    bb: Backbone = randomise(Backbone.from_config(SMALL["dinov3"]))  # type: ignore[assignment]
    probe = make()
    probe.fit(rows(probe), NAMES).save(tmp_path / "probe.safetensors", bb)
    back = type(probe).load(tmp_path / "probe.safetensors", bb)
    assert (
        back.classes_.tolist() == ["cat", "dog", "owl"]
        and (back.predict(rows(probe)) == probe.predict(rows(probe))).all()
    )
    with safe_open(tmp_path / "probe.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        stored = json.loads(file.metadata()["dinov3_infer"])
    for classes in (None, ["dog", "cat", "owl"], ["cat", "cat", "owl"], [0, "cat", "owl"], [0.5, 1.5]):
        wrong = {"dinov3_infer": json.dumps({**stored, "classes": classes})}
        save_file(tensors, tmp_path / "wrong.safetensors", wrong)
        said = complaint(CheckpointError, lambda: type(probe).load(tmp_path / "wrong.safetensors", bb))
        assert "was not written by save()" in said


@pytest.mark.parametrize(
    "kind", ["list of lists", "list of arrays", "list of tensors", "float64", "half", "DataFrame", "objects"]
)
@by_vector_maker
def test_rows_may_come_in_any_container(make: Callable[[], Probe], kind: str) -> None:
    expected = make().fit(X, Y).predict(X)
    given: Any = {
        "list of lists": X.tolist, "list of arrays": lambda: list(X), "float64": lambda: X.astype(float),
        "read only": lambda: np.frombuffer(X.tobytes(), np.float32).reshape(X.shape),
        "list of tensors": lambda: list(torch.from_numpy(X)), "half": lambda: torch.from_numpy(X).half(),
        "DataFrame": lambda: pytest.importorskip("pandas").DataFrame(X), "objects": lambda: X.astype(object),
    }[kind]()  # fmt: skip
    assert (np.asarray(make().fit(given, Y).predict(given)) == expected).mean() > 0.95


def test_tables_of_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(X)
    table["label"] = pandas.Categorical(NAMES)
    for targets in (table["label"], table[["label"]], table["label"].astype(str)):
        assert KNN(k=1).fit(table.drop(columns="label"), targets).score(table.drop(columns="label"), NAMES) == 1


@pytest.mark.parametrize(
    "features, said",
    [
        (["a.jpg", "b.jpg"], "got str; make them with bb.embed(images)"),
        ([Path("a.jpg")], "Path; make them with bb.embed(images)"), ("photos/", "make them with bb.embed"),
        ([Image.new("RGB", (8, 8))], "got Image; make them with bb.embed"), ([b"x"], "got bytes"),
        ([[1.0, 2.0], [3.0]], "one row per example"), ([], "one row per example, got torch.float64 [0]"),
        (np.array([["a", "b"]]), "numbers [N, C]"), (X.astype(complex), "complex128"), (X > 0, "torch.bool"),
        (None, "[N, C], one row per example"), ({"a": 1}, "numbers [N, C]"),
    ],
)  # fmt: skip
@by_vector_maker
def test_what_are_no_features(make: Callable[[], Probe], features: Any, said: str) -> None:
    assert said in complaint((InputError, InputTypeError), lambda: make().fit(features, [0, 1]))
    fitted = make().fit(X, Y)
    assert said in complaint((InputError, InputTypeError), lambda: fitted.predict(features))


@by_maker
def test_features_of_images_are_named(make: Callable[[], Probe]) -> None:
    found = Backbone.from_pretrained("nano").extract_features(np.zeros((64, 64, 3), np.uint8))
    probe = make()
    said = complaint(InputTypeError, lambda: probe.fit(found, [0, 1]))
    assert ("give features.embedding" if probe.dims == 2 else "give features.patch_tokens") in said
    assert "a sparse matrix is not supported" in complaint(InputTypeError, lambda: probe.fit(Sparse(), [0, 1]))


class Sparse:
    def toarray(self) -> np.ndarray:
        return X


@pytest.mark.parametrize(
    "targets, said",
    [
        (Y / 2, "got continuous float64 [60]"), ([None] * 60, "got NoneType [60]"),
        (["cat", 1] * 30, "got int and str [60]"),
        (np.array(["cat", 1] * 30, object), "got int and str [60]"), (None, "got None"), (NAMES[:9], "<U3 [9]"),
        (np.eye(60), "[60, 60]"), (["cat", None] * 30, "NoneType and str"),
        (["cat"] * 60, "all 60 targets are class cat"), ([*range(30), *np.arange(30, 60)], None),
        (list(range(60)), None),
    ],
)  # fmt: skip
def test_what_are_no_classes(targets: Any, said: str | None) -> None:
    if said is None:
        assert len(KNN(k=1).fit(X, targets).classes_) == 60
    else:
        assert said in complaint(InputError, lambda: KNN(k=1).fit(X, targets))
    fitted = KNN(k=1).fit(X, NAMES)
    assert "give the same kind" in complaint(InputError, lambda: fitted.score(X, Y))
    assert fitted.score(X, ["bird"] * 60) == 0


@by_maker
def test_parameters_are_the_constructors(make: Callable[[], Probe]) -> None:
    probe = make()
    assert type(probe)(**probe.get_params()).get_params() == probe.get_params()
    name, value = next(iter(probe.get_params().items()))
    assert probe.set_params(**{name: value}) is probe
    said = complaint(InputError, lambda: probe.set_params(neighbours=3))
    assert "no parameter 'neighbours'; it has " in said and name in said
    assert not hasattr(probe, "n_features_in_") and not hasattr(probe, "classes_")
    assert probe.fit(rows(probe), Y).n_features_in_ == 8


# --- scikit-learn -----------------------------------------------------------------------------------------------------

# Checks that a probe does not pass, and why.
LEFT_OUT = {
    "check_no_attributes_set_in_init": "`tensors` and `options` are there from the beginning, empty",
    "check_dont_overwrite_parameters": "`tensors` has no underscore",
    "check_fit_score_takes_y": "the arguments are named features and targets",
    "check_estimators_unfitted": "our InputError is no NotFittedError, which would need scikit-learn",
    "check_n_features_in_after_fitting": "words of the message",
    "check_dtype_object": "words of the message",
    "check_complex_data": "words of the message",
    "check_estimators_empty_data_messages": "words of the message",
    "check_estimators_nan_inf": "words of the message",
    "check_fit2d_1sample": "words of the message",
    "check_fit2d_predict1d": "words of the message",
    "check_requires_y_none": "words of the message",
    "check_supervised_y_2d": "a column of targets is taken without a warning",
    "check_non_transformer_estimators_n_iter": "no n_iter_",
}


@pytest.mark.peers
@by_vector_maker
def test_scikit_learns_own_checks(make: Callable[[], Probe]) -> None:
    checks = pytest.importorskip("sklearn.utils.estimator_checks")
    probe = (
        KNN(k=1)
        if isinstance(make(), KNN)
        else make().set_params(**({"steps": 300} if "steps" in make().settings() else {}))
    )
    found = checks.check_estimator(probe, on_fail=None, on_skip=None)
    failed = {one["check_name"]: str(one["exception"]) for one in found if one["status"] == "failed"}
    assert len(found) > 40 and not failed.keys() - LEFT_OUT.keys(), failed


@pytest.mark.peers
@by_vector_maker
def test_scikit_learns_tools_take_a_probe(make: Callable[[], Probe]) -> None:
    pytest.importorskip("sklearn")
    from sklearn.base import clone, is_classifier
    from sklearn.model_selection import GridSearchCV, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make()
    again = clone(probe.fit(X, NAMES))
    assert again.get_params() == probe.get_params() and not again.tensors and is_classifier(probe)
    assert make_pipeline(StandardScaler(), make()).fit(X, NAMES).score(X, NAMES) > 0.95
    assert cross_val_score(make(), X, NAMES, cv=3).min() > 0.8
    grid = {"KNN": {"k": [1, 5]}, "LinearProbe": {"steps": [5, 60]}, "LogisticProbe": {"C": [1e-6, 1.0]}}[
        type(probe).__name__
    ]
    search = GridSearchCV(make(), grid, cv=3, scoring="roc_auc_ovr").fit(X, NAMES)
    assert search.best_score_ > 0.9 and search.predict(X)[0] == "cat"
