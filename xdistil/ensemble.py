"""Several teachers as one."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers.modeling_outputs import TokenClassifierOutput

from xdistil import models, vocab
from xdistil.files import hash_file
from xdistil.params import fingerprint


class Ensemble(nn.Module):
    """Several classifiers of one vocabulary as one: the mean of their logits, in the order of `labels`, and the hidden
    states, attention maps and config of the first. The mean, as a student that is close to it is to all of them:
    mean_k |s - t_k|^2 = |s - mean_k t_k|^2 + constant."""

    def __init__(self, members: list[nn.Module], labels: list[str]):
        super().__init__()
        self.members, self.config = nn.ModuleList(members), members[0].config
        self.base_model = members[0].base_model
        self.places = [[model.config.label2id[label] for label in labels] for model in members]

    def forward(self, input_ids, attention_mask, token_type_ids=None, output_hidden_states=False,
                output_attentions=False, return_dict=True):
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        batch, asked = {n: x for n, x in batch.items() if x is not None}, (output_hidden_states, output_attentions)
        found = [models.run_model(model, batch, *asked[: 2 * (i == 0)]) for i, model in enumerate(self.members)]
        logits = [one[0].float()[..., places] for one, places in zip(found, self.places, strict=True)]
        return TokenClassifierOutput(logits=torch.stack(logits).mean(0), hidden_states=found[0][1],
                                     attentions=found[0][2])


def hash_weights(folders: list[str]) -> str:
    """Fingerprint of the weights in folders, in their order."""
    paths = [path for folder in folders for path in sorted(Path(folder).glob("*.safetensors"))]
    return fingerprint([hash_file(path) for path in paths])


def load_members(folders: list[str], first: tuple[str, str], labels: list[str], unit: str,
                 kept: list[int] | None = None) -> Iterator[nn.Module]:
    """Further teachers, each with its labels in its own order, on the ids `kept` of a trimmed vocabulary.
    CheckpointError: one has other labels, or another vocabulary than the `first`, a checkpoint and its parameter."""
    for folder in folders:
        config = models.load_config(folder, "more_teachers")
        models.check_task(config, folder, "more_teachers", labels, unit)
        ours, theirs = (models.load_tokenizer(*named) for named in (first, (folder, "more_teachers")))
        if ours.get_vocab() != theirs.get_vocab():
            raise models.CheckpointError(f"more_teachers: {folder} has another vocabulary than the teacher "
                                         f"({len(theirs)}, {len(ours)} pieces); give teachers of one tokenizer")
        own = [config.id2label[i] for i in range(config.num_labels)]
        model = models.load_classifier(folder, own, "more_teachers", unit)
        yield vocab.trim_model(model, kept) if kept else model
