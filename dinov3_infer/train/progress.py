"""What a training run says while it goes on: a bar on a terminal, elsewhere lines in the log; verdicts in both."""

import logging
from typing import Any, Self

from tqdm import tqdm  # type: ignore[import-untyped]

__all__ = ["Progress"]

log = logging.getLogger("dinov3_infer")


class Progress:
    """`shown`: None for a bar on a terminal and lines elsewhere, True for a bar, False for neither."""

    def __init__(self, total: int, first: int, shown: bool | None) -> None:
        self.total = total
        self.bar = tqdm(total=total, initial=first, disable=None if shown is None else not shown)
        self.lines = bool(self.bar.disable) and shown is None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def advance(self) -> None:
        self.bar.update()

    def tell(self, step: int, metrics: dict[str, Any]) -> None:
        """The numbers of a step, and a verdict on the model where there is one."""
        self.bar.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
        if self.lines:
            log.info(
                "step %d of %d: loss %.4f, learning rate %.2e, %.1f images per second",
                step, self.total, metrics["loss"], metrics["lr"], metrics["images_per_second"],
            )  # fmt: skip
        if verdict := metrics.get("verdict"):
            level = logging.INFO if verdict == "healthy" else logging.WARNING
            log.log(level, "step %d, %s: %s", step, verdict, metrics["reason"])
