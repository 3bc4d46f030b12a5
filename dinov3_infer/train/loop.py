"""The training loop: one run from its first step, or from a checkpoint, to its last."""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbone import Backbone
from ..errors import DiskError, InputError
from ..locks import locked
from ..model.chips import lacks_bfloat16
from ..system import told_to_stop
from . import run_state
from .adapters import plain_copy
from .batches import Batches, batches
from .build import build_method
from .config import TrainConfig
from .datasets import Data, Spec, open_data
from .distributed import Engine, device_of, is_main, joined, mean_of, rank, world_size
from .health import Health, TrainingStopped
from .method import split_batch
from .optim import clip_gradients, make_optimizer, set_rates
from .plots import draw_batch, draw_curves
from .progress import Progress
from .resume import check_same_run, cut_metrics, write_settings
from .views import Batch

__all__ = ["Run", "device_of", "train"]

log = logging.getLogger("dinov3_infer")

_PATIENCE = 3  # consecutive steps without a finite loss, or consecutive health checks that find a collapse


def train(
    config: TrainConfig,
    *,
    data: Spec = None,
    backbone: Backbone | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Backbone:
    """Trains a backbone on images without labels.

    Under `torchrun` every process calls this function.

    Args:
        config: settings of the run.
        data: images to train on, in any form that `open_data` takes, such as a torch Dataset; None for `config.data`.
        backbone: model to start from, trained in place; None to load `config.model`.
        resume: continue the run in `config.out`; the result equals that of a run without interruption.
        progress: show a progress bar; None shows one on a terminal and writes log lines elsewhere.

    Returns:
        The moving average of the backbone, on the CPU.  The folder `config.out`/backbone holds it as a checkpoint.

    Raises:
        InputError: the settings or the data are wrong, or the folder holds another run.
        MissingFileError: a path of the data does not exist.
        UnsupportedError: the model is no vision transformer of RGB images.
        CheckpointError: the checkpoint to resume is damaged, or belongs to another model.
        TrainingStopped: the run diverged or collapsed; the folder holds the last good weights.
        DiskError: the result could not be written; the last checkpoint is complete.

    Example:
        >>> from dinov3_infer.train import TrainConfig, train
        >>> bb = train(TrainConfig(data=("photos/",), model="vits16", out="run"))
        >>> bb.extract_features("photo.jpg").embedding.shape
        torch.Size([1, 384])
    """
    with joined(device_of(config)) as device, ExitStack() as inside:
        return Run(config, device, data=data, backbone=backbone, resume=resume, inside=inside).train(progress)


class Run:
    """A run, as one process sees it."""

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        *,
        data: Spec = None,
        backbone: Backbone | None = None,
        resume: bool = False,
        dry: bool = False,  # write nothing
        inside: ExitStack | None = None,  # holds the lock of the folder
    ) -> None:
        self.config, self.device = config, device
        self.folder = Path(config.out).expanduser()
        self.checkpoints = self.folder / "checkpoints"
        found = self._check(resume, dry)
        given = list(config.data) if data is None else data
        self.data: Data = given if isinstance(given, Data) else open_data(given, config.levels or None)
        if len(self.data) < config.batch_size:
            raise InputError(
                f"there are {len(self.data)} images, fewer than batch_size={config.batch_size}; give more images or a "
                "smaller batch_size"
            )
        self.method = build_method(config, device, backbone)
        info, other = self.method.backbone.preprocess, self.method.teacher or self.method.gram_teacher
        patch = self.method.backbone.patch_size
        self.views = config.view_configs(patch, other.patch_size if other else patch, info.mean, info.std)
        self.engine = Engine(self.method, config.engine, unused=config.share(config.freeze_share) > 0)
        self.optimizer = make_optimizer(self.method.student, config)
        self.step = self.failures = self.unwell = 0
        self.unwritten = self.digest = ""
        if dry:
            return
        probe = open_data(config.health_data, self.data.levels) if config.health_data else self.data
        self.health = Health(config, probe, self.method.average)
        if is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            if inside is not None:
                inside.enter_context(locked(self.folder, self.folder))
                if run_state.latest(self.checkpoints) != found:
                    raise InputError(f"another run wrote to '{self.folder}' in the meantime; give another folder")
            self.digest = self.data.digest()
        if found is not None:
            if is_main():
                check_same_run(config, run_state.read(found), self.digest)
            self.step = run_state.load(found, self.method, self.optimizer)
        if is_main():
            write_settings(config, self.folder / "config.json")
            cut_metrics(self.folder / "metrics.jsonl", self.step)

    def _check(self, resume: bool, dry: bool) -> Path | None:
        """Checks settings and folder; returns the checkpoint to resume from, or None."""
        config, parts = self.config, world_size() * self.config.accumulate
        if not config.out:
            raise InputError("out is empty; set it to the folder of the run (--out RUN)")
        if config.batch_size % parts:
            raise InputError(
                f"batch_size={config.batch_size} does not divide among {world_size()} processes with accumulate="
                f"{config.accumulate}; give a multiple of {parts}"
            )
        size = config.batch_size // parts
        if (config.koleo_weight or config.sigreg_weight) and (size < 2 or size % min(size, config.spread_group)):
            raise InputError(
                f"each process computes parts of {size} images, which do not divide into groups of spread_group="
                f"{config.spread_group}; change batch_size, accumulate or spread_group"
            )
        found = run_state.latest(self.checkpoints)
        if resume and found is None:
            raise InputError(f"'{self.checkpoints}' holds no checkpoint to resume; give the folder of a run")
        if found is not None and not resume and not dry:
            raise InputError(f"'{self.folder}' already holds a run; resume it (--resume), or give another folder")
        return found

    # --- the loop ------------------------------------------------------------------------------------------------

    def train(self, progress: bool | None = None) -> Backbone:
        """Takes all remaining steps and returns the moving average of the backbone, as the function `train` does."""
        config = self.config
        stream = self.stream()
        if self.step == 0:
            self.record(self.health.first | {"verdict": "start", "reason": "before the first step"})
        left_out = run_state.LeftOut(self.folder / "left_out.jsonl")
        since, count = time.perf_counter(), 0
        shown = Progress(config.steps, self.step, progress if is_main() else False)
        # A process that stopped at a later step than the others would wait for them without end.
        with told_to_stop(later=world_size() == 1) as told, shown:
            while self.step < config.steps:
                try:
                    batch = next(stream)
                except Exception:
                    self.leave(told)  # the signal may have ended the workers too
                    raise
                left_out.tell(stream.broken)
                if self.step == 0 and is_main():
                    draw_batch(batch, self.views[0][1], self.folder / "first_batch.png")
                metrics: dict[str, Any] = self.take_step(batch)
                self.step += 1
                count += config.batch_size
                shown.advance()
                looks = self._due(config.health_steps)
                if looks:
                    metrics |= self.look(metrics.get("teacher_entropy", 0.0))
                if looks or self._due(config.log_steps):
                    speed = count / (time.perf_counter() - since)
                    metrics |= {"broken_pictures": len(stream.broken), "images_per_second": speed}
                    self.record(metrics)
                    shown.tell(self.step, metrics)
                    since, count = time.perf_counter(), 0
                if self.unwell >= _PATIENCE and config.stop_on_collapse:
                    self.stop(f"collapsed: {metrics['reason']}")
                if self._due(config.checkpoint_steps) and not self.sick:
                    self.save()
                self.leave(told)
        return self.result()

    @property
    def sick(self) -> bool:
        """Whether the present weights are unfit for a checkpoint."""
        return bool(self.failures or (self.unwell and self.config.stop_on_collapse))

    def leave(self, told: list[BaseException]) -> None:
        """After a signal to stop, writes a checkpoint of this step.  Raises: the exception of the signal."""
        if told and self.step < self.config.steps:
            if not self.sick and self.step and not self._due(self.config.checkpoint_steps):
                self.save()
            log.warning("stopped at step %d of %d; --resume continues from there", self.step, self.config.steps)
            raise told[0]

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def stream(self) -> Batches:
        """The batches of the remaining steps."""
        config = self.config
        return batches(
            self.data,
            self.views,
            batch_size=config.batch_size,
            seed=config.seed,
            start=self.step,
            stop=config.steps,
            rank=rank(),
            world_size=world_size(),
            workers=config.workers,
            device=self.device,
        )

    def autocast(self) -> AbstractContextManager[None]:
        """bfloat16 arithmetic with float32 weights, for precision="bfloat16", or "auto" on a GPU that supports it."""
        able = self.device.type == "cuda" and not lacks_bfloat16(self.device)
        wanted = self.config.precision == "bfloat16" or (self.config.precision == "auto" and able)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=wanted)

    def take_step(self, batch: Batch) -> dict[str, float]:
        """One optimiser step; returns every metric as a number.  Raises: TrainingStopped, see `fail`."""
        config, method, step = self.config, self.method, self.step
        method.train()
        parts = self.parts(batch)
        with self.autocast():
            targets = method.targets(parts, step)
        terms: list[dict[str, Tensor]] = []
        self.optimizer.zero_grad(set_to_none=True)
        for i, (part, target) in enumerate(zip(parts, targets, strict=True)):
            with self.engine.accumulating(last=i == len(parts) - 1):
                with self.autocast():
                    found = self.engine(part, target, step)
                (found["loss"] / len(parts)).backward()
            terms.append({name: value.detach() for name, value in found.items()})
        rate = set_rates(self.optimizer, config, step)
        norms = clip_gradients(method.student, config.clip)
        names = list(terms[0])
        means = mean_of(torch.stack([torch.stack([term[name] for name in names]) for term in terms]).mean(0))
        metrics = dict(zip(names, means.tolist(), strict=True))
        metrics |= {f"gradient_{part}": float(norm) for part, norm in norms.items()} | {"lr": rate}
        if all(math.isfinite(value) for value in metrics.values()):
            self.optimizer.step()
            method.update_ema(step)
            self.failures = 0
        else:
            self.fail(metrics)
        return metrics

    def parts(self, batch: Batch) -> list[Batch]:
        """The parts of a batch that are computed one after another, in float64 for a run of that precision."""
        if self.config.precision == "float64":
            crops = {name: getattr(batch, name) for name in ("global_crops", "local_crops", "gram_crops")}
            batch = batch._replace(**{name: c.double() for name, c in crops.items() if c is not None})
        return split_batch(batch, self.config.accumulate)

    def fail(self, metrics: dict[str, float]) -> None:
        """Skips a step whose loss or gradient is not finite.  Raises: TrainingStopped after a few in a row."""
        self.failures += 1
        names = ", ".join(name for name, value in metrics.items() if not math.isfinite(value))
        log.warning("skipped step %d: %s not finite", self.step, names)
        if self.failures >= _PATIENCE:
            self.stop(f"diverged: {names} not finite in {_PATIENCE} consecutive steps; lower lr_at_1024")

    def look(self, teacher_entropy: float) -> dict[str, Any]:
        """The health check of this step: its numbers, a verdict, and a sentence that explains it."""
        found = self.health.look(self.method.average)
        verdict, reason = self.health.judge(found | {"teacher_entropy": teacher_entropy}, self.step)
        self.unwell = self.unwell + 1 if verdict == "collapsing" else 0
        return found | {"verdict": verdict, "reason": reason}

    def stop(self, reason: str) -> None:
        """Ends the run with the weights of the last checkpoint as its result.  Raises: TrainingStopped, always."""
        found = run_state.latest(self.checkpoints)
        kept = "no checkpoint was written yet"
        if found is not None:
            step = run_state.load(found, self.method, self.optimizer)
            self.result()
            kept = f"'{self.folder / 'backbone'}' holds the weights of step {step}"
        raise TrainingStopped(f"the run {reason} (step {self.step}; {kept})")

    # --- records -------------------------------------------------------------------------------------------------

    def record(self, metrics: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl, with null for values that are not finite; retries if the disk is full."""
        if is_main():
            known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
            self.unwritten += json.dumps({"step": self.step} | known) + "\n"
            with self.full_disk():
                run_state.append(self.folder / "metrics.jsonl", self.unwritten)
                self.unwritten = ""

    def save(self) -> None:
        """Writes a checkpoint; a full disk is a warning, except at the last step, where it raises DiskError."""
        state = {"step": self.step, "config": dataclasses.asdict(self.config), "data": self.digest}
        with self.full_disk():
            run_state.save(self.checkpoints, self.method, self.optimizer, state, self.config.keep_checkpoints)

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        """A context that turns a DiskError into a warning, except at the last step."""
        try:
            yield
        except DiskError as error:
            if self.step == self.config.steps:
                raise
            log.warning("continuing after step %d: %s", self.step, error)

    def result(self) -> Backbone:
        """Writes the moving average as a checkpoint, and the curves; returns it.  Raises: DiskError."""
        backbone = plain_copy(self.method.average)
        if is_main():
            try:
                run_state.write_model(backbone.float(), self.folder / "backbone")
                log.info("wrote '%s'", self.folder / "backbone")
                draw_curves(self.folder / "metrics.jsonl", self.folder / "curves.png")
            except OSError as error:
                raise DiskError(
                    f"the result could not be written to '{self.folder}' ({error.strerror or error}); free some "
                    "space and resume, the checkpoint of the last step is complete"
                ) from None
        return backbone
