"""How a run is trained: every choice in one checked, printable object.

A configuration is plain values with bounds; unknown keys are refused. It is stored in the RUN folder as text, and a run
is only ever resumed under the very configuration that it was started with.
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator


class ConfigError(ValueError):
    """A configuration that cannot be run; one sentence a fault."""


class TrainConfig(BaseModel):
    """Options of :func:`inference.fit`, with their defaults.

    Example:
        >>> TrainConfig(epochs=5).learning_rate
        0.001
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(100, ge=1, description="passes over the training data")
    batch_size: int = Field(128, ge=1, description="data per step, over all processes")
    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False)
    optimizer: Literal["adam", "adamw"] = "adam"
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    schedule: Literal["constant", "cosine", "linear", "exponential"] = Field(
        "constant", description="learning rate over the run: cosine and linear go to zero, exponential to a hundredth"
    )
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises linearly")
    gradient_clip: float | None = Field(None, gt=0, description="largest gradient norm")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of the averaged weights, which are then the model's")
    objective: Literal[
        "auto",
        "elbo",
        "iwae",
        "dreg",
        "enumeration",
        "score_function",
        "gumbel_softmax",
        "straight_through",
        "vlb",
        "simple",
        "hybrid",
    ] = Field("auto", description="what is minimised; auto: the pair's own")
    num_particles: int = Field(1, ge=1, description="draws per datum and step")
    timesteps: Literal["stratified", "uniform", "loss_second_moment"] = Field(
        "stratified", description="how a diffusion's t is drawn"
    )
    auxiliary_weight: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="of a diffusion's auxiliary loss beside the bound (hybrid)"
    )
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False, description="of relaxed categorical draws")
    temperature_end: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="to which the temperature falls over the run"
    )
    kl_warmup_epochs: Annotated[float, Field(ge=0)] | tuple[Annotated[float, Field(ge=0)], ...] = Field(
        0.0,
        description="epochs over which the weight of the rate rises from 0 to 1; several: one for each latent site, top first",
    )
    free_bits: float = Field(0.0, ge=0, description="nats per latent site below which its rate is not pressed")
    validation_fraction: float = Field(
        0.0, ge=0, lt=1, description="part of the training data put aside to validate on"
    )
    patience: int | None = Field(None, ge=1, description="epochs without a better validation ELBO before stopping")
    seed: int = Field(0, ge=0, lt=2**63)
    device: str = "auto"
    precision: Literal["32-true", "64-true", "bf16-mixed"] | None = Field(None, description="None: the pair's own")
    processes: int = Field(1, ge=1, le=64, description="processes that share each batch")
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="the objective to one fused graph; auto: for long runs, in one process, that win back the cost",
    )
    checkpoint_seconds: float = Field(60.0, ge=0, description="seconds between checkpoints, besides the last")
    tensorboard: bool = Field(False, description="also write metrics for TensorBoard (an extra)")

    @field_validator("compile", mode="before")
    @classmethod
    def _on_or_off(cls, value: Any) -> Any:
        """YAML reads on and off, without quotes, as true and false."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|mps|(cuda|gpu)(:[0-9]+)?", value):
            raise ValueError(f"device: expected auto, cpu, mps, cuda or cuda:1, got {value!r}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.patience is not None and self.validation_fraction == 0:
            raise ValueError(
                "expected validation_fraction > 0 with patience: stopping on the held-out part would bias its figures; "
                "put a part of the training data aside, 0.1 say"
            )
        return self

    @property
    def longest_warmup(self) -> float:
        """Epochs after which every rate has its full weight."""
        warmup = self.kl_warmup_epochs
        return max(warmup, default=0.0) if isinstance(warmup, tuple) else warmup


def make_config(options: dict[str, Any]) -> TrainConfig:
    """A :class:`TrainConfig` from plain options.

    Raises:
        ConfigError: an unknown option or a value out of range; the message names each with what came.

    Example:
        >>> make_config({"epochs": 0})
        Traceback (most recent call last):
        ...
        inference.training.config.ConfigError: epochs: input should be greater than or equal to 1, got 0
    """
    try:
        return TrainConfig(**options)
    except ValidationError as error:
        raise ConfigError(explain(error, TrainConfig)) from None


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """A pydantic error as one line: each faulty option, what was expected and what came."""
    faults = []
    for fault in error.errors():
        name = ".".join(map(str, fault["loc"])) or "options"
        if fault["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, model.model_fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(model.model_fields)}"
            faults.append(f"{name}: no such option; {hint}")
        elif fault["type"] == "value_error":
            faults.append(fault["msg"].removeprefix("Value error, "))
        else:
            faults.append(f"{name}: {fault['msg'][0].lower()}{fault['msg'][1:]}, got {fault['input']!r}")
    return "; ".join(faults)
