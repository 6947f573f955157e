"""Copied layers made narrower: one orthonormal basis P [H_t, H_s] of the residual stream, folded through all weights.
A norm does not commute with a rotation: its gain and bias are fitted anew, by least squares over a sample of text."""

import torch
from torch import nn
from torch.nn import functional as F

from xdistil.models import run_model
from xdistil.unfreeze import encoder_layers

FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "electra")  # of one layout and the same names


def principal_basis(moments, width: int, gains: torch.Tensor) -> torch.Tensor:
    """P [H, width]: the top eigenvectors of the second moments [H, H] of hidden states, pooled after each is divided
    by its trace, so turned that the norms' gains [H] stay diagonal; at full width it only reorders coordinates."""
    top = torch.linalg.eigh(sum(x / x.trace() for x in moments)).eigenvectors[:, -width:]
    gains = gains * (1 + 1e-6 * torch.arange(len(gains)))  # no two the same: the turn is unique
    basis = top @ torch.linalg.eigh(top.T @ (gains[:, None] * top)).eigenvectors
    return basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()  # whatever the LAPACK build


def best_product(left, right, rank: int, moment_left, moment_right):
    """A [..., rank, n] and B [..., rank, m] with the least E[(x' (left' right - A'B) y)^2] over independent x and y of
    these second moments [n, n] and [m, m]; left [..., k, n], right [..., k, m]."""
    (values_l, own_l), (values_r, own_r) = map(torch.linalg.eigh, (moment_left, moment_right))
    scale_l, scale_r = (x.clamp(min=1e-3 * x.mean()).sqrt() for x in (values_l, values_r))
    u, s, v = torch.linalg.svd((own_l * scale_l).T @ left.mT @ right @ (own_r * scale_r), full_matrices=False)
    s = s[..., :rank, None].sqrt()
    return s * u[..., :rank].mT @ (own_l / scale_l).T, s * v[..., :rank, :] @ (own_r / scale_r).T


@torch.no_grad()
def narrow(wide, student, batches: list[dict]) -> nn.Linear:
    """Fold a BERT-shaped model into a student of as many layers and feed-forward neurons, no more heads and none of
    them wider; all but its head. Returns the projection x -> P x of its states to the wide model's. On one device."""
    norms, tables = ([[x for x in model.eval().base_model.modules() if isinstance(x, kind)] for model in (
        wide, student)] for kind in (nn.LayerNorm, nn.Embedding))
    moments = 0.0
    for batch in batches:
        x = F.pad(_at_norms(wide, norms[0], batch)[::2, 1], (0, 1), value=1.0)  # hidden states 0..L, a 1 behind each
        moments = moments + x.mT @ x
    moments /= moments[:, -1:, -1:].clone()
    gains = torch.stack([x.weight for x in norms[0]]).cpu().double().mean(0)
    basis = principal_basis(moments[:, :-1, :-1], student.config.hidden_size, gains)
    projection, with_one = nn.Linear(*basis.shape[::-1]).to(wide.device), torch.block_diag(basis, torch.ones(1, 1))
    projection.weight.copy_(basis), projection.bias.zero_()
    for given, own in zip(*tables, strict=True):
        own.weight.copy_(given.weight @ projection.weight)
    for a, b, moment in zip(encoder_layers(wide), encoder_layers(student), moments, strict=False):
        _narrow_attention(a.attention, b.attention, basis, with_one.T @ moment @ with_one)
        b.intermediate.dense.weight.copy_(a.intermediate.dense.weight @ projection.weight)
        b.intermediate.dense.bias.copy_(a.intermediate.dense.bias)
        b.output.dense.weight.copy_(projection.weight.T @ a.output.dense.weight)
        b.output.dense.bias.copy_(a.output.dense.bias @ projection.weight)
    sums = 0.0
    for batch in batches:
        x, y = (_at_norms(wide, norms[0], batch) @ basis).unbind(1)
        x = F.layer_norm(x, x.shape[-1:])
        sums = sums + torch.stack([torch.ones_like(x), x, y, x * x, x * y]).sum(2)
    x, y, xx, xy = sums[1:] / sums[0]
    gains = (xy - x * y) / (xx - x * x)
    for norm, gain, bias in zip(norms[1], gains, y - gains * x, strict=True):
        norm.weight.copy_(gain), norm.bias.copy_(bias)
    return projection


def _at_norms(model, norms, batch) -> torch.Tensor:
    """What goes into each norm and what comes out, of real tokens: [N, 2, T, H], in double precision."""
    kept = {}
    handles = [norm.register_forward_hook(lambda norm, inputs, output: kept.update({norm: (*inputs, output)}))
               for norm in norms]
    run_model(model, batch)
    for handle in handles:
        handle.remove()
    real = batch["attention_mask"] > 0
    return torch.stack([torch.stack([x[real] for x in kept[norm]]) for norm in norms]).cpu().double()


def _narrow_attention(given, own, basis, moment) -> None:
    """Queries and keys by the scores they give, values and output by what comes out, for inputs of this moment. Scores
    may shift with their query, and maps sum to 1: so keys need no bias, and the output's takes that of values."""
    mean, n_heads, n_t = moment[:-1, -1], own.self.num_attention_heads, given.self.num_attention_heads
    spread, plain, none = moment[:-1, :-1] - torch.outer(mean, mean), torch.eye(len(mean)).double(), 0 * mean
    layers = [(*(getattr(x.self, name) for name in ("query", "key", "value")), x.output.dense) for x in (given, own)]
    (q, k, v, o), (bias_q, _, bias_v, bias_o) = (
        [getattr(x, name).cpu().double() for x in layers[0]] for name in ("weight", "bias"))
    bias_o = (bias_o + o @ (bias_v + v @ basis @ mean)) @ basis  # with what tokens are told on average
    q, k, v, o = (x.unflatten(0, (n_t, -1)) for x in (
        torch.cat([q @ basis, bias_q[:, None]], 1), k @ basis, v @ basis, o.T @ basis))
    largest = ((q.mT @ k).norm(dim=(1, 2)) * (o.mT @ v).norm(dim=(1, 2))).topk(n_heads).indices.sort().values
    size = len(mean) // n_heads
    scale = (size / q.shape[1]) ** 0.5  # scores are divided by the root of a head's size
    (q, k), (o, v) = ([x.flatten(0, 1) for x in best_product(a[largest], b[largest], size, *of)] for a, b, of in (
        (q * scale, k, (moment, spread)), (o, v, (plain, spread))))
    for layer, weight, bias in zip(layers[1], (q[:, :-1], k, v, o.T), (q[:, -1], none, none, bias_o - o.T @ v @ mean),
                                   strict=True):
        layer.weight.copy_(weight), layer.bias.copy_(bias)
