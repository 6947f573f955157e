"""A tiny untrained teacher, made on the spot; tests/data/tiny-teacher is one, for params/smoke.yaml."""

from pathlib import Path

import transformers

from xdistil.data import word_pieces
from xdistil.models import from_config
from xdistil.unfreeze import layer_groups


def random_teacher(words: set[str], labels: list[str], folder: Path) -> Path:
    """Write a tiny untrained BERT (4 layers of width 48, 4 heads) whose WordPiece vocabulary is the letters
    and the first 2,000 of the words; for dry runs and tests."""
    letters = sorted({letter for word in words for letter in word})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + x for x in letters)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces + sorted(words)[:2000]))}
    transformers.BertTokenizer(vocab=vocab, do_lower_case=False, strip_accents=False).save_pretrained(folder)
    from_config(transformers.BertConfig(
        vocab_size=len(vocab), hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96,
        num_labels=len(labels))).save_pretrained(folder)
    return folder


def pieces(tokenizer, sentences: list[list[str]]) -> list[list[list[int]]]:
    """The sub-word ids of each word of each sentence, as the library reads them."""
    ids, offsets, words = word_pieces(tokenizer, sentences)
    words = iter(words)
    return [[ids[offsets[i] : offsets[i + 1]].tolist() for _, i in zip(sentence, words, strict=False)]
            for sentence in sentences]


def head_of(model):
    """The linear classifier of words on the last hidden states."""
    weight, _ = dict(layer_groups(model))["head"]
    return model.get_submodule(weight.rpartition(".")[0])
