"""The training loop: one object that holds a run's state, steps it, saves it and restores it bit for bit.

A step minimises distortion + rate over a batch. Its order comes from (seed, epoch) and its noise from (seed, epoch,
batch, process), so a run that is cut anywhere and resumed from a checkpoint takes the very steps it would have taken.
Nothing that depends on the clock enters the state.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from inference.training.batches import iterate, num_batches
from inference.training.checkpoints import (
    checkpoint_name,
    flatten_state,
    latest_checkpoint,
    prune_checkpoints,
    restore_state,
    save_checkpoint,
)
from inference.training.config import TrainConfig
from inference.training.display import TrainingDisplay
from inference.training.divergence import TrainingDiverged, diagnose
from inference.training.evaluation import Evaluation, bits_per_dim, evaluate, noise_seed
from inference.training.objectives import ElboLoss, training_objective
from inference.training.optimizers import make_average, make_optimizer, make_schedule
from inference.training.processes import all_sum, sum_gradients
from inference.training.runs import append_metrics, read_metrics, write_metrics
from inference.training.scaling import binarize
from ppl_models.pair import ModelGuidePair

VALIDATION_STREAM, TRAINING_STREAM, BINARIZATION_STREAM = 1, 2, 3
TERMINATED = 143  # the exit status of a process ended by SIGTERM


class Trainer:
    """A run in progress.

    Args:
        pair: trained in place, on the device where it lies.
        train: training data, tensor or Dataset.
        validation: data for the validation bound.
        config: how to train.
        dynamic: the training data are grey values, binarised anew at each use.
        validation_dynamic: so are the validation data.
        folder: the RUN folder, or None to keep everything in memory.
        display: what is shown.
        autocast: context manager factory for the chosen precision.
        rank: this process.
        world: number of processes.
    """

    def __init__(
        self,
        pair: ModelGuidePair,
        train: Any,
        validation: Any,
        config: TrainConfig,
        *,
        dynamic: bool = False,
        validation_dynamic: bool = False,
        folder: Path | None,
        display: TrainingDisplay,
        autocast: Callable[[], Any],
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.pair = pair
        self.train_data, self.validation_data = train, validation
        self.dynamic, self.validation_dynamic = dynamic, validation_dynamic
        self.config, self.folder, self.display, self.autocast = config, folder, display, autocast
        self.rank, self.world = rank, world
        self.device = next(pair.parameters()).device
        self.loss = ElboLoss(pair, num_particles=config.num_particles)
        self.parameters = [p for p in pair.parameters() if p.requires_grad]
        self.batches = num_batches(len(train), config.batch_size)
        self.optimizer = make_optimizer(pair, config)
        self.schedule = make_schedule(self.optimizer, config, config.epochs * self.batches)
        self.average = make_average(pair, config)
        self.epoch = self.batch = 0  # epochs done, and batches done of the one under way
        self.sums = torch.zeros(3, dtype=torch.float64)  # data, rate and distortion of the epoch under way
        self.rows: list[dict[str, float]] = []
        self.best: dict[str, Any] | None = None  # validation ELBO, epoch and weights
        self.finished = False
        self.stopped_by: int | None = None  # the signal that asked for an end
        self._saved_at = time.monotonic()

    def run(self) -> None:
        """Trains to the end, or until stopped by validation, SIGTERM or Ctrl-C; saves in each of these cases.

        Raises:
            SystemExit: with status 143 after SIGTERM.
            KeyboardInterrupt: after Ctrl-C.
        """
        if self.epoch == self.batch == 0:
            self.save()
        with pyro.validation_enabled(False), self._saving_on_signals():
            while not self.finished and self.epoch < self.config.epochs:
                self._epoch()
        self.finished = True
        self.save()
        if self.best is not None:
            self.model.load_state_dict(self.best["weights"])

    @property
    def model(self) -> ModelGuidePair:
        """The pair whose bound is reported and which is saved: the averaged one with ``ema``, else the trained one."""
        return self.pair if self.average is None else self.average.module  # type: ignore[return-value]

    def _epoch(self) -> None:
        started, first = time.monotonic(), self.batch
        self.pair.train()
        for indices, x in iterate(
            self.train_data,
            self.config.batch_size,
            epoch=self.epoch,
            seed=self.config.seed,
            device=self.device,
            start=self.batch,
            rank=self.rank,
            world=self.world,
        ):
            self._step(indices, x)
            self.batch += 1
            self.display.step()
            self._leave_if_stopped()
            if self._save_is_due() and self.batch < self.batches:
                self.save()
        steps = self.batches - first
        self._end_epoch(time.monotonic() - started, steps)

    def _step(self, indices: Tensor, x: Tensor) -> None:
        step = self.epoch * self.batches + self.batch + 1
        size = min(self.config.batch_size, len(self.train_data) - self.batch * self.config.batch_size)
        seed = noise_seed(self.config.seed, TRAINING_STREAM, self.epoch, self.batch, self.rank)
        if self.dynamic and len(indices):
            torch.manual_seed(noise_seed(self.config.seed, BINARIZATION_STREAM, self.epoch, self.batch, self.rank))
            x = binarize(x)
        torch.manual_seed(seed)
        self.optimizer.zero_grad(set_to_none=True)
        parts = torch.zeros(2, dtype=torch.float64, device=self.device)
        if len(indices):
            with self.autocast():
                terms = self.loss.terms(x)
            objective = training_objective(
                terms, self.pair.latent_sites, self.rate_weight, self.config.free_bits, size, all_sum
            )
            objective.backward()
            rate = sum(
                (-t.detach().sum() for s, t in terms.items() if s in self.pair.latent_sites), parts.new_zeros(())
            )
            parts = torch.stack([rate, -sum(t.detach().double().sum() for t in terms.values()) - rate])
        elif self.config.free_bits > 0:
            all_sum(torch.zeros(len(self.pair.latent_sites), device=self.device))  # the others ask for their mean rates
        sum_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip or float("inf"))
        if not bool(torch.isfinite(all_sum(norm + parts.sum()))):
            if len(indices):
                raise diagnose(self.loss, x, indices, step, seed)
            raise TrainingDiverged(f"expected a finite loss and gradient in step {step}: another process reports where")
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.pair)
        self.sums += torch.tensor([float(len(indices)), *parts.tolist()], dtype=torch.float64)

    @property
    def rate_weight(self) -> float:
        """Weight of the rate in the objective at this step: from 0 to 1 during KL warm-up, then 1."""
        warmup = self.config.kl_warmup_epochs * self.batches
        return 1.0 if warmup == 0 else min(1.0, (self.epoch * self.batches + self.batch) / warmup)

    def _end_epoch(self, seconds: float, steps: int) -> None:
        count, rate, distortion = all_sum(self.sums.to(self.device)).tolist()
        rate, distortion = rate / count, distortion / count
        weight, learning_rate = self.rate_weight, self.schedule.get_last_lr()[0]
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, torch.zeros_like(self.sums)
        valid = self.evaluate()
        row = {
            "epoch": float(self.epoch),
            "step": float(self.epoch * self.batches),
            "learning_rate": learning_rate,
            "rate_weight": weight,
            "train_elbo": -(rate + distortion),
            "train_rate": rate,
            "train_distortion": distortion,
            "train_bits_per_dim": bits_per_dim(-(rate + distortion), self.pair.data_shape),
            "validation_elbo": valid.elbo,
            "validation_std_error": valid.std_error,
            "validation_rate": valid.rate,
            "validation_distortion": valid.distortion,
            "validation_bits_per_dim": valid.bits_per_dim,
            "active_units": float(valid.active_units),
        }
        self.rows.append(row)
        self._keep_best(valid.elbo)
        self.display.epoch(row)
        if self.folder is not None and self.rank == 0:
            append_metrics(self.folder / "metrics.csv", row)
            append_metrics(self.folder / "timing.csv", {"epoch": self.epoch, "seconds": seconds, "steps": float(steps)})
        if self._save_is_due():
            self.save()

    def evaluate(self) -> Evaluation:
        """The plain bound on the validation data, on the same draws each epoch."""
        loss = ElboLoss(self.model)
        loss.closed_sites, loss.nesting = self.loss.closed_sites, self.loss.nesting
        with self.autocast():
            return evaluate(
                loss,
                self.validation_data,
                self.config.batch_size,
                seed=noise_seed(self.config.seed, VALIDATION_STREAM),
                dynamic=self.validation_dynamic,
                device=self.device,
                rank=self.rank,
                world=self.world,
                reduce=all_sum,
            )

    def _keep_best(self, elbo: float) -> None:
        if self.config.patience is None:
            return
        if self.best is None or elbo > self.best["elbo"]:
            weights = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
            self.best = {"elbo": elbo, "epoch": self.epoch, "weights": weights}
        self.finished = self.epoch - self.best["epoch"] >= self.config.patience

    def _save_is_due(self) -> bool:
        return time.monotonic() - self._saved_at >= self.config.checkpoint_seconds

    def save(self) -> None:
        """Writes a checkpoint (in the first process), keeping the one before."""
        self._saved_at = time.monotonic()
        if self.folder is None or self.rank != 0:
            return
        tensors, values = flatten_state(self.state())
        name = checkpoint_name(self.epoch * self.batches + self.batch)
        save_checkpoint(self.folder / "checkpoints", name, tensors, values)
        prune_checkpoints(self.folder / "checkpoints")

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on."""
        return {
            "pair": dict(self.pair.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "schedule": {k: v for k, v in self.schedule.state_dict().items() if k != "lr_lambdas"},
            "average": None if self.average is None else dict(self.average.state_dict()),
            "epoch": self.epoch,
            "batch": self.batch,
            "sums": self.sums,
            "rows": self.rows,
            "best": self.best,
            "finished": self.finished,
        }

    def restore(self) -> bool:
        """Goes back to the newest checkpoint of the folder; False where there is none yet.

        Raises:
            CheckpointError: there are checkpoints, but none is intact.
        """
        if self.folder is None:
            return False
        found = latest_checkpoint(self.folder / "checkpoints") if (self.folder / "checkpoints").is_dir() else None
        if found is None:
            self._rewrite_metrics()
            return False
        state = restore_state(found[1], found[2])
        self.pair.load_state_dict(state["pair"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict({**state["schedule"], "lr_lambdas": [None]})
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.epoch, self.batch, self.sums = state["epoch"], state["batch"], state["sums"]
        self.rows, self.best, self.finished = state["rows"], state["best"], state["finished"]
        self._rewrite_metrics()
        return True

    def _rewrite_metrics(self) -> None:
        """Takes rows of epochs that will be done again out of the files."""
        if self.rank == 0 and self.folder is not None:
            write_metrics(self.folder / "metrics.csv", self.rows)
            timing = self.folder / "timing.csv"
            write_metrics(timing, [row for row in read_metrics(timing) if row["epoch"] <= self.epoch])

    def _leave_if_stopped(self) -> None:
        if self.stopped_by is None:
            return
        self.save()
        if self.stopped_by == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(TERMINATED)

    @contextmanager
    def _saving_on_signals(self) -> Iterator[None]:
        """Lets SIGTERM and Ctrl-C end the run after the step under way, which is saved; a second Ctrl-C ends it at once."""
        if self.folder is None or self.rank != 0 or threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:
            if number == signal.SIGINT and self.stopped_by == signal.SIGINT:
                raise KeyboardInterrupt
            self.stopped_by = number

        previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
