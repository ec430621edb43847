"""A compiled objective in several processes: gradients, steps and metrics of the loss itself, under torch's DDP and in ``fit``.

Both draw the same noise, so that they must agree to rounding and nothing here can fail by chance. The processes of a test
start once and leave what they found in files.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from inference import ElboLoss, compile_objective, fit
from tests.training.training_pairs import linear_vae, noisy_vae, points

WORLD = 2


def gradients_of(objective: nn.Module, pair: nn.Module, x: Tensor, seed: int) -> Tensor:
    """Of the mean loss, on the draws of a seed; whatever was there before is forgotten."""
    pair.zero_grad()
    torch.manual_seed(seed)
    objective(x).mean().backward()
    return gathered(pair)


def gathered(pair: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in pair.parameters() if p.grad is not None])


def accumulated(objective: Any, pair: nn.Module, x: Tensor, seed: int) -> Tensor:
    """Two batches, of which the first is not averaged over processes until the second is."""
    pair.zero_grad()
    torch.manual_seed(seed)
    with objective.no_sync():
        objective(x).mean().backward()
    (0.5 * objective(x[:2])).mean().backward()
    return gathered(pair)


def stepped(objective: nn.Module, pair: nn.Module, x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Losses and weights of three steps; the pair is as before afterwards."""
    before = {name: tensor.clone() for name, tensor in pair.state_dict().items()}
    optimizer = torch.optim.SGD(pair.parameters(), lr=1e-3)  # Adam would follow the rounding of gradients that are zero
    torch.manual_seed(seed)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = objective(x).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    weights = torch.cat([p.detach().flatten() for p in pair.parameters()])
    pair.load_state_dict(before)
    return torch.stack(losses), weights


def refusal(objective: nn.Module, x: Tensor) -> str:
    try:
        compile_objective(objective, x, backend="eager")
    except TypeError as error:
        return str(error)
    return ""


def in_one_process(rank: int, folder: Path) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    pair = noisy_vae()
    x = (torch.rand(6, 4, generator=torch.Generator().manual_seed(rank)) < 0.5).double()
    loss = ElboLoss(pair)
    fast = compile_objective(loss, x, backend="eager")
    seed = 7 + rank
    found: dict[str, Any] = {"local": gradients_of(loss, pair, x, seed)}
    for name, objective in (("eager", DistributedDataParallel(loss)), ("fast", DistributedDataParallel(fast))):
        found[name] = gradients_of(objective, pair, x, seed)
        found[f"{name}, accumulated"] = accumulated(objective, pair, x, seed)
        found[f"{name}, losses"], found[f"{name}, weights"] = stepped(objective, pair, x, seed)
    found["refusal"] = refusal(DistributedDataParallel(loss), x)
    arrays = {name: value.numpy() if isinstance(value, Tensor) else np.array(value) for name, value in found.items()}
    np.savez(folder / f"{rank}.npz", **arrays)
    torch.distributed.barrier()
    # DDP's end joins gloo's thread while it holds the lock that this thread may be waiting for: torch may hang there.
    os._exit(0)


@pytest.mark.slow
def test_under_ddp_it_is_the_loss_under_ddp(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(in_one_process, (tmp_path,), nprocs=WORLD)
    ranks = [np.load(tmp_path / f"{rank}.npz", allow_pickle=False) for rank in range(WORLD)]
    mean = (ranks[0]["local"] + ranks[1]["local"]) / 2
    for found in ranks:
        np.testing.assert_allclose(found["fast"], mean, rtol=1e-10, atol=1e-12)
        for what in ("", ", accumulated", ", losses", ", weights"):
            np.testing.assert_allclose(found[f"fast{what}"], found[f"eager{what}"], rtol=1e-9, atol=1e-11)
        # The twins: a gradient that is not averaged is seen, and so is one that lacks the first batch.
        assert abs(found["local"] - mean).max() > 1e-3
        assert abs(found["fast, accumulated"] - found["fast"]).max() > 1e-3
        assert "put the compiled loss inside" in str(found["refusal"])
    for what in ("fast", "fast, accumulated", "fast, weights"):
        np.testing.assert_array_equal(ranks[0][what], ranks[1][what])
    assert (ranks[0]["fast, losses"] != ranks[1]["fast, losses"]).all(), "each process has data and noise of its own"


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["inductor", "none"])
def test_fit_in_two_processes_is_the_same_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], compiler: str
) -> None:
    """Full batches of 3 + 3 in the graph, a last one of 1 + 1 without; also where there is no C++ compiler."""
    if compiler == "none":
        monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    runs = {}
    for how, seed in (("off", 0), ("on", 0), ("other", 1)):
        pair = linear_vae()
        compile_ = "on" if how == "on" else "off"
        options = {"epochs": 2, "batch_size": 6, "processes": WORLD, "seed": seed, "gradient_clip": 1.0}
        run = fit(pair, points(20), compile=compile_, **options)
        runs[how] = torch.cat([p.detach().flatten() for p in pair.parameters()]), run.metrics
    said = capfd.readouterr().err
    assert ("runs uncompiled, for the compiler failed" in said) == (compiler == "none")
    assert ("; compiled for x of shape [3, 5]" in said) == (compiler == "inductor")
    torch.testing.assert_close(runs["on"][0], runs["off"][0], rtol=1e-9, atol=1e-11)
    for fast, plain in zip(runs["on"][1], runs["off"][1], strict=True):
        assert fast == pytest.approx(plain, rel=1e-9)
    assert float((runs["other"][0] - runs["off"][0]).abs().max()) > 1e-6, "the twin: other draws"
