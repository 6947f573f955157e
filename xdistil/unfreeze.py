"""Who may learn: parameters in groups from top to bottom, and gradual unfreezing (2004.05686)."""

from torch import nn


def encoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of transformer layers of a Hugging Face encoder. Layers that share their parameters (ALBERT) are one;
    of a family that lists the parts of layers apart (XLM), layer i is all i-th parts. ValueError if there is none."""
    n_layers = getattr(model.config, "num_hidden_groups", model.config.num_hidden_layers)
    for module in model.base_model.modules():
        parts = [x for x in module.children() if isinstance(x, nn.ModuleList) and len(x) == n_layers]
        if parts:
            return parts[0] if len(parts) == 1 else nn.ModuleList(map(nn.ModuleList, zip(*parts, strict=True)))
    raise ValueError(f"{type(model).__name__} has no list of {n_layers} layers")


def word_embedding(model: nn.Module) -> nn.Parameter:
    """The word-embedding matrix [V, H]."""
    return model.get_input_embeddings().weight


def _below_head(model: nn.Module) -> set[int]:
    """Ids of the base model's parameters; but its pooler belongs to the head, as nothing else reads it."""
    return {id(p) for name, p in model.base_model.named_parameters() if "pooler" not in name}


def layer_groups(model: nn.Module) -> list[tuple[str, list[str]]]:
    """Parameter names in groups, top to bottom: head (of texts and pairs with the layer that it reads), layer_L ...
    layer_1, embeddings."""
    layers = encoder_layers(model)
    layer_of = {id(p): f"layer_{i}" for i, layer in enumerate(layers, 1) for p in layer.parameters()}
    below = _below_head(model)
    groups = {name: [] for name in ("head", *(f"layer_{i}" for i in range(len(layers), 0, -1)), "embeddings")}
    for name, parameter in model.named_parameters():
        groups[layer_of.get(id(parameter), "embeddings" if id(parameter) in below else "head")].append(name)
    return list(groups.items())


def unfreezing_steps(groups, grain: str, frozen: frozenset[str] = frozenset()) -> list[tuple[str, list[str]]]:
    """Steps of (name, names of the parameters that learn), each with all of the step before it, from the groups of
    `layer_groups`. Grain: "module" (head, then everything), "layer" (head, then one group more at a time) or "none"
    (everything at once). `frozen` parameters never learn."""
    steps, names = [], []
    for group, members in groups:
        names = names + [n for n in members if n not in frozen]
        steps.append((group, names))
    return {"none": [("all", names)], "module": [steps[0], ("all", names)], "layer": steps}[grain]


def freeze_to(model: nn.Module, trainable: list[str]) -> None:
    """Only the named parameters learn; the rest of the model is in eval mode (no dropout there)."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    learning_mode(model)


def learning_mode(module: nn.Module, holder_learns: bool = True) -> None:
    """Train mode where something learns, eval mode where nothing does; a module without parameters (dropout) does
    as the module that holds it."""
    own = list(module.parameters())
    module.training = any(p.requires_grad for p in own) if own else holder_learns
    for child in module.children():
        learning_mode(child, module.training)


def n_frozen_layers(model: nn.Module) -> int:
    """How many layers lie below everything that learns; 0 if the embeddings learn."""
    layers = encoder_layers(model)
    learning = {id(p) for p in model.parameters() if p.requires_grad} & _below_head(model)
    of_layer = [{id(p) for p in layer.parameters()} for layer in layers]
    if learning - set().union(*of_layer):
        return 0
    return next((i for i, ids in enumerate(of_layer) if ids & learning), len(layers))
