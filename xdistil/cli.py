"""The command line; see `xdistil --help`. Exit codes: 0 done, 1 a stage failed, 2 bad input, 130
interrupted and 143 terminated: the same command goes on."""

import argparse
import asyncio
import difflib
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import yaml
from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

from xdistil import __version__
from xdistil.files import explained, hold, read_json, save_atomic
from xdistil.params import Params, absolute_path, load_params, repo_root
from xdistil.runs import STAGES, Run, stages_of
from xdistil.tables import Table


def build_parser() -> argparse.ArgumentParser:
    """The parser; the flags of run and check are the fields of `Params`."""
    parser = argparse.ArgumentParser(prog="xdistil", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("run", "run every stage as a notebook, then print a table and write report.html"),
                       ("finetune", "fine-tune pt_student_checkpoint on labels, without a teacher; as run otherwise"),
                       ("study", "vary one parameter at a time around a run, over seeds, and compare"),
                       ("check", "look at parameters, data and models without training")):
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument("params", nargs="?", help="params file; default: params/demo.yaml, or the flags alone")
        for field, info in Params.model_fields.items():
            kind = {"action": argparse.BooleanOptionalAction} if info.annotation is bool else {"metavar": "VALUE"}
            text = f"{info.description} (default: {info.default})".replace("%", "%%")
            command.add_argument(f"--{field}", default=argparse.SUPPRESS, help=text, **kind)
    study = commands.choices["study"]
    study.add_argument("--vary", action="append", required=True, type=_factor, metavar="NAME=V1,V2",
                       help="a parameter and its other values, as in YAML, or NAME=V1+NAME=V2 for two at once; "
                       "repeatable")
    study.add_argument("--seeds", default="1,2,3", help="of each cell (default: 1,2,3)")
    study.add_argument("--n_jobs", type=int, default=1, help="cells at a time, one thread each (default: 1)")
    for name, text in (("export", "write a student's ONNX files, float32 and int8"),
                       ("push", "upload a student to the Hugging Face hub"),
                       ("predict", "label words, texts or pairs with a student")):
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.add_argument("student_dir", help="folder of a finished student: MODEL_DIR/student")
    push, predict = commands.choices["push"], commands.choices["predict"]
    push.add_argument("repo", help="USER/NAME on the hub; made if it is not there")
    push.add_argument("--public", action="store_true", help="visible to everyone; default: private")
    predict.add_argument("input", help="text<TAB>anything, one sentence or text a line, of a student of pairs "
                         "text<TAB>text<TAB>anything; - for stdin")
    predict.add_argument("-o", "--output", default="-", help="words<TAB>tags or text<TAB>label lines; - for stdout")
    predict.add_argument("--format", choices=("tsv", "jsonl"), help="jsonl: with probabilities, and entities with "
                         "their places; default: by the name of the output, else tsv")
    predict.add_argument("--batch_size", type=int, default=64, help="sentences per step")
    predict.add_argument("--onnx", choices=("fp32", "int8"), help="run a file of `xdistil export`, not torch")
    predict.add_argument("--device", default="auto", help="auto, cpu, cuda, xla or mps")
    return parser


def _factor(text: str) -> tuple[str, list | dict]:
    try:
        parts = [(name, yaml.safe_load(f"[{values}]"))
                 for name, _, values in (part.partition("=") for part in text.split("+"))]
        if all(values for _, values in parts):
            return parts[0] if len(parts) == 1 else (text, {name: value for name, (value,) in parts})
    except (yaml.YAMLError, ValueError):
        pass
    raise argparse.ArgumentTypeError(f"found {text!r}; expected NAME=VALUE,VALUE, or NAME=VALUE+NAME=VALUE for two at "
                                     "once, with values as in YAML")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    asked, unknown = build_parser().parse_known_args(arguments)
    try:
        if unknown:
            near = difflib.get_close_matches(unknown[0].lstrip("-"), Params.model_fields, 1, 0.5)
            hint = f"did you mean --{near[0]}?" if near else "see xdistil run --help"
            raise ValueError(f"unknown parameter {unknown[0]!r}; {hint}")
        if asked.command in ("predict", "export", "push"):
            return {"predict": predict_file, "export": export_files, "push": push_files}[asked.command](asked)
        values = {name: absolute_path(name, value, Path.cwd())  # flags are relative to the working directory
                  for name, value in vars(asked).items() if name in Params.model_fields}
        values |= {"distil": False} if asked.command == "finetune" else {}
        params = load_params(asked.params or ({} if values else repo_root() / "params/demo.yaml"), values)
        if asked.command in ("run", "finetune"):
            return run_notebooks(params)
        from xdistil import stages, study, views

        stages.check(params, run := Run(params))
        if asked.command == "study":
            vary = {}
            for name, values in asked.vary:
                vary[name] = values if isinstance(values, dict) else [*vary.get(name, ()), *values]
            cells = study.plan(params, run, vary, list(map(int, asked.seeds.split(","))))
            print(study.run_cells(params, run, cells, asked.n_jobs))
            print(f"\n{Table(study.compare(params, run, cells), 'macro F1 on test above the base, 95 % interval')}")
            return 0
        print(*views.describe(params, run), views.needs(params, run), sep="\n\n")
        return 0
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"xdistil: {error}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2
    except KeyboardInterrupt as error:
        number = next((x for x in error.args if isinstance(x, int)), signal.SIGINT)
        how = "terminated" if number == signal.SIGTERM else "interrupted"
        print(f"xdistil: {how}; the same command goes on from the last checkpoint", file=sys.stderr)
        return 128 + number


@contextmanager
def _passing_on():
    """The first interrupt or SIGTERM makes the kernel stop at a checkpoint, the second kills it. Gives what came."""
    def pass_on(number, _):
        came.append(number)
        for child in psutil.Process().children():
            with suppress(psutil.Error):  # it has ended
                if "ipykernel" in " ".join(child.cmdline()):
                    child.send_signal(signal.SIGINT if len(came) == 1 else signal.SIGKILL)

    came, usual = [], {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def run_notebooks(params: Params) -> int:
    """Execute the notebooks of unfinished stages with papermill, then write the report and print a table. Raises
    RuntimeError while another command does so in this folder."""
    from xdistil import stages

    stages.check(params, run := Run(params))
    with explained(run.dir), hold(run.dir / "run.lock"), _passing_on() as came:
        code = _execute(params, run, came)
    if came:
        raise KeyboardInterrupt(came[0])
    return code


def _in_a_thread(execute_notebook, *args, **options) -> None:
    """Run a notebook, and close the event loop that this thread has for it."""
    try:
        execute_notebook(*args, **options)
    finally:
        with suppress(RuntimeError):  # it has none
            asyncio.get_event_loop().close()


def _execute(params: Params, run: Run, came: list) -> int:
    from nbclient.exceptions import DeadKernelError
    from papermill import PapermillExecutionError, execute_notebook

    from xdistil import report, views
    from xdistil.provenance import is_done

    start, ran, executed = time.monotonic(), 0, run.dir / "notebooks"
    os.environ |= {"XDISTIL_HEADLESS": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    executed.mkdir(parents=True, exist_ok=True)
    for path in executed.glob("*.ipynb"):  # of stages that are no longer asked for: not in the report either
        if path.stem[3:] not in map(STAGES.get, stages_of(params)):
            path.unlink()
    for name in (bar := tqdm(names := stages_of(params), unit="notebook", disable=None)):
        if came:
            return 1
        verb, number = STAGES[name], list(STAGES).index(name) + 1
        notebook = executed / f"{number:02d}_{verb}.ipynb"
        bar.set_description(verb)
        written = read_json(notebook, {}, lenient=True) if is_done(params, run, name) else {}
        papermill = written.get("metadata", {}).get("papermill", {})
        if papermill.get("end_time") and not papermill.get("exception"):
            tqdm.write(f"[{name}] done before with the same parameters and data", file=sys.stderr)
            continue
        ran += 1
        try:
            with ThreadPoolExecutor(1) as pool:  # elsewhere than here papermill leaves signals alone
                pool.submit(_in_a_thread, execute_notebook, repo_root() / "notebooks" / notebook.name, notebook,
                            {"experiment": params.model_dump(exclude_none=True)}, kernel_name="python3",
                            cwd=str(repo_root()), progress_bar=False, stdout_file=DummyTqdmFile(sys.stderr),
                            extra_arguments=["--log-level=CRITICAL"]).result()
        except (PapermillExecutionError, DeadKernelError) as error:
            bar.close()
            why = (f"cell {error.exec_count}: {error.ename}: {error.evalue}" if hasattr(error, "evalue")
                   else "its kernel, which died, most often for want of memory: lower the batch sizes")
            how = "stopped" if came else "failed"
            print(f"xdistil: {verb} {how} in {why}\n  what ran is saved in {notebook}", file=sys.stderr)
            return 1
    page, table, alarms = run.dir / "report.html", views.results(run), views.alarms(run)
    if ran or not page.is_file():
        loud = " class=alarm" * ("alarm" in alarms.columns)
        summary = (f"{table._repr_html_()}<div{loud}>{alarms._repr_html_()}</div>"
                   f"<details><summary>parameters</summary>{params._repr_html_()}</details>")
        figures = [run.dir / "figures" / f"{name}.png" for name in ("languages", "size-speed", "confusion")]
        report.write_report(executed, page, title=f"xdistil: {run.dir.name}", summary_html=summary, figures=figures)
    print(f"\n{table}\n\n{alarms}\n\n{ran} of {len(names)} stages ran in {time.monotonic() - start:.0f} s\n"
          f"student: {run.dir / 'student'}\nreport: {page}")
    return 0


def export_files(asked) -> int:
    """Write STUDENT_DIR/onnx."""
    from xdistil import export, models

    config = models.load_config(asked.student_dir, "STUDENT_DIR")
    labels = [config.id2label[i] for i in range(config.num_labels)]
    model = models.load_classifier(asked.student_dir, labels, "STUDENT_DIR", models.unit_of(config))
    for path in export.export_onnx(model, Path(asked.student_dir) / "onnx").values():
        print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")
    return 0


def push_files(asked) -> int:
    """Upload a student's folder; nothing else in this project ever does."""
    from huggingface_hub import HfApi

    from xdistil import models

    models.load_tokenizer(asked.student_dir, "STUDENT_DIR")  # a clear error if this is no model
    try:
        api = HfApi()
        api.create_repo(asked.repo, private=not asked.public, exist_ok=True)
        print(api.upload_folder(folder_path=asked.student_dir, repo_id=asked.repo))
    except OSError as error:  # the hub's are such
        raise ValueError(f"push: {asked.repo} was not written ({str(error).strip().splitlines()[0]}); log in with `hf "
                         "auth login`, on a machine with network") from None
    return 0


def predict_file(asked) -> int:
    """Label a file or stdin as a stream."""
    from xdistil import predict

    labeller = predict.Labeller(asked.student_dir, asked.onnx, asked.device, asked.batch_size)
    form = asked.format or ("jsonl" if Path(asked.output).suffix in (".jsonl", ".json") else "tsv")
    lines = (f"{predict.format_line(form, labeller.unit, *found)}\n" for found in labeller.label(asked.input))

    def write(path):
        with open(path, "w", encoding="utf-8") as handle:
            handle.writelines(lines)

    if asked.output == "-":
        sys.stdout.reconfigure(encoding="utf-8")
        sys.stdout.writelines(lines)
    else:
        save_atomic(Path(asked.output), write)
    if labeller.n_cut:
        print(f"{labeller.n_cut:,} {labeller.unit}s are longer than {labeller.seq_len} sub-words and were cut",
              file=sys.stderr)
    return 0
