"""Frozen parts are not recomputed: what the layers below the learning ones say of every window, computed once.

Exact where nothing random happens below: `unfreeze.freeze_to` puts frozen parts in eval mode, so dropout is off there.
Where a family's layers do not hand states [B, S, H] on to each other (XLM, XLNet), only the whole encoder is kept.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from xdistil.data import Examples, collate
from xdistil.grouping import batches, grid, shapes_for
from xdistil.models import model_inputs, run_model
from xdistil.targets import Targets
from xdistil.unfreeze import encoder_layers, n_frozen_layers


class _Reached(Exception):
    """Carries the states that enter a layer out of a forward pass that need not go on."""


def lower_states(model, batch: dict, n_layers: int) -> torch.Tensor | None:
    """What enters layer `n_layers` + 1, or leaves the base model if that is all of them: [B, S, H]; None if the layers
    are not called one by one. Notes as `base_model.forms` the types in which a layer and the whole answer."""
    inputs, layers, forms = model_inputs(model, batch), encoder_layers(model), {}

    def stop(_module, args, kwargs):
        raise _Reached(args[0] if args else kwargs["hidden_states"])

    def note(module, _args, output):
        forms["layer" if module is layers[0] else "whole"] = type(output)

    handles, model.base_model.forms = [x.register_forward_hook(note) for x in (layers[0], model.base_model)], forms
    if n_layers < len(layers):
        handles.append(layers[n_layers].register_forward_pre_hook(stop, with_kwargs=True))
    try:
        output = model.base_model(**inputs)
        return output[0] if n_layers == len(layers) else None
    except _Reached as reached:
        return reached.args[0]
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def starting_from(model, states: torch.Tensor, n_layers: int) -> Iterator[None]:
    """A forward pass of the model inside starts from these states: its first `n_layers` layers do nothing."""
    layers = encoder_layers(model)
    if n_layers == len(layers) and getattr(model.base_model, "pooler", None) is None:  # a pooler has to run
        skipped = {model.base_model: lambda *_, **__: model.base_model.forms["whole"](last_hidden_state=states)}
    else:
        answer = states if model.base_model.forms.get("layer") is torch.Tensor else (states, None)
        skipped = {layer: lambda *_, **__: answer for layer in layers[:n_layers]}
    for module, instead in skipped.items():
        module.forward = instead
    try:
        yield
    finally:
        for module in skipped:
            del module.forward


class FrozenStates:
    """Keeps what the frozen layers of a model say of the windows of `examples`, as long as the same ones are frozen.

    Args:
        windows: those that will be asked for.
        budget_bytes: past it nothing is kept, and the model runs from its start.
    """

    def __init__(self, model, examples: Examples, windows: np.ndarray, pad_id: int, accelerator, budget_bytes: float):
        self.model, self.examples, self.windows, self.pad_id = model, examples, windows, pad_id
        self.accelerator, self.budget, self.n_layers, self.kept = accelerator, budget_bytes, 0, None
        self.row_of = np.zeros(len(examples), np.int64)
        self.row_of[windows] = np.arange(len(windows))

    def _fill(self) -> None:
        lengths, width, self.kept = self.examples.lengths[self.windows], self.model.config.hidden_size, None
        dtype = torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else torch.float32
        n_tokens = int(lengths.sum())
        if self.n_layers == 0 or n_tokens * width * dtype.itemsize > self.budget:
            return
        kept = Targets(lengths, {"frozen_states": torch.empty(n_tokens, width, dtype=dtype)})
        for i, (rows, width) in enumerate(batches(lengths, grid(lengths, 64, shapes_for(self.accelerator)))):
            batch = collate(self.examples, self.windows[rows], self.pad_id, width)
            on_device = {name: x.to(self.accelerator.device) for name, x in batch.items()}
            with torch.no_grad(), self.accelerator.autocast():
                found = lower_states(self.model, on_device, self.n_layers)
                if i == 0 and not self._exact(on_device, found):
                    return
            kept.put(rows, {"frozen_states": found.to("cpu", dtype)})
        self.kept = kept

    def _exact(self, batch: dict, states: torch.Tensor | None) -> bool:
        """Whether the model, started from its first window's states, answers as it does from its beginning."""
        batch = {name: x[:1] for name, x in batch.items()}
        if states is None or states[:1].shape[:2] != batch["input_ids"].shape:
            return False
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        whole, upper = (run_upper(self.model, x) for x in (batch, batch | {"frozen_states": states[:1]}))
        for module, mode in modes.items():
            module.training = mode
        return bool((whole - upper).abs().max() <= 0.01 * whole.abs().max())

    def feed(self, found: Iterable[dict]) -> Iterator[dict]:
        """The batches with `frozen_states` [B, S, H] beside their fields, where any layer is frozen."""
        if (n_layers := n_frozen_layers(self.model)) != self.n_layers:
            self.n_layers = n_layers
            self._fill()
        for batch in found:
            rows, width = self.row_of[batch["windows"].numpy()], batch["input_ids"].shape[1]
            yield batch | self.kept.padded(rows, width) if self.kept else batch


def run_upper(model, batch: dict) -> torch.Tensor:
    """Logits of a batch as `run_model` gives them, from its `frozen_states` where it has them."""
    if "frozen_states" not in batch:
        return run_model(model, batch)[0]
    with starting_from(model, batch["frozen_states"].float(), n_frozen_layers(model)):
        return run_model(model, batch)[0]
