"""Progress of a run: a bar on a terminal, log lines elsewhere, and the verdicts of the health checks in both."""

import logging
from typing import Any, Self

from tqdm import tqdm  # type: ignore[import-untyped]

__all__ = ["Progress"]

log = logging.getLogger("dinov3_infer")


class Progress:
    """Reports the progress of a run.

    Args:
        total: steps of the run.
        first: steps already done.
        shown: True for a bar, False for neither bar nor lines, None for a bar on a terminal and log lines elsewhere.
    """

    def __init__(self, total: int, first: int, shown: bool | None) -> None:
        self.total = total
        self.bar = tqdm(total=total, initial=first, disable=None if shown is None else not shown)
        self.lines = bool(self.bar.disable) and shown is None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def advance(self) -> None:
        """Moves the bar by one step."""
        self.bar.update()

    def tell(self, step: int, metrics: dict[str, Any]) -> None:
        """Reports the metrics of a step, and the verdict of its health check if there was one."""
        self.bar.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
        if self.lines:
            log.info(
                "step %d of %d: loss %.4f, learning rate %.2e, %.1f images per second",
                step, self.total, metrics["loss"], metrics["lr"], metrics["images_per_second"],
            )  # fmt: skip
        if verdict := metrics.get("verdict"):
            level = logging.INFO if verdict == "healthy" else logging.WARNING
            log.log(level, "step %d, %s: %s", step, verdict, metrics["reason"])
