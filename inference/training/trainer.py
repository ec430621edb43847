"""The training loop: one object that holds a run's state, steps it, saves it and restores it bit for bit.

A step minimises distortion + rate over a batch. Its order comes from (seed, epoch) and its noise from (seed, epoch,
batch, process), so a run that is cut anywhere and resumed from a checkpoint takes the very steps it would have taken.
Nothing that depends on the clock enters the state.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any, NoReturn

import pyro
import torch
from torch import Tensor

from inference.bounds.active_units import NoMeanError, active_units
from inference.bounds.particles import forked_rng
from inference.bounds.sites import NotANumberError
from inference.training.batches import iterate, num_batches
from inference.training.checkpoints import CheckpointError
from inference.training.config import TrainConfig
from inference.training.display import TrainingDisplay
from inference.training.divergence import REMEDY, TrainingDiverged, diagnose, first_bad_parameter
from inference.training.evaluation import Evaluation, bits_per_dim, evaluate, layers, rows_of
from inference.training.inputs import Inputs
from inference.training.interrupts import StopRequest
from inference.training.noise import BINARIZATION, TRAINING, VALIDATION, noise_seed, seed_noise
from inference.training.objective_choice import loss_buffers, make_loss, make_report, warmup_epochs
from inference.training.objectives import join_idle, rate_weight, training_objective
from inference.training.optimizers import Optimization, learning_rate_factor
from inference.training.processes import all_rows, all_sum, first_text, in_any_process
from inference.training.records import Records
from inference.training.scaling import binarize
from inference.training.stepping import Stepper
from inference.training.stopping import EarlyStopping
from ppl_models.diffusion import Diffusion
from ppl_models.networks.labels import labelled
from ppl_models.pair import ModelGuidePair

COLLAPSE_DATA, COLLAPSE_DRAWS = 500, 10
VALIDATION_COLUMNS = ("elbo", "std_error", "rate", "distortion", "bits_per_dim")

_LOG = logging.getLogger(__name__)


class Trainer:
    """A run in progress.

    Args:
        pair: trained in place, on the device where it lies.
        inputs: training and validation data.
        config: how to train.
        records: where checkpoints and metrics go.
        display: what is shown.
        autocast: context manager factory for the chosen precision.
        rank: this process.
        world: number of processes.
    """

    def __init__(
        self,
        pair: ModelGuidePair,
        inputs: Inputs,
        config: TrainConfig,
        *,
        records: Records,
        display: TrainingDisplay,
        autocast: Callable[[], Any],
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.pair, self.inputs, self.config = pair, inputs, config
        self.records, self.display, self.autocast = records, display, autocast
        self.rank, self.world = rank, world
        self.num_data = len(inputs.rows)
        self.batches = num_batches(self.num_data, config.batch_size)
        self.total_steps = config.epochs * self.batches
        self.loss = make_loss(pair, config, self.total_steps)
        self.optimization = Optimization(pair, config, self.total_steps)
        self.model: ModelGuidePair = self.optimization.model  # the averaged pair with ``ema``: it is reported and saved
        self.warmups = [epochs * self.batches for epochs in warmup_epochs(config, pair)]  # steps
        self.device = self.optimization.parameters[0].device
        self.loss.to(self.device)
        full_batch = len(range(rank, min(config.batch_size, self.num_data), world))
        warn = display.message if display.enabled or rank > 0 else _LOG.warning
        self.stepper = Stepper(self.loss, config, self.total_steps, full_batch, self.device, display.message, warn)
        self.epoch = self.batch = 0  # epochs done, and batches done of the one under way
        self.layers = layers(pair)
        # data, rate and distortion of the epoch under way, and the rate of each layer
        self.sums = torch.zeros(3 + len(self.layers), dtype=torch.float64)
        self.rows: list[dict[str, float]] = []
        self.stopping = EarlyStopping(config.patience)
        self.finished = False
        self.stop = StopRequest()
        self._saved_at = time.monotonic()

    @property
    def step(self) -> int:
        """Steps done."""
        return self.epoch * self.batches + self.batch

    def run(self) -> None:
        """Trains to the end, or until stopped by validation, SIGTERM or Ctrl-C; saves in each of these cases.

        Raises:
            SystemExit: with status 143 after SIGTERM.
            KeyboardInterrupt: after Ctrl-C.
            TrainingDiverged: see :func:`inference.fit`.
        """
        if self.step == 0:
            self.save()
        # Without a folder there is nothing to save: the signals then end the program as ever.
        with pyro.validation_enabled(False), self.stop.listening(self.records.folder is not None):
            while not self.finished and self.epoch < self.config.epochs:
                self._epoch()
            self.finished = True
            self.save()
        if self.stop.asked:  # too late to leave early, but not to be heard
            self.stop.leave()
        self.stopping.restore(self.model)
        if self.display.enabled:
            self.display.last_words = self._collapsed()

    def _epoch(self) -> None:
        started, first = time.monotonic(), self.batch
        self.pair.train()
        for indices, x in iterate(
            self.inputs.train,
            self.config.batch_size,
            epoch=self.epoch,
            seed=self.config.seed,
            device=self.device,
            start=self.batch,
            rank=self.rank,
            world=self.world,
        ):
            stopped, save_is_due = self._step(indices, x)
            self.batch += 1
            self.display.step(self.epoch + 1, self.batch)
            if stopped:
                self._leave()
            if save_is_due and self.batch < self.batches:
                self.save()
        self._end_epoch({"seconds": time.monotonic() - started, "steps": float(self.batches - first)})

    def _step(self, indices: Tensor, x: Tensor) -> tuple[bool, bool]:
        """One step; whether it is to be the last, and whether it is time for a checkpoint.

        Raises:
            TrainingDiverged: the loss or its gradient is not finite; the parameters are as before.
        """
        if self.inputs.dynamic and len(indices):
            seed_noise(self._seed(BINARIZATION), self.device)
            x = binarize(x)
        seed_noise(self._seed(TRAINING), self.device)
        if hasattr(self.loss, "anneal"):
            self.loss.anneal(self.step)
        self.optimization.clear()
        with labelled(self.loss, rows_of(self.inputs.labels, indices)):
            rate, distortion, by_layer = self._backward(indices, x)
        norm = self.optimization.gradient_norm().item()
        bad = not math.isfinite(rate + distortion + norm)
        bad, stopped, save_is_due = in_any_process(bad, self.stop.asked, self._save_is_due())
        if bad:
            with labelled(self.loss, rows_of(self.inputs.labels, indices)):
                found = self._diagnosis(indices, x)
            self._diverged(first_text(found))
        self.optimization.step()
        self.sums += torch.tensor([float(len(indices)), rate, distortion, *by_layer], dtype=torch.float64)
        return stopped, save_is_due

    def _backward(self, indices: Tensor, x: Tensor) -> tuple[float, float, list[float]]:
        """Gradients of this process's share of the objective; its sums of rate, distortion and rate by layer, in nats."""
        latents, free_bits = self.loss.latents, self.config.free_bits
        if not len(indices):
            if free_bits > 0:
                join_idle(len(latents), all_sum)
            return 0.0, 0.0, [0.0] * len(self.layers)
        size = min(self.config.batch_size, self.num_data - self.batch * self.config.batch_size)
        try:
            with self.autocast():
                objective, terms = self.stepper(x)
        except NotANumberError:  # at the run's first step, before any closed form is chosen
            self.loss.closed_sites = frozenset()
            self._diverged(self._diagnosis(indices, x))
        except torch.linalg.LinAlgError as error:
            raise TrainingDiverged(f"the programs failed in step {self.step + 1} ({error}): {REMEDY}") from error
        if objective is None:
            objective = training_objective(terms, latents, self._rate_weights(self.step), free_bits, size, all_sum)
        else:
            objective = objective.sum() / size
        objective.backward()
        sums = dict(zip(terms, torch.stack([term.detach().sum() for term in terms.values()]).tolist(), strict=True))
        rate = -sum(sums[site] for site in latents)
        return rate, -sum(sums.values()) - rate, [-sums[site] for site in self.layers]

    def _rate_weights(self, step: int) -> list[float]:
        """The weight of each latent site's rate after ``step`` steps."""
        return [rate_weight(step, warmup) for warmup in self.warmups]

    def _diagnosis(self, indices: Tensor, x: Tensor) -> str | None:
        """What is not finite in this process's share of the step, and where."""
        if not len(indices):
            return None
        with self.autocast():
            return diagnose(self.loss, x, self.inputs.rows[indices.cpu()], self.step + 1, self._seed(TRAINING))

    def _diverged(self, found: str | None) -> NoReturn:
        raise TrainingDiverged(
            found or f"expected a finite gradient, got an infinite norm in step {self.step + 1}: {REMEDY}"
        )

    def _seed(self, stream: int) -> int:
        return noise_seed(self.config.seed, stream, self.epoch, self.batch, self.rank)

    def _end_epoch(self, timing: dict[str, float]) -> None:
        count, rate, distortion, *by_layer = all_sum(self.sums).tolist()
        rate, distortion = rate / count, distortion / count
        valid = self.evaluate()
        last = self.step - 1
        row = {
            "epoch": float(self.epoch + 1),
            "step": float(self.step),
            "learning_rate": self.config.learning_rate * learning_rate_factor(last, self.config, self.total_steps),
            "rate_weight": min(self._rate_weights(last), default=1.0),
            "train_elbo": -(rate + distortion),
            "train_rate": rate,
            "train_distortion": distortion,
            "train_bits_per_dim": self._bits(rate + distortion),
            "train_rate_bits_per_dim": self._bits(rate),
            "train_distortion_bits_per_dim": self._bits(distortion),
            **{f"validation_{name}": value for name, value in vars(valid).items() if name in VALIDATION_COLUMNS},
            "validation_rate_bits_per_dim": self._bits(valid.rate),
            "validation_distortion_bits_per_dim": self._bits(valid.distortion),
            "active_units": float(valid.active_units),
            **{f"train_rate_{site}": total / count for site, total in zip(self.layers, by_layer, strict=True)},
            **{f"validation_rate_{site}": nats for site, nats in valid.rates.items()},
        }
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, torch.zeros_like(self.sums)
        self.rows.append(row)
        self.finished = self.stopping.stops_after(self.epoch, valid.elbo, self.model)
        self.display.epoch(row)
        self.records.add(row, timing)
        if in_any_process(self._save_is_due())[0]:
            self.save()

    def _bits(self, nats: float) -> float:
        return bits_per_dim(-nats, self.pair.data_shape)

    def evaluate(self) -> Evaluation:
        """The plain bound on the validation data, on the same draws each epoch.

        Raises:
            TrainingDiverged: it is not finite.
        """
        loss = make_report(self.model, self.loss)
        try:
            with self.autocast():
                return evaluate(
                    loss,
                    self.inputs.validation,
                    self.config.batch_size,
                    seed=noise_seed(self.config.seed, VALIDATION),
                    dynamic=self.inputs.validation_dynamic,
                    device=self.device,
                    rank=self.rank,
                    world=self.world,
                    reduce=all_sum,
                    each_batch=self._leave_if_stopped,
                    rows=self.inputs.validation_rows,
                    labels=self.inputs.validation_labels,
                )
        except TrainingDiverged as error:
            raise TrainingDiverged(f"after step {self.step}, {error}") from None

    def _collapsed(self) -> str:
        """The latent sites that carry nothing of the validation data, in words; empty where there are none."""
        count = min(COLLAPSE_DATA, len(self.inputs.validation_rows))
        if isinstance(self.pair, Diffusion) or not self.pair.bounds_evidence or count < 2:
            return ""
        indices, x = next(
            iter(
                iterate(
                    self.inputs.validation, count, epoch=0, seed=0, shuffle=False, device=self.device, rank=0, world=1
                )
            )
        )
        self.model.eval()
        try:
            with forked_rng():
                seed_noise(self._seed(VALIDATION), self.device)
                x = binarize(x) if self.inputs.validation_dynamic else x
                with labelled(self.model, rows_of(self.inputs.validation_labels, indices)):
                    units = active_units(self.model, x, num_particles=COLLAPSE_DRAWS)
        except NoMeanError:
            return ""
        return "\n".join(site.words() for site in units.sites.values() if site.count == 0)

    def _save_is_due(self) -> bool:
        return time.monotonic() - self._saved_at >= self.config.checkpoint_seconds

    def save(self) -> None:
        """Writes a checkpoint; all processes take part.

        Raises:
            TrainingDiverged: a parameter is NaN or infinite; nothing is written.
            StorageError: the file system refused; the checkpoint before is intact.
        """
        self._saved_at = time.monotonic()
        bad = first_bad_parameter(self.pair)
        if bad:
            raise TrainingDiverged(
                f"expected finite parameters, got a NaN or infinity in {bad} after step {self.step}: {REMEDY}"
            )
        self.records.save(self.step, self.state())

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on."""
        closed = getattr(self.loss, "closed_sites", None)
        return {
            "optimization": self.optimization.state(),
            "closed_sites": None if closed is None else sorted(closed),
            "nesting": getattr(self.loss, "nesting", 1),
            "loss": loss_buffers(self.loss),
            "epoch": self.epoch,
            "batch": self.batch,
            "sums": all_rows(self.sums),
            "rows": self.rows,
            "stopping": self.stopping.state(),
        }

    def restore(self) -> bool:
        """Goes back to the newest checkpoint of the folder; False where there is none yet.

        Raises:
            CheckpointError: there are checkpoints, but none is intact, or it is of another pair.
        """
        state = self.records.latest()
        if state is not None:
            try:
                self.optimization.load(state["optimization"])
            except ValueError as error:
                raise CheckpointError(f"the checkpoint is of another pair: {error}; resume with that one") from error
            closed = state["closed_sites"]
            self.loss.closed_sites, self.loss.nesting = None if closed is None else frozenset(closed), state["nesting"]
            for name, buffer in loss_buffers(self.loss).items():
                buffer.copy_(state["loss"][name])
            self.epoch, self.batch = state["epoch"], state["batch"]
            self.sums = state["sums"][self.rank].clone()
            self.rows = state["rows"]
            self.stopping.load(state["stopping"])
            self.finished = self.epoch >= self.config.epochs or self.stopping.has_stopped(self.epoch)
        self.records.rewrite(self.rows)
        return state is not None

    def _leave_if_stopped(self) -> None:
        if in_any_process(self.stop.asked)[0]:
            self._leave()

    def _leave(self) -> NoReturn:
        self.save()
        self.stop.leave()
