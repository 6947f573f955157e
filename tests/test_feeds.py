"""Which layers are distilled with what weight, and labelled batches beside those of the transfer set."""

from itertools import islice

import pytest
import torch
from transformers import BertConfig

from xdistil.feeds import layer_pairs, with_labelled
from xdistil.params import ParamsError, load_params
from xdistil.targets import TargetSpec
from xdistil.training import Feed

TEACHER, STUDENT = BertConfig(num_hidden_layers=6), BertConfig(num_hidden_layers=3)
ALL = {"distil_multi_hidden_states": True, "distil_attention": True}


def pairs(**values):
    return layer_pairs(load_params(values), TEACHER, STUDENT)


@pytest.mark.parametrize("values, hidden, attention", [
    ({}, [(3, 6)], []), (ALL, [(0, 0), (1, 2), (2, 4), (3, 6)], [(1, 2), (2, 4), (3, 6)]),
    (ALL | {"layer_map": "top"}, [(0, 3), (1, 4), (2, 5), (3, 6)], [(1, 4), (2, 5), (3, 6)]),
    (ALL | {"layer_map": "last"}, [(3, 6)], [(3, 6)]),
    (ALL | {"layer_map": [[3, 5], [1, 0], [0, 2], [2, 2]]}, [(0, 2), (1, 0), (2, 2), (3, 5)], [(2, 2), (3, 5)]),
    ({"layer_map": [[1, 2], [2, 4]], "distil_attention": True}, [(2, 4)], [(1, 2), (2, 4)]),
    (ALL | {"hidden_weight": 0}, [], [(1, 2), (2, 4), (3, 6)])])
def test_pairs_of_states_and_of_layers(values, hidden, attention):
    for loss, kind in (("kl", "attention"), ("relation", "qkv")):
        *found, _, spec = pairs(**values, attention_loss=loss)
        assert found == [hidden, attention]
        assert spec == TargetSpec(tuple(t for _, t in hidden), **{kind: tuple(t for _, t in attention)})


def test_every_term_has_the_weight_of_its_kind_times_that_of_its_pair():
    _, _, weights, _ = pairs(**ALL, layer_map=[[3, 6], [1, 2]], hidden_weight=2, attention_weight=10)
    assert weights == {"hidden_1": 2, "hidden_3": 2, "attention_1": 10, "attention_3": 10}
    _, _, weights, _ = pairs(**ALL, layer_map=[[3, 6], [1, 2]], hidden_weight=2, attention_weight=10,
                             layer_weights=[0.5, 3])  # from the lowest student layer up
    assert weights == {"hidden_1": 1, "hidden_3": 6, "attention_1": 5, "attention_3": 30}


def test_a_map_that_does_not_fit_its_weights_or_attention_is_an_error():
    with pytest.raises(ParamsError, match=r"^layer_weights: found 2, but the layer map has 4 pairs .*\(3, 6\)\]; gi"):
        pairs(layer_weights=[1, 2])
    with pytest.raises(ParamsError, match="^layer_map: .*no layers above the embeddings.*set distil_attention: false"):
        pairs(layer_map=[[0, 0], [1, 0]], distil_attention=True)


def test_each_batch_gets_a_labelled_one_that_follows_from_pass_and_chunk():
    asked = []

    def labelled(number, _chunk):
        asked.append(number)
        return ({"input_ids": torch.tensor([number, i])} for i in range(3))

    def batches(*place):
        return ({"input_ids": torch.tensor([*place, i])} for i in range(5))

    joined = with_labelled(batches, Feed(labelled, 3))
    found = {place: list(joined(*place)) for place in ((0, 0), (0, 1), (1, 0), (1, 1))}
    for place, rows in found.items():
        assert [row["input_ids"].tolist() for row in rows] == [[*place, i] for i in range(5)]
        beside = [row["labelled_input_ids"].tolist() for row in rows]
        assert [i for _, i in beside] == [0, 1, 2, 0, 1] and len({number for number, _ in beside}) == 2
    assert len(set(asked)) == len(asked) == 8  # another order each time
    again = [row["labelled_input_ids"].tolist() for row in joined(1, 0)]  # as a resumed stage asks for it
    assert again == [row["labelled_input_ids"].tolist() for row in found[1, 0]]
    assert len(list(islice(with_labelled(lambda *_: batches(0), Feed(labelled, 3))(), 9))) == 5
