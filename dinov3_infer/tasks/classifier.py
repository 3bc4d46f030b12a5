"""The base of the classifiers on cached features, with the interface of a scikit-learn estimator."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..arrays import as_tensor, check_unmasked
from ..errors import InputError, InputTypeError
from ..features.result import Features
from .fitted import Fitted

__all__ = ["CELLS", "Classes", "Probe", "Vectors", "as_classes", "as_features"]

Vectors: TypeAlias = Any  # a tensor, an array, a DataFrame, or a list of rows
Classes: TypeAlias = Tensor | np.ndarray | Sequence[Any]
CELLS = 2**26  # largest size of a matrix of cosines
MOST_CLASSES = 2**16


class Probe(Fitted):
    """Base of the classifiers.  Classes are names or whole numbers; after `fit`, `classes_` holds them in sorted order.

    Methods return tensors for a tensor and arrays for other input.  A probe works in scikit-learn's `clone`,
    `Pipeline`, `cross_val_score` and `GridSearchCV`.

    Example:
        >>> probe = KNN(k=5).fit(bb.embed("photos/"), ["cat", "dog", ...])
        >>> probe.predict(bb.embed("new/"))
        array(['dog', 'cat', ...])
        >>> cross_val_score(KNN(), bb.embed("photos/"), names)  # scikit-learn's
    """

    dims: ClassVar[int] = 2  # number of axes of the features
    classes_: np.ndarray  # [K], sorted

    def fit(self, features: Vectors, targets: Classes) -> Self:
        """Learns from features [N, C] (`AttentiveProbe`: [N, P, C]) and the class of each row [N].

        Raises: InputError for other shapes, features that are not finite, targets that are not classes, or a single
        class.
        """
        known = as_features(features, "features", self.dims)
        classes, numbers = as_classes(targets, len(known))
        if len(classes) < 2:
            raise InputError(
                f"all {len(known)} targets are class {classes[0]!s}; a classifier needs two classes or more"
            )
        self.tensors = self._fit(known, numbers.to(known.device), len(classes))
        self.classes_ = classes
        return self

    def predict(self, features: Vectors) -> Any:
        """The class of each row, [N]: a tensor for a tensor if the classes are numbers, else an array.

        Raises: InputError before `fit`, and for features of another shape or model.
        """
        best = self._proba(features).argmax(dim=-1)
        if not isinstance(features, Tensor) or self.classes_.dtype.kind == "U":
            return self.classes_[best.cpu().numpy()]
        return torch.from_numpy(self.classes_).to(best.device)[best]

    def predict_proba(self, features: Vectors) -> Any:
        """The probability of each class, [N, K] float32, in the order of `classes_`.  Raises: as `predict`."""
        found = self._proba(features)
        return found if isinstance(features, Tensor) else found.cpu().numpy()

    def score(self, features: Vectors, targets: Classes) -> float:
        """The accuracy for features [N, C] and their classes [N], 0 to 1.

        Raises: InputError as in `fit`, and if the targets are names and those of `fit` were numbers, or the reverse.
        """
        best = self._proba(features).argmax(dim=-1).cpu().numpy()
        truth, numbers = as_classes(targets, len(best))
        if (truth.dtype.kind in "UO") != (self.classes_.dtype.kind in "UO"):
            raise InputError(
                f"the targets are {truth.dtype}, those of fit() were {self.classes_.dtype}; give the same kind"
            )
        return float((self.classes_[best] == truth[numbers.numpy()]).mean())

    @property
    def n_features_in_(self) -> int:
        """Width of the features, under scikit-learn's name.  Raises: AttributeError before `fit`."""
        if not self.tensors:
            raise AttributeError("n_features_in_ is known after fit()")
        return int(self.tensors[self.names[0]].shape[-1])

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor arguments, for scikit-learn."""
        return self.settings()

    def set_params(self, **params: Any) -> Self:
        """Changes constructor arguments, for scikit-learn.

        Raises: InputError for an unknown name.
        """
        for name, value in params.items():
            if name not in self.settings():
                raise InputError(
                    f"{type(self).__name__} has no parameter {name!r}; it has {', '.join(self.settings())}"
                )
            setattr(self, name, value)
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return bool(self.tensors)

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags  # only scikit-learn calls this

        return Tags(
            estimator_type="classifier",
            target_tags=TargetTags(required=True),
            classifier_tags=ClassifierTags(),
            input_tags=InputTags(two_d_array=self.dims == 2, three_d_array=self.dims == 3),
        )

    def _fit(self, features: Tensor, targets: Tensor, num_classes: int) -> dict[str, Tensor]:
        raise NotImplementedError

    def _probabilities(self, features: Tensor) -> Tensor:
        return torch.nn.functional.linear(features, self.tensors["weight"], self.tensors["bias"]).softmax(dim=-1)

    def _proba(self, features: Vectors) -> Tensor:
        asked = as_features(features, "features", self.dims)
        self._check(asked.shape[-1])
        rows = max(1, CELLS // 16 // asked[0].numel())
        with torch.no_grad():
            return torch.cat([self._probabilities(part.to(self._device).float()) for part in asked.split(rows)])

    def _stored(self) -> dict[str, Any]:
        return {"classes": self.classes_.tolist()}

    def _restore(self, stored: dict[str, Any]) -> None:
        classes, _ = as_classes(stored["classes"], len(stored["classes"]))
        if classes.tolist() != stored["classes"]:
            raise ValueError("classes are sorted and differ")
        self.classes_ = classes


def as_features(given: Vectors, what: str, dims: int = 2) -> Tensor:
    """Converts features to a finite float tensor [N, C] (`dims=2`, float32) or [N, P, C] (`dims=3`) that is not empty.

    Raises: InputTypeError for Features, images and paths; InputError for other input that cannot be converted.
    """
    shape = ("[N, C]", "[N, P, C]")[dims - 2]
    if isinstance(given, Features):
        token = ("embedding", "patch_tokens")[dims - 2]
        raise InputTypeError(f"{what} are numbers {shape}, got Features; give features.{token}")
    tensor = _tensor(given, what, shape)
    whole = dims == 2 and not tensor.is_floating_point() and tensor.dtype != torch.bool and not tensor.is_complex()
    if tensor.ndim != dims or not tensor.numel() or not (tensor.is_floating_point() or whole):
        raise InputError(
            f"{what} are float {shape}, one row per example, got {tensor.dtype} {list(tensor.shape)}; reshape them"
        )
    finite = tensor.flatten(1).sum(dim=1, dtype=torch.float32).isfinite()
    if not finite.all():
        raise InputError(
            f"{int((~finite).sum())} of {len(finite)} rows of the {what} are not finite, the first is number "
            f"{int(finite.int().argmin())}; drop these rows: NaN marks an image that could not be read"
        )
    return tensor.float() if dims == 2 else tensor


def _tensor(given: Vectors, what: str, shape: str) -> Tensor:
    first = next(iter(given), None) if isinstance(given, list | tuple) else given
    if isinstance(first, str | bytes | Path) or type(first).__module__.startswith("PIL."):
        raise InputTypeError(f"{what} are numbers {shape}, got {type(first).__name__}; make them with bb.embed(images)")
    if hasattr(given, "toarray"):
        raise InputTypeError(f"{what} are numbers {shape}, and a sparse matrix is not supported; give {what}.toarray()")
    try:
        check_unmasked(given, what)
        if isinstance(given, list | tuple) and isinstance(first, Tensor):
            given = torch.stack(list(given))
        elif not isinstance(given, Tensor):
            array = np.asarray(given)  # also converts a DataFrame or a list of rows
            given = array.astype(float) if array.dtype == object else array
        return as_tensor(given, what).detach()
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"{what} are numbers {shape}, one row per example; got a {type(given).__name__} of other values"
        ) from None


def as_classes(given: Classes, count: int) -> tuple[np.ndarray, Tensor]:
    """The distinct classes, sorted, [K], and the index of the class of each of `count` rows, [N] int64.

    Raises: InputError if `given` does not hold a name or a whole number for each row.
    """
    check_unmasked(given, "targets")
    array = given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
    if array.shape == (count, 1):  # one column of a table
        array = array[:, 0]
    parts = given if isinstance(given, list | tuple) else list(array.flat) if array.dtype == object else ()
    mixed = len({isinstance(one, str) for one in parts}) > 1  # numpy converts numbers among names to names
    if array.dtype == object and not mixed:
        array = np.asarray(array.tolist())
    whole = array.dtype.kind in "iub" or (array.dtype.kind == "f" and bool((array == np.round(array)).all()))
    if array.shape != (count,) or not (whole or array.dtype.kind == "U") or mixed:
        kinds = " and ".join(sorted({type(one).__name__ for one in parts})) or str(array.dtype)
        kinds = f"continuous {kinds}" if array.dtype.kind == "f" else kinds
        found = "None" if given is None else f"{kinds} {list(array.shape)}"
        raise InputError(f"targets are class names or whole numbers, one for each of {count} rows, got {found}")
    classes, numbers = np.unique(array, return_inverse=True)
    if len(classes) > MOST_CLASSES:
        raise InputError(
            f"the targets have {len(classes):,} classes, and a probe takes at most {MOST_CLASSES:,}; give fewer"
        )
    return classes, torch.from_numpy(numbers.astype(np.int64))
