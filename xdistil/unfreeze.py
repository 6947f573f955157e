"""Who may learn: parameters in groups from top to bottom, and gradual unfreezing (2004.05686)."""

from __future__ import annotations

from torch import nn


def encoder_layers(model: nn.Module, n_layers: int) -> nn.ModuleList:
    """The list of transformer layers of any Hugging Face encoder (`model.base_model`'s)."""
    lists = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList)]
    found = [m for m in lists if len(m) == n_layers and any(True for _ in m.parameters())]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no list of {n_layers} layers; lists found have lengths "
            f"{[len(m) for m in lists]}"
        )
    return found[0]


def word_embedding(model: nn.Module) -> nn.Parameter:
    """The word-embedding matrix [V, H]."""
    return model.get_input_embeddings().weight


def layer_groups(model: nn.Module, n_layers: int) -> list[tuple[str, list[str]]]:
    """Parameter names in groups, top to bottom: head, layer_L ... layer_1, embeddings."""
    layer_of = {
        id(parameter): f"layer_{i + 1}"
        for i, layer in enumerate(encoder_layers(model, n_layers))
        for parameter in layer.parameters()
    }
    below = {id(parameter) for parameter in model.base_model.parameters()}
    order = ["head", *(f"layer_{i}" for i in range(n_layers, 0, -1)), "embeddings"]
    groups: dict[str, list[str]] = {name: [] for name in order}
    for name, parameter in model.named_parameters():
        rest = "embeddings" if id(parameter) in below else "head"
        groups[layer_of.get(id(parameter), rest)].append(name)
    return [(group, names) for group, names in groups.items() if names]


def unfreezing_steps(
    groups: list[tuple[str, list[str]]], grain: str, frozen: frozenset[str] = frozenset()
) -> list[tuple[str, list[str]]]:
    """Steps of (name, trainable parameter names); each holds all of the step before it.

    Args:
        groups: from `layer_groups`, top to bottom.
        grain: "module" (head, then everything), "layer" (head, then one group more at a time)
            or "none" (everything at once).
        frozen: parameter names that stay out of every step.
    """
    groups = [(name, [n for n in names if n not in frozen]) for name, names in groups]
    groups = [(name, names) for name, names in groups if names]
    everything = [n for _, names in groups for n in names]
    if grain == "none" or len(groups) == 1:
        return [("all", everything)]
    if grain == "module":
        return [groups[0], ("all", everything)]
    steps, names = [], []
    for group, members in groups:
        names = names + members
        steps.append((group, names))
    return steps


def freeze_to(model: nn.Module, trainable: list[str]) -> None:
    """Only the named parameters learn; the rest of the model is in eval mode (no dropout there)."""
    allowed = set(trainable)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in allowed)
    learning_mode(model)


def learning_mode(module: nn.Module, holder_learns: bool = True) -> None:
    """Train mode where something learns, eval mode where nothing does.

    A module without parameters (dropout) does as the module that holds it.
    """
    own = list(module.parameters())
    learns = any(p.requires_grad for p in own) if own else holder_learns
    module.training = learns
    for child in module.children():
        learning_mode(child, learns)
