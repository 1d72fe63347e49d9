"""The one training loop: AdamW, EMA, a time budget, checkpoints that a kill -9 cannot spoil, early stop on held-out crops."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from synthaug.randomness import SampleKey


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast to train.

    Attributes:
        budget_s: Wall-clock seconds; the learning rate follows a cosine over it. Time before an interruption counts.
        max_steps: Upper bound on optimizer steps.
        learning_rate: Peak rate of AdamW.
        weight_decay: Of AdamW.
        warmup_steps: Linear warm-up.
        ema_decay: Decay of the exponential moving average of the weights (warmed up, Karras et al. style).
        num_validations: How often the held-out loss is taken over the budget.
        patience: Validations without a better loss after which training stops early; the best weights are kept.
        checkpoint_every_s: Seconds between checkpoints.
        seed: Of everything random in training.
    """

    budget_s: float
    max_steps: int = 1_000_000
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    warmup_steps: int = 50
    ema_decay: float = 0.999
    num_validations: int = 20
    patience: int = 1_000
    checkpoint_every_s: float = 120.0
    seed: int = 0


@dataclass
class LoopResult:
    """What came of it: steps, seconds, and (step, seconds, training loss, held-out loss) at every validation."""

    num_steps: int = 0
    seconds: float = 0.0
    best_loss: float = float("inf")
    history: list[tuple[int, float, float, float]] = field(default_factory=list)


def train(
    modules: Sequence[nn.Module],
    loss: Callable[[SampleKey], Tensor],
    validate: Callable[[], float],
    config: LoopConfig,
    checkpoint: Path,
    log: Callable[[str], None] = lambda line: None,
) -> LoopResult:
    """Train `modules` in place; they end with the EMA weights of the best held-out loss.

    Args:
        modules: Networks whose parameters are fitted, all of them.
        loss: Key of a step -> scalar loss; all randomness of the step comes from the key, so that a resumed run sees what
            an uninterrupted one would have seen.
        validate: Held-out loss under the current weights; called with EMA weights in place.
        config: See `LoopConfig`.
        checkpoint: File to resume from and to write to; removed by the caller when the stage is saved.
        log: Called with a line of text at every validation.

    Raises:
        FloatingPointError: If the loss becomes NaN or infinite.
    """
    from diffusers.training_utils import EMAModel

    for module in modules:
        module.requires_grad_(True)  # networks of a loaded cascade are frozen
    parameters = [p for m in modules for p in m.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    ema = EMAModel(parameters, decay=config.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    best = [p.detach().clone() for p in parameters]
    result = LoopResult()
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        _copy(parameters, state["parameters"])
        _copy(best, state["best"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        result = LoopResult(**state["result"])
        log(f"resumed at step {result.num_steps} after {result.seconds:.0f} s")

    def save() -> None:
        state: dict[str, Any] = {
            "parameters": [p.detach() for p in parameters],
            "best": best,
            "optimizer": optimizer.state_dict(),
            "ema": ema.state_dict(),
            "result": {**vars(result)},
        }
        temporary = checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, checkpoint)

    def take_validation() -> None:
        nonlocal best
        ema.store(parameters)
        ema.copy_to(parameters)
        held_out = validate()
        if held_out < result.best_loss:
            result.best_loss = held_out
            best = [p.detach().clone() for p in parameters]
        ema.restore(parameters)
        training = math.nan if running is None else running
        result.history.append((result.num_steps, result.seconds, training, held_out))
        log(f"step {result.num_steps} {result.seconds:.0f} s loss {training:.4f} held-out {held_out:.4f}")

    running = result.history[-1][2] if result.history else None
    last_save, begun = time.monotonic(), time.monotonic() - result.seconds
    losses = [h[3] for h in result.history]
    since_best = len(losses) - 1 - losses.index(min(losses)) if losses else 0
    for module in modules:
        module.train()
    try:
        while result.seconds < config.budget_s and result.num_steps < config.max_steps and since_best < config.patience:
            progress = max(result.seconds / config.budget_s, result.num_steps / config.max_steps)
            warmup = min(1.0, (result.num_steps + 1) / config.warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * warmup * (0.5 + 0.5 * math.cos(progress * math.pi))
            value = loss(SampleKey(config.seed, ("step", result.num_steps)))
            if not bool(torch.isfinite(value)):
                raise FloatingPointError(
                    f"the loss became {float(value.detach())} at step {result.num_steps}; lower learning_rate"
                )
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            ema.step(parameters)
            result.num_steps += 1
            result.seconds = time.monotonic() - begun
            current = float(value.detach())
            running = current if running is None else 0.98 * running + 0.02 * current
            if progress * config.num_validations >= len(result.history) + 1:
                take_validation()
                since_best = 0 if result.history[-1][3] <= result.best_loss else since_best + 1
            if time.monotonic() - last_save > config.checkpoint_every_s:
                save()
                last_save = time.monotonic()
    except BaseException:
        save()  # also on Ctrl-C: what was learned stays
        raise
    take_validation()
    save()
    _copy(parameters, best)
    for module in modules:
        module.eval()
    return result


def _copy(target: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for t, s in zip(target, source, strict=True):
            t.copy_(s)
