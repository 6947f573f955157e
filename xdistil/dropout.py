"""Dropout: drawn from one pool on a CPU, and set apart for hidden states and attention maps."""

import functools

import torch
from torch import nn

from xdistil.families import QUERIES


@functools.cache
def _dropout_pool(p: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(1 << 23, dtype=dtype).bernoulli_(1 - p, generator=torch.Generator().manual_seed(0)).div_(1 - p)


class PooledDropout(nn.Dropout):
    """Dropout whose masks on a CPU are slices of one random pool, at a random place each time: drawing bits anew for
    every tensor took a tenth of a training step."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        pool = _dropout_pool(self.p, states.dtype) if self.training and self.p and states.device.type == "cpu" else ()
        if states.numel() >= len(pool):
            return super().forward(states)
        start = int(torch.randint(len(pool) - states.numel(), ()))
        return states * pool[start : start + states.numel()].view(states.shape)


def pool_dropout(model):
    """Exchange a model's dropout for `PooledDropout`; attention maps keep their own."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, PooledDropout(child.p))
    return model


def set_dropout(model, hidden: float, attention: float) -> None:
    """Set the dropout of a model, not of its config, be it a module or a plain rate. On attention maps acts what is
    named after them (`attn_dropout`), or stands beside a query projection and is not named after its output."""
    for module in model.modules():
        has_query = any(hasattr(module, name) for name in QUERIES)
        for name, child in (*module.named_children(), *vars(module).items()):
            rate = attention if "att" in name or (has_query and not name.startswith(("out", "resid"))) else hidden
            if isinstance(child, nn.Dropout):
                child.p = rate
            elif "dropout" in name and isinstance(child, float):
                setattr(module, name, rate)
