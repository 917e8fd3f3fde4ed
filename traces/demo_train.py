"""Train one demo model: AdamW, a learning rate that warms up, stays and decays, a load balance.

The balance is the Switch Transformer loss taken layer by layer (the one in the HuggingFace classes
sums over all layers first, so that one layer may be lopsided as long as another makes up for it),
with the router z-loss of ST-MoE beside it. Steps, windows and weights depend on the seed alone. The
rate does not know the total before the decay starts, so a stopped run may go on to another total.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from moesim.errors import UsageError
from moesim.traces.demo_shapes import Shape, build
from moesim.traces.demo_tokens import write_json

Batch = dict[str, Any]
Batches = Callable[[int], Batch]
"""From a step number to the model's arguments, all int64 tensors, `labels` among them."""

SAY_EVERY_S: Final = 15.0
_BUILDING: Final = threading.Lock()


@dataclass(frozen=True, slots=True)
class Plan:
    """How to train. A step is `step_tokens` tokens."""

    steps: int
    step_tokens: int
    seed: int = 0
    rate: float = 2e-3
    warmup_steps: int = 100
    decay_share: float = 0.3
    last_rate_share: float = 0.05
    weight_decay: float = 0.05
    clip: float = 1.0
    balance: float = 0.05
    z_loss: float = 1e-3
    save_every_steps: int = 50


@dataclass(slots=True)
class Run:
    """A model on its way."""

    model: Any
    optimizer: Any
    step: int = 0
    seconds: float = 0.0
    log: list[dict[str, float]] = field(default_factory=list)


def rate_at(plan: Plan, step: int) -> float:
    """The learning rate of a step."""
    warm = min(1.0, (step + 1) / plan.warmup_steps)
    start = plan.steps * (1.0 - plan.decay_share)
    gone = max(0.0, (step - start) / max(1.0, plan.steps - start))
    return plan.rate * warm * (1.0 - (1.0 - plan.last_rate_share) * gone)


def train(
    shape: Shape, plan: Plan, batches: Batches, folder: Path, corpus: str, device: str
) -> Run:
    """Train to the end of the plan, from the last checkpoint in `folder` if there is one.

    `corpus` is the digest of the tokens. Returns the finished run.

    Raises
    ------
    UsageError
        If the checkpoint belongs to another shape, corpus or plan.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_same(folder / "run.json", shape, plan, corpus)
    run = _start(shape, plan, folder, device)
    with router_logits(run.model) as routed:
        _loop(run, shape, plan, batches, folder, device, routed)
    _save(run, folder)
    return run


def _loop(
    run: Run,
    shape: Shape,
    plan: Plan,
    batches: Batches,
    folder: Path,
    device: str,
    routed: list[Any],
) -> None:
    began, said, first = time.monotonic() - run.seconds, 0.0, run.step
    run.model.train()
    while run.step < plan.steps:
        numbers = _step(run, shape, plan, batches(run.step), device, routed)
        run.step += 1
        run.seconds = time.monotonic() - began
        if run.step % 50 == 0:
            run.log.append({"step": run.step, "seconds": round(run.seconds, 1), **numbers})
        if run.step % plan.save_every_steps == 0:
            _save(run, folder)
        if run.seconds - said > SAY_EVERY_S or run.step == plan.steps:
            said = run.seconds
            _say(shape, plan, run, numbers, first)


def _step(
    run: Run, shape: Shape, plan: Plan, batch: Batch, device: str, routed: list[Any]
) -> dict[str, float]:
    import torch

    for group in run.optimizer.param_groups:
        group["lr"] = rate_at(plan, run.step)
    routed.clear()
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device != "cpu"):
        loss = run.model(**batch).loss
    balance, z = _router_losses(routed, shape, batch)
    (loss + plan.balance * balance + plan.z_loss * z).backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), plan.clip)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return {"loss": round(loss.item(), 4), "balance": round(balance.item(), 4)}


def _router_losses(routed: list[Any], shape: Shape, batch: Batch) -> tuple[Any, Any]:
    """Means over layers of the load balance (1 = even) and of the squared log-partition."""
    import torch

    balance, z = [], []
    for logits in routed:
        logits = _without_padding(logits, batch).float()
        chosen = logits.topk(shape.top_k, -1).indices.flatten()
        load = torch.bincount(chosen, minlength=shape.experts) / len(chosen)
        balance.append(shape.experts * (load * logits.softmax(-1).mean(0)).sum())
        z.append(logits.logsumexp(-1).square().mean())
    return torch.stack(balance).mean(), torch.stack(z).mean()


def _without_padding(logits: Any, batch: Batch) -> Any:
    """The rows of real tokens, (tokens, experts); the encoder's and the decoder's masks differ."""
    logits = logits.reshape(-1, logits.shape[-1])
    if "attention_mask" not in batch:
        return logits
    for mask in (batch["attention_mask"] != 0, batch["labels"] != -100):
        if mask.numel() == len(logits):
            return logits[mask.flatten()]
    return logits


@contextmanager
def router_logits(model: Any) -> Iterator[list[Any]]:
    """A list to which every router appends its logits, layer by layer, while the model runs."""
    seen: list[Any] = []

    def keep(module: Any, _: Any, out: Any) -> None:
        # Switch routers hand out (chosen, probability, logits), all others the logits first.
        seen.append(out[2] if "Switch" in type(module).__name__ else out[0])

    routers = [m for m in model.modules() if type(m).__name__.endswith("Router")]
    handles = [router.register_forward_hook(keep) for router in routers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _optimizer(model: Any, plan: Plan) -> Any:
    import torch

    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": plan.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.rate, betas=(0.9, 0.95), fused=True)


def _start(shape: Shape, plan: Plan, folder: Path, device: str) -> Run:
    import torch

    # The seed is the whole process's; another model may be built at the same time.
    with _BUILDING:
        model = build(shape, plan.seed).to(device)
    run = Run(model, _optimizer(model, plan))
    path = folder / "checkpoint.pt"
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.step, run.seconds, run.log = state["step"], state["seconds"], state["log"]
        print(f"{shape.name}: going on from step {run.step}", file=sys.stderr)
    return run


def _save(run: Run, folder: Path) -> None:
    import torch

    state = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "step": run.step,
        "seconds": run.seconds,
        "log": run.log,
    }
    torch.save(state, folder / "checkpoint.part")
    (folder / "checkpoint.part").replace(folder / "checkpoint.pt")
    write_json(folder / "log.json", run.log)


def _check_same(path: Path, shape: Shape, plan: Plan, corpus: str) -> None:
    fixed = {k: v for k, v in asdict(plan).items() if k not in ("steps", "save_every_steps")}
    now = {"shape": asdict(shape), "plan": fixed, "corpus": corpus}
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != now:
        raise UsageError(
            f"{path.parent}: holds a run with another shape, plan or corpus; name another --work"
            " or delete that folder"
        )
    write_json(path, now)


def _say(shape: Shape, plan: Plan, run: Run, numbers: dict[str, float], first: int) -> None:
    per_step = run.seconds / max(1, run.step)
    left = (plan.steps - run.step) * per_step / 60
    print(
        f"{shape.name}: step {run.step}/{plan.steps}, loss {numbers['loss']:.3f}, balance"
        f" {numbers['balance']:.3f}, {plan.step_tokens / per_step:,.0f} tokens/s,"
        f" {left:.1f} min left",
        file=sys.stderr,
        flush=True,
    )
