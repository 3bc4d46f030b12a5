"""Functions that torch.fx records as one node: checks, and choices by the shape, dtype or device of a tensor."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar, cast

from torch.fx import Proxy

__all__ = ["one_node"]

P = ParamSpec("P")
T = TypeVar("T")


def one_node(function: Callable[P, T]) -> Callable[P, T]:
    """The function itself; if torch.fx traces its first argument, a node that calls it when the graph runs."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if args and isinstance(args[0], Proxy):
            return cast(T, args[0].tracer.create_proxy("call_function", call, args, dict(kwargs)))
        return function(*args, **kwargs)

    return call
