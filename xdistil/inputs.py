"""What a stage reads: tokenizer, labels, encoded sentences, the teacher."""

import functools
from itertools import compress, repeat
from pathlib import Path

import numpy as np

from xdistil import (
    alarms,
    data,
    ensemble,
    evaluate,
    models,
    processes,
    shards,
    students,
    texts,
    tf_weights,
    transfer,
    vocab,
)
from xdistil.devices import open_accelerator
from xdistil.files import read_json, save_json
from xdistil.params import Params, fingerprint
from xdistil.provenance import hash_input, is_done, task_file, teacher_source
from xdistil.runs import Run, Stage
from xdistil.sources import files_of, read_lines

AT_ONCE = 1 << 22  # ids that are looked at together
KEPT_IDS = "kept_ids.json"  # beside a student of a trimmed vocabulary: the teacher's ids of its pieces


class Inputs:
    """Tokenizer of the teacher (the fine-tuned one as soon as there is one) or the student's own, trimmed as soon as
    the student is built; labels in the teacher's order, and encoded files of a run, read when first used; `teacher`:
    the same as it reads. Raises CheckpointError if a fine-tuned teacher has another task or other labels."""

    def __init__(self, params: Params, run: Run, of_teacher: bool = False):
        self.params, self.run, self.read = params, run, functools.cache(self._encoded)
        source, parameter = teacher_source(params, run)
        self.by_word = params.unit == "word"
        self.listed = self.labels = data.read_labels(task_file(params, run, "labels"), params.unit)
        known = (config := models.load_config(source, parameter)).id2label
        if parameter == "teacher_model_dir":
            models.check_task(config, source, parameter, self.labels, params.unit)
        if set(known.values()) == set(self.labels):  # a finished student's too, whose head goes on
            self.labels = [known[i] for i in range(len(known))]
        own = params.student_tokenizer == "own" and not of_teacher
        self.kept, self.teacher = None, Inputs(params, run, of_teacher=True) if own else self
        if own:
            source, parameter = params.pt_student_checkpoint, "pt_student_checkpoint"
        folder = run.stage("student-init").dir
        if params.trim_vocab and not of_teacher and is_done(params, run, "student-init"):  # old ids of what was kept
            self.kept, source, parameter = read_json(folder / KEPT_IDS), folder, "model_dir"
        self.tokenizer = models.load_tokenizer(source, parameter)
        self.pad_id = self.tokenizer.pad_token_id

    def check(self) -> None:
        """Look at all that can be wrong before training: the student's vocabulary, weights in a TensorFlow file, the
        task's files. Raises CheckpointError or DataError."""
        p, (source, parameter) = self.params, teacher_source(self.params, self.run)
        if p.distil and p.initialisation == "checkpoint" and p.student_tokenizer == "teacher":
            students.other_vocabulary(p.pt_student_checkpoint, self.tokenizer, p.compress_word_embedding)
        list(ensemble.load_members(p.more_teachers, (source, parameter), self.labels, p.unit))
        if Path(source).suffix in tf_weights.SUFFIXES:
            models.load_classifier(source, self.labels, parameter, p.unit)
        for name in ("train", "dev", "test", *["transfer"] * p.distil):
            next(iter(self.sentences(name).words))
        for text in (text for name in ("dev", "test") for text in self.leaks(name)):
            print(f"[alarm] {text}\n", flush=True)

    def load_teacher(self):
        """The fine-tuned teacher in eval mode, on the vocabulary of the tokenizer."""
        source, _ = teacher_source(self.params, self.run)
        teacher = models.load_classifier(source, self.labels, "teacher_model_dir", self.params.unit).eval()
        return vocab.trim_model(teacher, self.kept) if self.kept and self.teacher is self else teacher

    def with_others(self, teacher, accelerator, exact: bool = False):
        """The teacher or, with `more_teachers`, it and these, ready to answer, as one, see `ensemble.Ensemble`."""
        p, kept = self.params, self.kept if self.teacher is self else None
        others = ensemble.load_members(p.more_teachers, teacher_source(p, self.run), self.labels, p.unit, kept)
        others = [models.prepare_to_answer(x, accelerator, exact) for x in others]
        return ensemble.Ensemble([teacher, *others], self.labels) if others else teacher

    def trim_vocab(self, student, stage: Stage, accelerator) -> dict:
        """Trim the tokenizer, and the student with it, to what train and transfer text need, and leave the ids kept in
        the stage's folder. Returns what that saves, the share (0..1) of the words of dev that are cut differently, and
        the teacher's scores on dev as it reads it now."""
        full, (n_rows, width) = self.tokenizer, student.get_input_embeddings().weight.shape
        used = np.zeros(n_rows, bool)
        for ids in (self.read(name)[1].input_ids for name in ("train", "transfer")):
            for start in range(0, len(ids), AT_ONCE):
                used[ids[start : start + AT_ONCE]] = True
        self.tokenizer, self.kept = vocab.trim_tokenizer(full, np.flatnonzero(used).tolist())
        self.pad_id = self.tokenizer.pad_token_id
        self.read.cache_clear()
        vocab.trim_model(student, self.kept)
        save_json(stage.dir / KEPT_IDS, self.kept)
        saved, dev = (n_rows - len(self.kept)) * width, [" ".join(x).split() for x in self.sentences("dev").words]
        share = vocab.share_cut_differently(full, self.tokenizer, self.kept, dev)
        stage.say(f"vocabulary: {len(self.kept):,} of {n_rows:,} pieces, {saved * 4 / 1e6:.1f} MB less; {share:.2%} "
                  "of the words of dev are cut differently")
        scores, _ = self.teacher.score(self.load_teacher().to(accelerator.device), "dev", accelerator)
        return {"parameters_saved": saved, "mb_saved": saved * 4 / 1e6, "dev_words_cut_differently": share,
                "teacher_dev": scores}

    def sentences(self, name: str) -> data.Sentences:
        """The sentences of train, dev, test or transfer. Raises DataError naming file and line."""
        path, p = task_file(self.params, self.run, name), self.params
        if name == "transfer":
            return self._transfer(path)
        limit = p.train_limit if name == "train" else None
        return (data.read_tagged(path, self.labels, limit, p.seed) if self.by_word
                else texts.read_texts(path, p.unit, self.listed, limit, p.seed))

    def _transfer(self, path: Path) -> data.Sentences:
        """The transfer set: what is selected of its text, then train.tsv, then sentences with other mentions. Text of
        any size is streamed, but held in memory to rank it, to balance its languages and to replace mentions."""
        p, plain = self.params, (self.params.transfer_select, self.params.language_temperature) == ("random", 1)
        if plain and not p.augment_mentions and not shards.is_small(path):
            train = self.sentences("train").words if p.transfer_train else None
            return data.Sentences(shards.Text(path, p.unit, p.transfer_limit, p.seed, train))
        read = data.read_text if self.by_word else functools.partial(texts.read_texts, unit=p.unit)
        words = (text := read(path, limit=p.transfer_limit if plain else None, seed=p.seed)).words
        if not plain:
            rank = np.random.default_rng(p.seed).permutation(len(text))  # also while no teacher can be asked
            if p.transfer_select == "uncertain" and is_done(p, self.run, "teacher"):
                rank = np.argsort(-self._uncertainty(path, text), kind="stable")
            words = [words[i] for i in transfer.select(rank, text.languages, p.transfer_limit, p.language_temperature)]
        train = self.sentences("train") if p.transfer_train or p.augment_mentions else None
        if p.transfer_train:
            words = list(map(list, dict.fromkeys(map(tuple, words + train.words))))  # each once
        if p.augment_mentions:
            known = [*words, *train.words, *self.sentences("dev").words]
            n = round(p.augment_mentions * len(words))
            words = words + transfer.replace_mentions(train, n, known, p.seed).words
        return data.Sentences(words)

    def _uncertainty(self, path: Path, found: data.Sentences) -> np.ndarray:
        """Mean entropy [N] of the teacher's labels of each sentence's words; it is asked once, the answer is kept."""
        p = self.params
        key = fingerprint([self.run.stage("teacher").fingerprint, ensemble.hash_weights(p.more_teachers),
                           hash_input(path), p.opt_policy])
        kept = self.run.origin.dir / "targets" / f"uncertainty-{key}.json"
        if read_json(kept, lenient=True) is None:
            accelerator = open_accelerator(p.device, p.opt_policy, quiet=True)
            teacher = self.with_others(models.prepare_to_answer(self.load_teacher(), accelerator), accelerator)
            _, each = evaluate.predict(teacher, self.teacher.encode(found, "transfer"), found.words, self.labels,
                                       self.teacher.pad_id, accelerator, entropy=True)
            save_json(kept, [float(np.mean(values)) for values in each])
            processes.wait()
        return np.array(read_json(kept))

    def keys(self, name: str, among: np.ndarray | None = None) -> np.ndarray:
        """Of each sentence of train, dev, test or transfer the number of its file, its line and a hash of this process
        that forgets case and white space [3, N]; of those alone whose hash is in `among` [3, M]."""
        p, files = self.params, files_of(task_file(self.params, self.run, name))
        limit, known = getattr(p, f"{name}_limit", None), None if among is None else set(among[2].tolist())

        def rows():
            return ((i, number, words) for i, file in enumerate(files) for number, line in read_lines(file)
                    if (words := texts.units_of(line, p.unit, f"{file}:{number}")))

        used = data.chosen(sum(1 for _ in rows()), limit, p.seed) if limit else repeat(True)
        found = ((i, number, hash(" ".join(" ".join(words).casefold().split())))
                 for i, number, words in compress(rows(), used))
        return np.fromiter((x for x in found if known is None or x[2] in known), np.dtype((np.int64, 3))).T

    def leaks(self, name: str, *others: str) -> list[str]:
        """Alarms of what dev or test shares with `others`, by default with all that is trained on."""
        keys = self.keys(name)
        found = {x: self.keys(x, keys) for x in others or ("train", *["transfer"] * self.params.distil)}
        return [text for x, rows in found.items() for i, file in enumerate(files_of(
            task_file(self.params, self.run, x))) for text in alarms.leakage(
                name, keys[1:], file, rows[1:, rows[0] == i])]

    def encode(self, sentences: data.Sentences, name: str = "text") -> data.Examples:
        """Windows of sentences; says how many texts or pairs were cut."""
        unit, seq_len, other = self.params.unit, self.params.seq_len, self.teacher.tokenizer
        if isinstance(sentences.words, shards.Text):
            how = (self.run.origin.dir / "transfer", unit, self.tokenizer, seq_len, other)
            processes.agree(lambda: bool(shards.encode(sentences.words, *how)))  # the first makes the files for all
            examples, n_cut = shards.encode(sentences.words, *how)
        else:
            examples, n_cut = texts.encode(sentences, unit, self.tokenizer, seq_len, self.labels, other)
        if n_cut:
            print(f"[data] {name}: {n_cut:,} of {len(sentences):,} {unit}s are longer than seq_len {seq_len} and cut",
                  flush=True)
        return examples

    def _encoded(self, name: str) -> tuple[data.Sentences, data.Examples]:
        return (sentences := self.sentences(name)), self.encode(sentences, name)

    def score(self, model, name: str, accelerator) -> tuple[dict, list[list[str]]]:
        """Scores on train, dev or test, and the predicted tags."""
        gold, examples = self.read(name)
        tags, _ = evaluate.predict(model, examples, gold.words, self.labels, self.pad_id, accelerator)
        return (evaluate.score if self.by_word else evaluate.score_classes)(gold, tags), tags

    def dev_f1(self, accelerator, model) -> dict:
        """Macro F1 on dev, over languages or of texts over classes, as `fit` takes it."""
        scores, _ = self.score(model, "dev", accelerator)
        others = {name: scores[name] for name in evaluate.MEANS if name in scores and name != "macro"}
        return {"metric": "dev macro F1", "score": scores["macro"], **others}
