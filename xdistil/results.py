"""The last two stages: how good the student is, and a folder to give away."""

from pathlib import Path

import torch

from xdistil import alarms, alignment, card, data, evaluate, export, models, students
from xdistil.ensemble import Ensemble
from xdistil.files import save_text
from xdistil.inputs import Inputs
from xdistil.params import Params
from xdistil.provenance import given_teacher
from xdistil.runs import Run, Stage, stage_before
from xdistil.staging import as_stage, load_student

PREDICTIONS = {"teacher": "teacher_predictions.tsv", "student": "predictions.tsv"}


def predictions(stage: Stage, by_word: bool) -> dict[str, list[list[str]]]:
    """What teacher (if it was scored) and student said of the test sentences, by evaluation."""
    def read(path):  # words or text, tags or label, language
        tags = (line.split("\t")[-2] for _, line in data.read_lines(path))
        return [tag.split(" ") if by_word else [tag] for tag in tags]

    return {who: read(path) for who, name in PREDICTIONS.items() if (path := stage.dir / name).is_file()}


def compare_teachers(inputs: Inputs, accelerator) -> dict[str, float]:
    """Of several teachers (0..1): macro F1 on dev of each and of all as one, the share of dev's words on which two
    agree, and of the words of at most 2,000 transfer sentences on which not all do."""
    inputs = inputs.teacher
    whole = inputs.with_others(models.prepare_to_answer(inputs.load_teacher(), accelerator), accelerator, exact=True)
    each = {f"teacher {i}": Ensemble([x], inputs.labels) for i, x in enumerate(whole.members, 1)}
    found = {name: inputs.score(x, "dev", accelerator) for name, x in {**each, "teachers as one": whole}.items()}
    words = data.subset(inputs.sentences("transfer").words, 2000, inputs.params.seed)
    examples = inputs.encode(data.Sentences(words))
    said = [evaluate.predict(x, examples, words, inputs.labels, inputs.pad_id, accelerator)[0] for x in each.values()]
    return {f"{name}, macro F1": scores["macro"] for name, (scores, _) in found.items()} | {
        "words of dev on which two teachers agree": evaluate.agreement([found[name][1] for name in each])[1],
        "transfer words on which not all teachers do": evaluate.agreement(said)[0]}


@as_stage
def evaluate_student(params: Params, run: Run, stage: Stage, accelerator):
    """6. Teacher and student on dev and, for the first and only time, on test; size, speed, likeness (without a
    teacher: to the checkpoint that the student was)."""
    inputs, device = Inputs(params, run), accelerator.device
    pair = {"teacher": inputs.load_teacher() if params.distil else load_student(run, "labels", inputs),
            "student": load_student(run, "evaluation", inputs)}
    pair = {name: models.prepare_to_answer(model, accelerator) for name, model in pair.items()}
    (gold, _), metrics = inputs.read("test"), {}
    sizes = {"teacher": run.stage("student-init").metrics.get("teacher"), "student": models.size_of(pair["student"])}
    sides = ("teacher", "teacher", inputs.teacher), ("student", stage_before(params, "evaluation"), inputs)
    alone = not params.distil or run.origin is not run  # there the teacher was scored
    for name, done, own in sides[alone:]:
        scores, tags = own.score(pair[name], "test", accelerator)
        data.write_tagged(stage.dir / PREDICTIONS[name], gold, tags)
        metrics[name] = {"test": scores, "dev": run.stage(done).metrics["dev"], **sizes[name],
                         "mb": sizes[name]["parameters"] * 4 / 1e6,
                         **evaluate.measure_speed(pair[name], own.read("test")[1], own.pad_id, accelerator)}
    if not alone:
        metrics["retention"] = evaluate.retention(metrics["student"]["test"], metrics["teacher"]["test"])
    with accelerator.autocast():
        likeness = alignment.measure_alignment(*pair.values(), {}, inputs.read("dev")[1], inputs.pad_id, device)
    warned = inputs.leaks("test") + (alarms.collapse(likeness) if params.distil else [])
    return metrics | {"cka": likeness["cka"], "cka_with": "its teacher" if params.distil else "what it was before",
                      "alarms": warned}


@as_stage
def export_student(params: Params, run: Run, stage: Stage, accelerator):
    """7. The student as a plain Hugging Face folder with a model card, loaded again and compared."""
    inputs, metrics = Inputs(params, run), run.stage("evaluation").metrics
    student = load_student(run, "evaluation", inputs)
    inputs.tokenizer.model_max_length = params.seq_len  # positions past it were never trained
    if not models.reads_token_types(student):  # else transformers would hand it the token types of the teacher
        inputs.tokenizer.init_kwargs["model_input_names"] = ["input_ids", "attention_mask"]
    models.save_model(student, inputs.tokenizer, stage.dir)
    again = models.AUTO_CLASSES[params.unit].from_pretrained(stage.dir)
    tags = [inputs.score(model.to(accelerator.device), "dev", accelerator)[1] for model in (student, again)]
    if tags[0] != tags[1]:
        raise RuntimeError(f"{stage.dir} does not reproduce the student's predictions on dev")
    onnx = _export_onnx(stage, student, inputs, accelerator) if params.onnx else {}
    teacher = given_teacher(params, run) or params.pt_teacher_checkpoint
    source = str(teacher if params.distil else params.pt_student_checkpoint)
    save_text(stage.dir / "README.md", card.write_card(
        params.unit, metrics["student"], metrics.get("teacher"), onnx, run.baselines, labels=inputs.labels,
        source=source.split("/")[-1], data=Path(params.task).name, seq_len=params.seq_len, licence=params.licence,
        registers="import xdistil  # knows the BiLSTM" if students.is_bilstm(student.config) else ""))
    return {"same_predictions": True, f"dev_{params.unit}s": sum(map(len, tags[0])), "onnx": onnx}


def _export_onnx(stage: Stage, student, inputs: Inputs, accelerator) -> dict:
    """Write the ONNX files; of each its size, dev F1, speed, and how far at the most its logits are from torch's.
    Raises RuntimeError if the float32 file does not answer as the student does."""
    found, examples = {}, inputs.read("dev")[1]
    batch = data.collate(examples, range(min(64, len(examples))), inputs.pad_id)
    for name, path in export.export_onnx(student, stage.dir / "onnx").items():
        tagger = export.OnnxTagger(stage.dir, name)
        with torch.inference_mode():
            wanted, got = (models.run_model(model, batch)[0] for model in (student.cpu().eval(), tagger))
        far = float((wanted - got)[batch["attention_mask"][:, : got.shape[1]] > 0].abs().max())
        if name == "fp32" and far > 1e-3:
            raise RuntimeError(f"{path}: logits differ from the student's by {far:.2g}; set onnx: false")
        found[name] = {"mb": path.stat().st_size / 1e6, "dev": inputs.score(tagger, "dev", accelerator)[0],
                       "farthest_logit": far, **evaluate.measure_speed(tagger, examples, inputs.pad_id, accelerator)}
    return found
