"""What was asked: flat, frozen, checked before anything heavy is loaded; named as in XtremeDistilTransformers."""

import difflib
import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from xdistil.tables import Table

DEMO_TASK = "demo"  # a generated corpus in place of a task folder
PATH_NAMES = ("task", "model_dir", "transfer_file", "teacher_model_dir")
CHECKPOINT_NAMES = ("pt_teacher_checkpoint", "pt_student_checkpoint")


class ParamsError(ValueError):
    """A parameter is unknown, of the wrong type, out of range, or at odds with another."""


def _field(default, meaning: str, **limits):
    return Field(default, description=meaning, **limits)


LayerPair = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]  # a list, as JSON has it


class Params(BaseModel, frozen=True, extra="forbid", str_strip_whitespace=True):
    """All parameters of a run. Paths are absolute once `load_params` has been through them."""

    task: str = _field(DEMO_TASK, "folder with train, dev, test, labels and transfer.tsv; 'demo' generates one")
    model_dir: str = _field("runs/demo", "folder of the run: every stage reads and writes there")
    do_NER: bool = _field(True, "label each word; with this and do_pairwise false, each text")
    do_pairwise: bool = _field(False, "label pairs of texts; needs do_NER: false")
    seq_len: int = _field(64, "sub-words per window, special tokens included; longer sentences are windowed, texts "
                          "and pairs with one label are cut", ge=8)
    train_limit: int | None = _field(None, "sentences of train.tsv used, a seeded subset", ge=1)
    transfer_file: str | None = _field(None, "unlabelled text, a sentence a line: a file, folder or glob of .tsv, "
                                       ".txt, .gz, .zst, .parquet, or hub:NAME[/CONFIG][:SPLIT[:COLUMN]]; default: "
                                       "TASK/transfer.tsv")
    transfer_limit: int | None = _field(None, "sentences of the transfer text used, see transfer_select", ge=2)
    transfer_select: Literal["random", "uncertain"] = _field(
        "random", "which: a seeded subset, or where the teacher's labels have the greatest entropy a word")
    language_temperature: float = _field(
        1.0, "T: languages (2nd column of the transfer text) give n^(1/T) of the limit; 1: as they come", gt=0)
    transfer_train: bool = _field(False, "the sentences of train.tsv join the transfer set, past the limit")
    augment_mentions: float = _field(
        0.0, "so many times more transfer sentences, from train.tsv with other mentions of each type", ge=0)
    seed: int = _field(42, "seed of every random choice", ge=0)
    num_processes: int = _field(1, "processes on this machine that train together, one a GPU", ge=1)
    device: Literal["auto", "cpu", "cuda", "xla", "mps"] = _field("auto", "where models run")
    opt_policy: Literal["auto", "float32", "mixed_float16", "mixed_bfloat16"] = _field(
        "auto", "precision; auto: bfloat16 where the hardware has its arithmetic, else float32")

    pt_teacher: str | None = _field(None, "encoder class, such as BertModel; checked against the checkpoint")
    pt_teacher_checkpoint: str = _field("sentence-transformers/all-MiniLM-L6-v2", "encoder: folder or hub name")
    tf_model_check: bool = _field(False, "teacher from tf_model.h5 or bert_model.ckpt (pip install xdistil[tf])")
    teacher_model_dir: str | None = _field(None, "fine-tuned teacher, reused or written; default: MODEL_DIR/teacher")
    more_teachers: list[str] = _field([], "further fine-tuned teachers, folders; stage 2 learns the mean of logits")
    teacher_batch_size: int = _field(32, "sentences of average length per step", ge=1)
    teacher_epochs: int | None = _field(None, "epochs of the teacher; default: ft_epochs", ge=1)
    teacher_lr: float = _field(5e-5, "peak learning rate of the teacher", gt=0, le=1)

    distil: bool = _field(True, "false: only fine-tune pt_student_checkpoint on labels, as xdistil finetune does")
    student_init: Literal["auto", "checkpoint", "scratch", "teacher_layers", "teacher_pca"] = _field(
        "auto", "where student weights come from; auto: the checkpoint if one is given, else scratch; teacher_pca: "
        "the teacher's layers, narrowed to hidden_size by principal components of its states")
    pt_student_checkpoint: str | None = _field(None, "student encoder: folder or hub name")
    student_tokenizer: Literal["teacher", "own"] = _field(
        "teacher", "whose tokenizer the student reads with; own: that of pt_student_checkpoint, compared by words")
    student_arch: Literal["transformer", "bilstm"] = _field("transformer", "kind of student, from scratch")
    embedding_size: int = _field(300, "width E of a bilstm's word embeddings", ge=8)
    hidden_size: int = _field(384, "student width H_s, from scratch or narrowed; of a bilstm: in each direction", ge=8)
    num_hidden_layers: int = _field(6, "student layers, from scratch or copied", ge=1)
    copied_layers: Literal["uniform", "lower"] | list[Annotated[int, Field(ge=1)]] = _field(
        "uniform", "teacher layers that are copied: by depth with the last, by depth in the lower half, or [1, 2, 6]")
    num_attention_heads: int = _field(12, "student attention heads, from scratch or narrowed", ge=1)
    intermediate_size: int | None = _field(None, "student feed-forward width; default: 4 x hidden_size", ge=8)
    dropout: float = _field(0.1, "dropout of the student; on attention maps 0 in stage 1", ge=0, lt=1)
    compress_word_embedding: bool = _field(False, "student word embeddings from the teacher's: SVD, or mapped")
    freeze_word_embedding: bool = _field(False, "student word embeddings never change")
    trim_vocab: bool = _field(False, "keep the pieces of train and transfer text and single characters only")

    student_stages: list[Literal["hidden", "logits", "labels"]] = _field(
        ["hidden", "logits", "labels"], "what the student learns from, in this order, each at most once; others are "
        "left out; with distil: false labels alone")
    baselines: bool = _field(False, "beside the result: the same student from labels alone, and with logits in place "
                             "of hidden states, each on as many windows in all")
    distil_multi_hidden_states: bool = _field(False, "distil every layer of the map; else the top states only")
    distil_attention: bool = _field(False, "distil attention as well, see attention_loss")
    projection_gelu: bool = _field(False, "GELU on projected states (2004.05686); stage 2 then starts a new head")
    layer_map: Literal["uniform", "top", "last"] | Annotated[list[LayerPair], Field(min_length=1)] = _field(
        "uniform", "layer pairs: by depth, topmost, the last alone, or [[student, teacher], ...] with 0 = embeddings")
    layer_weights: list[Annotated[float, Field(ge=0)]] | None = _field(
        None, "a further weight for each pair of the map, from the lowest student layer up; default: 1")
    hidden_loss: Literal["mse", "cosine", "cka"] = _field("mse", "distance of hidden states; cka needs no projection")
    attention_loss: Literal["mse", "kl", "relation"] = _field(
        "mse", "distance of attention maps, or of query, key and value relations: any number of heads")
    relation_heads: int | None = _field(
        None, "heads that relations are split into; default: the most, up to 12, that divide both widths", ge=1)
    hidden_weight: float = _field(1.0, "weight of each hidden-state term; 0: no such terms", ge=0)
    attention_weight: float = _field(1.0, "weight of each attention term", ge=0)
    logit_loss: Literal["mse", "kl"] = _field("mse", "distance of logits")
    temperature: float = _field(1.0, "softens both models' classes if logit_loss is kl", gt=0)
    hard_label_weight: float = _field(0.0, "weight of cross-entropy on train.tsv in stage 2, beside the logits", ge=0)
    unfreeze: Literal["module", "layer", "none"] = _field("module", "stages 2, 3: head, then all; by layers; at once")
    student_distil_batch_size: int = _field(32, "sentences of average length per step, stages 1 and 2", ge=1)
    student_ft_batch_size: int = _field(32, "sentences of average length per step, stage 3", ge=1)
    distil_chunk_size: int = _field(10000, "transfer sentences whose teacher outputs are computed at once", ge=1)
    holdout_ratio: float = _field(0.05, "share of the transfer set, at most 2,000, that selects", gt=0, lt=0.9)
    distil_epochs: int = _field(10, "passes over the transfer set, at most: stage 1, each step of stage 2", ge=1)
    ft_epochs: int = _field(5, "epochs, at most, of each step of stage 3", ge=1)
    patience: int = _field(3, "epochs without a better score before a step ends", ge=1)
    distil_lr: float = _field(5e-4, "peak learning rate of stage 1", gt=0, le=1)
    logit_lr: float = _field(3e-4, "peak learning rate of stage 2", gt=0, le=1)
    ft_lr: float = _field(1e-4, "peak learning rate of stage 3", gt=0, le=1)
    lr_schedule: Literal["linear", "cosine", "constant"] = _field("linear", "learning rate after warm-up")
    warmup_ratio: float = _field(0.1, "share of each step spent warming up", ge=0, lt=1)
    weight_decay: float = _field(0.01, "AdamW weight decay, of matrices only", ge=0)
    max_grad_norm: float = _field(1.0, "gradient norm above which gradients are scaled down", gt=0)
    licence: str = _field("other", "licence in the student's model card, as the hub writes it: mit, apache-2.0")
    onnx: bool = _field(False, "also export the student as ONNX, float32 and int8 (pip install xdistil[export])")
    targets_cache: Literal["auto", "disk", "memory", "none"] = _field(
        "auto", "where teacher outputs are kept; auto: on disk, if they will be read again and that is faster")
    targets_cache_gb: float = _field(4.0, "GB (1e9 bytes) of kept teacher outputs; past it they are redone", ge=0)
    keep_checkpoints: int = _field(1, "checkpoints kept while a stage trains; where the last one is damaged, it goes "
                                   "on from the one before", ge=1, le=9)
    disk_budget_gb: float | None = _field(None, "GB that model_dir may take: past it teacher outputs are redone, and "
                                          "training that could not save a checkpoint does not start", gt=0)

    @field_validator("copied_layers", "layer_map", "layer_weights", mode="before")
    @classmethod
    def _lists(cls, value):  # text on the command line
        return json.loads(value) if isinstance(value, str) and value.lstrip().startswith("[") else value

    @field_validator("student_stages", mode="before")
    @classmethod
    def _names(cls, value):
        return value.strip("[]").replace(",", " ").split() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _combinations(self):
        init, checkpoint, compress = self.initialisation, self.pt_student_checkpoint, self.compress_word_embedding
        fits = [heads for heads in range(1, 33) if self.hidden_size % heads == 0]
        freeze, copied, bilstm = self.freeze_word_embedding, init.startswith("teacher"), self.student_arch == "bilstm"
        own = self.student_tokenizer == "own"
        for wrong, message in (
            (sorted(set(self.student_stages)) != sorted(self.student_stages) or not self.student_stages,
             f"student_stages: {self.student_stages} names a stage twice, or none; name one or more of hidden, "
             "logits, labels, in the order wanted"),
            (self.do_NER and self.do_pairwise, "do_pairwise: true, but so is do_NER (its default); set do_NER: false "
             "to label pairs, or do_pairwise: false to label words"),
            (self.task == DEMO_TASK and not self.do_NER, "task: 'demo' labels words; set do_NER: true, or name a "
             "folder of labelled texts"),
            (bilstm and not self.do_NER, "student_arch: a bilstm labels words; set do_NER: true, or student_arch: "
             "transformer"),
            (init in ("scratch", "teacher_pca") and not bilstm and self.num_attention_heads not in fits,
             f"hidden_size: {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}; "
             f"choose num_attention_heads from {fits}"),
            (init == "checkpoint" and not checkpoint,
             "student_init: 'checkpoint' needs pt_student_checkpoint; name it or set student_init: scratch"),
            (init != "checkpoint" and checkpoint, f"student_init: {init!r} leaves pt_student_checkpoint "
             f"{checkpoint!r} unused; remove one of the two"),
            (bilstm and init != "scratch", f"student_arch: a bilstm is built from scratch, not from {init}; remove "
             "student_init and pt_student_checkpoint, or set student_arch: transformer"),
            (bilstm and self.distil_attention, "distil_attention: a bilstm has no attention maps; set "
             "distil_attention: false, or student_arch: transformer"),
            (own and (init != "checkpoint" or compress or not (self.distil and self.do_NER)), "student_tokenizer: own "
             "is for distillation into a checkpoint, as it is, word by word; set distil and do_NER: true, name "
             "pt_student_checkpoint and leave compress_word_embedding out, or set student_tokenizer: teacher"),
            (self.projection_gelu and self.hidden_loss == "cka", "projection_gelu: hidden_loss cka projects nothing; "
             "set hidden_loss: mse, or projection_gelu: false"),
            (copied and compress, f"compress_word_embedding: student_init {init!r} takes the word embeddings with "
             "the layers; set compress_word_embedding: false"),
            (self.copied_layers != "uniform" and not copied, f"copied_layers: no layers are copied with student_init "
             f"{init!r}; set student_init: teacher_layers, or copied_layers: uniform"),
            (not self.distil and (compress or self.trim_vocab or not checkpoint), "distil: false fine-tunes "
             "pt_student_checkpoint as it is; name one, and set compress_word_embedding and trim_vocab: false"),
            (self.baselines and not self.distil, "baselines: distil: false is what they are; set baselines: false"),
            (freeze and self.distil > (compress or copied or own), "freeze_word_embedding: nothing of the teacher is "
             "in these word embeddings; set compress_word_embedding: true as well, or freeze_word_embedding: false"),
            (self.transfer_limit is None and (self.transfer_select, self.language_temperature) != ("random", 1),
             "transfer_limit: without it all text is used; set it, or transfer_select: random and "
             "language_temperature: 1"),
            (self.augment_mentions and not self.do_NER, "augment_mentions: texts and pairs have no mentions; set "
             "augment_mentions: 0, or do_NER: true"),
            (self.hidden_weight == 0 and not (self.distil_attention and self.attention_weight), "hidden_weight: 0 "
             "leaves stage 1 without a loss; set hidden_weight: 1, or distil_attention: true and attention_weight: 1"),
            (self.opt_policy == "mixed_float16" and self.device == "cpu",
             "opt_policy: mixed_float16 does not train on a CPU; set opt_policy: mixed_bfloat16 or float32"),
        ):
            if wrong:
                raise ValueError(message)
        return self

    @property
    def initialisation(self) -> str:
        """`student_init` with `auto` resolved: checkpoint, scratch, teacher_layers or teacher_pca."""
        auto = "checkpoint" if self.pt_student_checkpoint else "scratch"
        return auto if self.student_init == "auto" else self.student_init

    @property
    def unit(self) -> str:
        """What a label is given to: word, text or pair."""
        return "word" if self.do_NER else "pair" if self.do_pairwise else "text"

    def pick(self, *names: str) -> dict:
        """The named values, for the fingerprint of a stage."""
        return {name: getattr(self, name) for name in names}

    def table(self) -> Table:
        """Every parameter: value in force (* where it is not the default), what is allowed, meaning."""
        signs, rows = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}, []
        for (name, value), field in zip(self, self.model_json_schema()["properties"].values(), strict=True):
            allowed = []
            for option in field.get("anyOf", [field]):
                limits = [f"{sign} {option[key]}" for key, sign in signs.items() if key in option]
                allowed.append(" ".join([" / ".join(option.get("enum", [option["type"]])), *limits]))
            rows.append({"parameter": name, "value": f"{value}{'' if value == field['default'] else ' *'}",
                         "allowed": " or ".join(allowed), "meaning": field["description"]})
        return Table(rows)

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def repo_root() -> Path:
    """The folder that holds notebooks/ and params/: above the working directory, else above us."""
    folders = [Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parent.parent]
    return next((x for x in folders if (x / "notebooks").is_dir() and (x / "params").is_dir()), Path.cwd())


def absolute_path(name: str, value, base: Path):
    """A path parameter made absolute; other parameters, hub names, keywords and None stay as they are."""
    if name == "more_teachers":  # on the command line a name, or a list as text
        value = [value] if isinstance(value, str) and not value.startswith("[") else Params._lists(value)
        return [absolute_path("teacher_model_dir", x, base) for x in value] if isinstance(value, list) else value
    if name not in PATH_NAMES + CHECKPOINT_NAMES or not isinstance(value, str) or (name, value) == ("task", DEMO_TASK):
        return value
    if (name, value[:4]) == ("transfer_file", "hub:"):
        return value
    local = value and (name in PATH_NAMES or value.startswith((".", "~", "/")) or (base / value).exists())
    return str((base / Path(value).expanduser()).resolve()) if local else value


def load_params(experiment="params/demo.yaml", overrides: dict | None = None) -> Params:
    """Read and check parameters; `overrides` win. `experiment` is the path of a params file (from the working
    directory, else from the repository root, where relative paths start) or the mapping under its `experiment:` key
    (what papermill's `-f` injects). Raises ParamsError naming parameter, value, what is allowed and what to do."""
    root, source, overrides = repo_root(), "experiment", overrides or {}
    if not isinstance(experiment, dict):
        source, path = experiment, next((p for p in (Path(experiment), root / experiment) if p.is_file()), None)
        if path is None:
            known = sorted(p.name for p in (root / "params").glob("*.yaml"))
            raise ParamsError(f"params file {source} does not exist; in params/: {known}")
        try:
            experiment = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ParamsError(f"{source}: not readable as YAML: {' '.join(str(error).split())}") from None
    if isinstance(experiment, dict) and set(experiment) == {"experiment"}:
        experiment = experiment["experiment"]
    if not isinstance(experiment, dict) or not isinstance(overrides, dict):
        raise ParamsError(f"{source}: expected names and values under one key `experiment:`")
    values = {"model_dir": Params.model_fields["model_dir"].default} | experiment | overrides
    for name in (name for name in values if name not in Params.model_fields):
        near = difflib.get_close_matches(str(name), Params.model_fields, 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else "see params/README.md"
        raise ParamsError(f"{source}: unknown parameter {name!r}; {hint}")
    try:
        return Params(**{name: absolute_path(name, value, root) for name, value in values.items()})
    except ValidationError as error:
        raise ParamsError("; ".join(map(_explain, error.errors()))) from None


def _explain(error: dict) -> str:
    """One pydantic error as: name: found what, what is allowed."""
    if not error["loc"]:
        return error["msg"].removeprefix("Value error, ")
    name, message = error["loc"][0], error["msg"][0].lower() + error["msg"][1:]
    return f"{name}: found {error['input']!r}, but {message} ({Params.model_fields[name].description})"


def fingerprint(values) -> str:
    """Sixteen hex digits that change when any of the (JSON-like) values changes."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]
