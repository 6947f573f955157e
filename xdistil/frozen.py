"""Frozen parts are not recomputed: what the layers below the learning ones say of every window, computed once.

Exact where nothing random happens below: `unfreeze.freeze_to` puts frozen parts in eval mode, so dropout is off there.
Where a family's layers do not hand states [B, S, H] on to each other (XLM, XLNet), only the whole encoder is kept.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import torch

from xdistil.data import Examples, collate
from xdistil.grouping import batches, grid, shapes_for
from xdistil.models import model_inputs, run_model
from xdistil.targets import Targets
from xdistil.unfreeze import encoder_layers, n_frozen_layers


class _Reached(Exception):
    """Ends a forward pass that need not go on."""


def _frozen_parts(model, n_layers: int) -> list:
    """What has nothing to do once the answer of its last is known: `n_layers` layers, or the base model if those are
    all; but a pooler has to run."""
    layers = encoder_layers(model)
    whole = n_layers == len(layers) and getattr(model.base_model, "pooler", None) is None
    return [model.base_model] if whole else list(layers[:n_layers])


def lower_states(model, batch: dict, n_layers: int) -> torch.Tensor | None:
    """What leaves layer `n_layers`, or the base model if that is all of them: [B, S, H]; None if the layers are not
    called one by one. Notes as `base_model.form` the type in which it came."""
    answers, further = [], n_layers < len(encoder_layers(model))

    def note(_module, _args, output):
        answers.append(output)
        if further:
            raise _Reached

    with _frozen_parts(model, n_layers)[-1].register_forward_hook(note), suppress(_Reached):
        model.base_model(**model_inputs(model, batch))
    if not answers:
        return None
    model.base_model.form = type(answers[-1])  # of a layer that is called L times (ALBERT) the last
    return answers[-1] if model.base_model.form is torch.Tensor else answers[-1][0]


@contextmanager
def starting_from(model, states: torch.Tensor, n_layers: int) -> Iterator[None]:
    """A forward pass of the model inside starts from these states: what is frozen does nothing but give them."""
    parts, form = _frozen_parts(model, n_layers), model.base_model.form
    answer = states if form is torch.Tensor else (states, None) if form is tuple else form(last_hidden_state=states)
    for part in parts:
        part.forward = lambda *_, **__: answer
    try:
        yield
    finally:
        for part in parts:
            del part.forward


class FrozenStates:
    """Keeps what the frozen layers of a model say of the windows of `examples`, as long as the same ones are frozen.

    Args:
        windows: those that will be asked for.
        budget_bytes: past it nothing is kept, and the model runs from its start.
    """

    def __init__(self, model, examples: Examples, windows: np.ndarray, pad_id: int, accelerator, budget_bytes: float):
        self.model, self.examples, self.windows, self.pad_id = model, examples, windows, pad_id
        self.accelerator, self.budget, self.n_layers, self.kept = accelerator, budget_bytes, 0, None

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
        self.kept, self.row_of = kept, np.zeros(len(self.examples), np.int64)
        self.row_of[self.windows] = np.arange(len(self.windows))

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
            yield batch | self.kept.padded(self.row_of[batch["windows"].numpy()], batch["input_ids"].shape[1]) if (
                self.kept) else batch


def run_upper(model, batch: dict) -> torch.Tensor:
    """Logits of a batch as `run_model` gives them, from its `frozen_states` where it has them."""
    if "frozen_states" not in batch:
        return run_model(model, batch)[0]
    with starting_from(model, batch["frozen_states"].float(), n_frozen_layers(model)):
        return run_model(model, batch)[0]
