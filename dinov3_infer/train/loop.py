"""A run from its first step to its last, or from where it was left."""

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

from ..backbone import Backbone, ViTBackbone
from ..errors import DiskError, InputError, UnsupportedError
from ..locks import locked
from ..model.chips import lacks_bfloat16
from ..system import told_to_stop
from ..zoo import OWN
from . import run_state
from .adapters import plain_copy
from .batches import Batches, batches
from .blocks import wrap_blocks
from .config import TrainConfig
from .datasets import Data, Spec, open_data
from .distributed import Engine, device_of, is_main, joined, mean_of, rank, world_size
from .draws import generator
from .health import Health, TrainingStopped
from .method import Method, split_batch
from .optim import clip_gradients, make_optimizer, set_rates
from .plots import draw_batch, draw_curves
from .progress import Progress
from .resume import check_same_run, cut_metrics, write_settings
from .views import Batch

__all__ = ["Run", "device_of", "train"]

log = logging.getLogger("dinov3_infer")

_PATIENCE = 3  # steps in a row without a finite loss, or looks in a row at a collapsed model


def train(
    config: TrainConfig,
    *,
    data: Spec = None,
    backbone: Backbone | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Backbone:
    """Trains, and returns the moving average of the backbone on the CPU, which also lies in `out`/backbone.

    Under `torchrun` every process calls this.
    `data`: what `open_data` takes, such as a torch Dataset; None for `config.data`.
    `backbone`: a model to start from, which is trained in place; None for `config.model`.
    `resume`: go on with the run in `out`; an interrupted run gives the same numbers as one that was not.
    `progress`: a bar; None for one on a terminal, and lines of the log elsewhere.
    Raises: InputError for what cannot be meant; TrainingStopped for a run that diverged or collapsed, whose last good
    weights are in the folder.
    """
    with joined(device_of(config)) as device, ExitStack() as inside:
        return Run(config, device, data=data, backbone=backbone, resume=resume, inside=inside).train(progress)


def _build(config: TrainConfig, device: torch.device, backbone: Backbone | None) -> Method:
    """Student, teachers and heads, on the device; the same random numbers on every process."""
    teacher = Backbone.from_pretrained(config.teacher, device=device) if config.distils else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(config.seed, 0, "weights").initial_seed() % 2**63)
        if backbone is None and config.from_scratch:
            backbone = Backbone.from_config(config.model)
            if backbone.info is not None and teacher is None:  # whose licence may have a say
                backbone.info = dataclasses.replace(backbone.info, licence=OWN)
        elif backbone is None:
            backbone = Backbone.from_pretrained(config.model, device="cpu")
        elif backbone.main_weight.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"the weights are {backbone.main_weight.dtype}, in which small steps are lost; load them "
                "with dtype='auto', the arithmetic is bfloat16 all the same"
            )
        if backbone.info is not None and backbone.info.licence != OWN:
            backbone.info = dataclasses.replace(backbone.info, derived=True)
        if not isinstance(backbone, ViTBackbone) or backbone.preprocess.channels != 3:
            raise UnsupportedError(f"train takes vision transformers of RGB images, and this is a {backbone.summary()}")
        method = Method(config, backbone.to(device), teacher)
    wrap_blocks(method.backbone, config.compile, config.recompute)
    wrap_blocks(method.average, config.compile, "none")
    for other in (method.teacher, method.gram_teacher):
        if other is not None:
            wrap_blocks(other, False, "none")
    if device.type == "cpu" and config.compile and config.precision == "bfloat16":  # torch's fused one is slower there
        for compiled in (method.backbone, method.average):
            compiled.set_attention("eager")
    return method.to(device, torch.float64 if config.precision == "float64" else torch.float32)


class Run:
    """What one process holds of a run."""

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        *,
        data: Spec = None,
        backbone: Backbone | None = None,
        resume: bool = False,
        dry: bool = False,  # writes nothing
        inside: ExitStack | None = None,  # keeps the folder locked
    ) -> None:
        self.config, self.device = config, device
        self.folder = Path(config.out).expanduser()
        self.checkpoints = self.folder / "checkpoints"
        found = self._check(resume, dry)
        given = list(config.data) if data is None else data
        self.data: Data = given if isinstance(given, Data) else open_data(given, config.levels or None)
        if len(self.data) < config.batch_size:
            raise InputError(
                f"there are {len(self.data)} images and batch_size is {config.batch_size}; give more or a smaller one"
            )
        self.method = _build(config, device, backbone)
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
                    raise InputError(f"another run has written to '{self.folder}' meanwhile; give another folder")
            self.digest = self.data.digest()
        if found is not None:
            if is_main():
                check_same_run(config, run_state.read(found), self.digest)
            self.step = run_state.load(found, self.method, self.optimizer)
        if is_main():
            write_settings(config, self.folder / "config.json")
            cut_metrics(self.folder / "metrics.jsonl", self.step)

    def _check(self, resume: bool, dry: bool) -> Path | None:
        """The checkpoint to go on from, if that was asked for."""
        config, parts = self.config, world_size() * self.config.accumulate
        if not config.out:
            raise InputError("no folder for the run is given; set out (--out RUN)")
        if config.batch_size % parts:
            raise InputError(
                f"batch_size {config.batch_size} does not split over {world_size()} processes times accumulate="
                f"{config.accumulate}; give a multiple of {parts}"
            )
        size = config.batch_size // parts
        if (config.koleo_weight or config.sigreg_weight) and (size < 2 or size % min(size, config.spread_group)):
            raise InputError(
                f"each process computes {size} images at a time, which KoLeo cannot split into groups of "
                f"{config.spread_group}; give another batch_size, accumulate or spread_group"
            )
        found = run_state.latest(self.checkpoints)
        if resume and found is None:
            raise InputError(f"'{self.checkpoints}' holds no checkpoint to resume from; give the folder of a run")
        if found is not None and not resume and not dry:
            raise InputError(f"'{self.folder}' holds a run already; resume it (--resume), or give another folder")
        return found

    # --- the loop ------------------------------------------------------------------------------------------------

    def train(self, progress: bool | None = None) -> Backbone:
        config = self.config
        stream = self.stream()
        if self.step == 0:
            self.record(self.health.first | {"verdict": "start", "reason": "before the first step"})
        left_out = run_state.LeftOut(self.folder / "left_out.jsonl")
        since, count = time.perf_counter(), 0
        shown = Progress(config.steps, self.step, progress if is_main() else False)
        with told_to_stop(later=world_size() == 1) as told, shown:  # several processes would not meet
            while self.step < config.steps:
                try:
                    batch = next(stream)
                except Exception:
                    self.leave(told)  # workers may have heard it too
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
        """Whether these weights are none to go on from."""
        return bool(self.failures or (self.unwell and self.config.stop_on_collapse))

    def leave(self, told: list[BaseException]) -> None:
        """Where the run was told to stop: ends it with a checkpoint of this step."""
        if told and self.step < self.config.steps:
            if not self.sick and self.step and not self._due(self.config.checkpoint_steps):
                self.save()
            log.warning("stopped at step %d of %d; --resume goes on from there", self.step, self.config.steps)
            raise told[0]

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def stream(self) -> Batches:
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
        """bfloat16 arithmetic over float32 weights, where that is wanted or "auto" and a GPU can do it."""
        able = self.device.type == "cuda" and not lacks_bfloat16(self.device)
        wanted = self.config.precision == "bfloat16" or (self.config.precision == "auto" and able)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=wanted)

    def take_step(self, batch: Batch) -> dict[str, float]:
        """One step of the optimiser; every metric as a number."""
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
        """A batch as it is computed; float64 runs take float64 images."""
        if self.config.precision == "float64":
            crops = {name: getattr(batch, name) for name in ("global_crops", "local_crops", "gram_crops")}
            batch = batch._replace(**{name: c.double() for name, c in crops.items() if c is not None})
        return split_batch(batch, self.config.accumulate)

    def fail(self, metrics: dict[str, float]) -> None:
        """A loss or gradient that is not finite changes no weight; a few in a row end the run."""
        self.failures += 1
        names = ", ".join(name for name, value in metrics.items() if not math.isfinite(value))
        log.warning("step %d left out: %s not finite", self.step, names)
        if self.failures >= _PATIENCE:
            self.stop(f"diverged: {names} not finite in {_PATIENCE} steps in a row; lower lr_at_1024")

    def look(self, teacher_entropy: float) -> dict[str, Any]:
        """Health now."""
        found = self.health.look(self.method.average)
        verdict, reason = self.health.judge(found | {"teacher_entropy": teacher_entropy}, self.step)
        self.unwell = self.unwell + 1 if verdict == "collapsing" else 0
        return found | {"verdict": verdict, "reason": reason}

    def stop(self, reason: str) -> None:
        """Ends the run with the weights of the last checkpoint, which was taken in health."""
        found = run_state.latest(self.checkpoints)
        kept = "no checkpoint had been written yet"
        if found is not None:
            step = run_state.load(found, self.method, self.optimizer)
            self.result()
            kept = f"'{self.folder / 'backbone'}' holds the weights of step {step}"
        raise TrainingStopped(f"the run {reason} (step {self.step}; {kept})")

    # --- records -------------------------------------------------------------------------------------------------

    def record(self, metrics: dict[str, Any]) -> None:
        """A line of metrics.jsonl, null for what is not finite; lines wait while the disk is full."""
        if is_main():
            known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
            self.unwritten += json.dumps({"step": self.step} | known) + "\n"
            with self.full_disk():
                run_state.append(self.folder / "metrics.jsonl", self.unwritten)
                self.unwritten = ""

    def save(self) -> None:
        state = {"step": self.step, "config": dataclasses.asdict(self.config), "data": self.digest}
        with self.full_disk():
            run_state.save(self.checkpoints, self.method, self.optimizer, state, self.config.keep_checkpoints)

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        """A run outlives a disk that is full for a while, but does not end on one."""
        try:
            yield
        except DiskError as error:
            if self.step == self.config.steps:
                raise
            log.warning("step %d goes on: %s", self.step, error)

    def result(self) -> Backbone:
        """The moving average, written as a model, and the curves."""
        backbone = plain_copy(self.method.average)
        if is_main():
            try:
                run_state.write_model(backbone.float(), self.folder / "backbone")
                log.info("wrote '%s'", self.folder / "backbone")
                draw_curves(self.folder / "metrics.jsonl", self.folder / "curves.png")
            except OSError as error:
                raise DiskError(
                    f"the result could not be written to '{self.folder}' ({error.strerror or error}); make room and "
                    "resume, the checkpoint of the last step is whole"
                ) from None
        return backbone
