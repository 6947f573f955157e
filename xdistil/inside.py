"""Teacher and student looked into on one sentence: attention maps, states and labels. Each model is asked once for
each sentence, on the CPU and without dropout, so that what is shown next has only to be drawn."""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers.decoders import ByteLevel

from xdistil import alignment, data, evaluate, losses, models, students, wordwise
from xdistil.devices import open_accelerator
from xdistil.feeds import layer_pairs
from xdistil.inputs import Inputs
from xdistil.params import Params
from xdistil.runs import Run, stages_of


@dataclass(frozen=True)
class Side:
    """What one model says of a sentence: `maps` [L, A, S, S], None of a BiLSTM; `states` L + 1 of [S, H]; `tags` of
    its words, or of the text."""

    maps: torch.Tensor | None
    states: list[torch.Tensor]
    tags: list[str]


@dataclass(frozen=True, eq=False)
class Look:
    """A sentence as teacher and student see it. `tokens` [S]: where both are compared; `types`: the entity type of
    each ("": none), by `gold` tags or, without, by the teacher's; `paired`: the teacher layer of each student layer
    0..L_s; `projections`: those that stage 1 learnt, by student layer."""

    words: list[str]
    tokens: list[str]
    types: list[str]
    gold: list[str] | None
    teacher: Side
    student: Side
    paired: dict[int, int]
    projections: dict

    @property
    def tags(self) -> dict[str, list[str]]:
        """Tags by whose they are; no gold ones where nobody knows."""
        known = {"gold": self.gold} if self.gold else {}
        return known | {"teacher": self.teacher.tags, "student": self.student.tags}

    def attention(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Maps [A, S, S] of the teacher's heads and of those of a student layer, 1..L_s, that they stand beside: the
        same heads of the paired layer or, where counts differ, the nearest in it. NaN [1, S, S] of a BiLSTM."""
        none = torch.full((1, *[len(self.tokens)] * 2), torch.nan)
        t, s = (none if side.maps is None else side.maps[i - 1]
                for side, i in ((self.teacher, max(1, self.paired[layer])), (self.student, layer)))
        if s is not none and t is not none and len(t) != len(s):
            t = t[[head for _, head in alignment.nearest_heads(t[None], s[None])[0]]]
        return t.numpy(), s.numpy()

    @functools.cached_property
    def heads(self) -> tuple[list[list[float]], list[list[str]]]:
        """KL(t || s) in nats [L_s][A_s] of each student head s and the head t beside it in `attention`; and the
        nearest of all teacher heads, LAYER.HEAD, see `alignment.nearest_heads`. Empty of a BiLSTM."""
        if self.student.maps is None or self.teacher.maps is None:
            return [], []
        real, layers = torch.ones(1, len(self.tokens)), [self.attention(s) for s in list(self.paired)[1:]]
        kl = [[float(losses.attention_kl(*torch.from_numpy(np.stack([s, t]))[:, None, None], real))
               for t, s in zip(*maps, strict=True)] for maps in layers]
        nearest = alignment.nearest_heads(self.teacher.maps, self.student.maps)
        return kl, [[f"{layer}.{head}" for layer, head in row] for row in nearest]

    @torch.no_grad()
    def states(self, s: int, t: int) -> tuple[torch.Tensor, torch.Tensor, str]:
        """States of teacher layer `t` and student layer `s`, 0 = embeddings, the student's projected if stage 1 learnt
        to; and in words what they are compared by."""
        theirs, ours = self.teacher.states[t], self.student.states[s]
        if s in self.projections:
            return theirs, self.projections[s](ours), "student states through stage 1's projection"
        if theirs.shape == ours.shape:
            return theirs, ours, "states as they are"
        return theirs, ours, f"widths {theirs.shape[1]} and {ours.shape[1]} without a projection: by Gram rows"


class Pair:
    """Teacher and student of a run after each finished stage, `stages`. Raises RuntimeError if there is none."""

    def __init__(self, params: Params, run: Run):
        self.params, self.run, self.inputs = params, run, Inputs(params, run)
        self.stages = [name for name in stages_of(params)[1:-2] if params.distil and run.stage(name).done]
        if not self.stages:
            raise RuntimeError(f"{run.dir} holds no student beside a teacher; run build_student first, with distil: "
                               "true")
        self.teacher, self.gold = self.inputs.load_teacher(), {}
        models.return_maps(self.teacher)
        self.types = sorted({x[2:] for x in self.inputs.labels if x[1:2] == "-"}) if self.inputs.by_word else (
            self.inputs.labels)
        self.student, self.cka = functools.lru_cache(2)(self._student), functools.lru_cache(16)(self._cka)
        self.look, self._side = functools.lru_cache(64)(self._look), functools.lru_cache(64)(self._ask)
        self.sentences = functools.cache(self._sentences)

    def words_of(self, text: str) -> tuple[str, ...]:
        """The words of a sentence, or the one text or pair (a tab or " | " between), as `look` takes them. Raises
        DataError if there is none."""
        whole = text.strip().replace(" | ", "\t", int(self.params.unit == "pair"))
        words = text.split() if self.inputs.by_word else [whole]
        if not any(words):
            raise data.DataError("found no words; type a sentence, its words separated by spaces")
        return tuple(words)

    def _sentences(self, n: int = 40) -> list[tuple[str, tuple[str, ...]]]:
        """Names and words of n dev and, once they were scored, n test sentences, evenly spread: first those, marked ≠,
        where the student of the last stage answers otherwise than the teacher."""
        found, student, accelerator = [], self.student(self.stages[-1]), open_accelerator("cpu", "float32", quiet=True)
        for name in ("dev", *["test"] * bool(self.run.stage("evaluation").done)):
            gold = self.inputs.sentences(name)
            rows = np.unique(np.linspace(0, len(gold) - 1, n).astype(int))
            words = [gold.words[i] for i in rows]
            said = [evaluate.predict(model, own.encode(data.Sentences(words)), words, self.inputs.labels, own.pad_id,
                                     accelerator)[0]
                    for model, own in ((self.teacher, self.inputs.teacher), (student, self.inputs))]
            for i, sentence, *tags in zip(rows, words, *said, strict=True):
                self.gold[tuple(sentence)] = gold.tags[i]
                mark, language = "≠" if tags[0] != tags[1] else "=", gold.languages[i]
                head = " ".join(filter(None, (mark, name, str(i + 1), language)))
                found.append((f"{head}: {' '.join(sentence)[:90]}", tuple(sentence)))
        return sorted(found, key=lambda one: one[0][0] == "=")

    def _student(self, stage: str):
        student = models.load_classifier(self.run.stage(stage).dir, self.inputs.labels, "model_dir", self.params.unit)
        models.return_maps(student)
        return student.eval()

    def _cka(self, stage: str) -> list[list[float]]:
        """CKA [L_t + 1][L_s + 1] on 16 windows of dev, see `alignment.measure_alignment`."""
        examples, pad_id = self.inputs.read("dev")[1], self.inputs.pad_id
        return alignment.measure_alignment(self.teacher, self.student(stage), {}, examples, pad_id, "cpu",
                                           n_windows=16)["cka"]

    def _ask(self, name: str, words: tuple[str, ...]) -> tuple[Side, dict]:
        """What the teacher, or the student of a stage, says of the first window of a sentence; and the window."""
        examples = self.inputs.encode(data.Sentences([list(words)]))
        batch = data.collate(examples, [0], self.inputs.pad_id)
        model, read = self.student(name) if name != "teacher" else self.teacher, batch
        if name == "teacher":
            read = wordwise.as_teacher_reads(examples, batch, model)
        bilstm, shown = students.is_bilstm(model.config), wordwise.compared(batch)[0] > 0
        with torch.no_grad():
            logits, states, maps = models.run_model(model, read, True, not bilstm)
            logits, *states = (wordwise.move_states(x, read, batch)[0] for x in (logits, *states))
            maps = None if bilstm else torch.stack([
                wordwise.pool_maps(each, read, batch)[0][:, shown][..., shown] for each in maps])
        first = batch["words"][0, : len(logits)] >= 0
        tags = [self.inputs.labels[i] for i in logits[first].argmax(-1).tolist()]
        return Side(maps, [state[shown] for state in states], tags), {k: x[0][shown] for k, x in batch.items()
                                                                      if k in ("input_ids", "words")}

    def _look(self, stage: str, words: tuple[str, ...]) -> Look:
        """`words` as the teacher and the student of a stage see them."""
        (teacher, window), (student, _) = self._side("teacher", words), self._side(stage, words)
        tokenizer, known = self.inputs.tokenizer, self.gold.get(words)
        tokens = tokenizer.convert_ids_to_tokens(window["input_ids"].tolist())
        if isinstance(getattr(tokenizer, "backend_tokenizer", tokenizer).decoder, ByteLevel):  # not its bytes
            tokens = [tokenizer.decode([i]) for i in window["input_ids"].tolist()]
        place = np.maximum.accumulate(window["words"].numpy())  # of each token's word
        if self.inputs.teacher is not self.inputs:
            tokens = [words[i] for i in place]
        gold, types = known and known[: len(teacher.tags)], [""] * len(tokens)
        if self.inputs.by_word:
            types = [(gold or teacher.tags)[i][2:] if own != -1 else ""
                     for i, own in zip(place, window["words"], strict=True)]
        configs = models.load_config(self.run.stage(stage).dir), self.teacher.config
        sizes = [config.num_hidden_layers for config in configs]
        paired = dict(students.spread(*sizes, "uniform")) | dict(students.spread(*sizes, self.params.layer_map))
        return Look(list(words[: len(teacher.tags)]), tokens, types, gold, teacher, student, paired,
                    self._projections(stage, *configs))

    def _projections(self, stage: str, student_config, teacher_config) -> dict:
        """The projections of stage 1 by student layer; none before it."""
        folder = self.run.stage("hidden").dir
        if "hidden" not in self.stages[: self.stages.index(stage) + 1] or self.params.hidden_loss == "cka":
            return {}
        pairs, *_ = layer_pairs(self.params, teacher_config, student_config)
        made = students.make_projections(pairs, students.state_widths(student_config), teacher_config.hidden_size,
                                         self.params.projection_gelu)
        made.load_state_dict(load_file(folder / "projections.safetensors"))
        return {int(s): projection for s, projection in made.items()}
