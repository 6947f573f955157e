"""Whatever ends a stage, the same call goes on to the same bytes: kills, full disks, damage, locks."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from test_stages import ROOT, TRAINED, copied, hashes, smoke, smoke_params, weights  # noqa: F401
from test_training import Interrupted, failing_feed, same, train, weights_of

from xdistil import files, stages, training
from xdistil.checkpoints import checkpoint_bytes
from xdistil.data import DataError
from xdistil.files import DamagedError, hold, read_json, read_jsonl
from xdistil.params import ParamsError
from xdistil.runs import STAGES, Run

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XDISTIL_HEADLESS": "1"}
TIMED = {"params.json", "metrics.json", "checksums.json", "begun.json", "done.json", "README.md"}  # or with paths


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def results(folder):
    """Hashes of what a run leaves, but of the files that tell times."""
    return {name: "" if Path(name).name in TIMED else found for name, found in hashes(folder).items()}


def survive(whole, tmp_path, seed, n_kills):
    """A smoke run killed so many times in each stage; checks what holds whenever that is."""
    seconds = {name: Run(smoke_params(whole)).stage(name).metrics["stage_seconds"] for name in STAGES}
    params = smoke_params(tmp_path / "run").model_dump(exclude_none=True)
    asked = map(json.dumps, (params, seed, seconds, {name: n_kills.get(name, 0) for name in STAGES}))
    done = subprocess.run([sys.executable, ROOT / "tests/survival_driver.py", *asked], env=ENVIRONMENT, text=True,
                          capture_output=True, timeout=3600)
    log = (tmp_path / "counts/log").read_text()
    assert done.returncode == 0, done.stderr + log[-3000:]
    found = json.loads(done.stdout)
    assert "Traceback" not in log and found[-1]["ended"] and found[-1]["in"] is None
    assert results(tmp_path / "run") == results(whole)  # no file more, none less, weights and histories bit for bit
    gaps = {name: longest_gap(whole, name) for name in TRAINED}
    for child in found:
        assert child["undone"] == []
        for name, trained in child["trained"].items():  # what was lost is less than from one checkpoint to the next
            assert 0 <= trained - child["gained"][name] <= gaps[name], (name, child)
    return found


def longest_gap(whole, name):
    """Updates between two checkpoints of a stage, at the most: those are at the ends of chunks."""
    at = [0, *sorted({record["update"] for record in Run(smoke_params(whole)).stage(name).history})]
    return max(b - a for a, b in zip(at, at[1:], strict=False))


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not(smoke, tmp_path):  # noqa: F811
    found = survive(smoke, tmp_path, 7, {"teacher": 1, "student-init": 1, "hidden": 2, "logits": 1, "labels": 1})
    assert sum(not child["ended"] for child in found) >= 5


@pytest.mark.long
def test_thirty_kills_over_all_stages(smoke, tmp_path, capsys):  # noqa: F811
    n_kills = {"teacher": 5, "student-init": 3, "hidden": 7, "logits": 6, "labels": 5, "evaluation": 3, "student": 3}
    found = survive(smoke, tmp_path, 42, n_kills)
    killed = [child for child in found if not child["ended"]]
    with capsys.disabled():
        lost = sum(n - child["gained"][name] for child in killed for name, n in child["trained"].items())
        print(f"\n{len(killed)} kills, in {dict(Counter(child['in'] for child in killed))}; temporary files were left "
              f"by {sum(bool(child['temporaries']) for child in killed)}; {lost} updates were done twice")
    assert len(killed) >= 30 and len({child["in"] for child in killed}) >= 5


def test_a_kill_while_a_stage_is_cleared_or_begun_leaves_nobodys_files(copied, monkeypatch, capsys):  # noqa: F811
    folder = copied("student-init")
    params = smoke_params(folder, hidden_size=16, num_attention_heads=4)
    (folder / "hidden").mkdir()
    (folder / "hidden" / ".begun.json.tmp").write_text("{")  # killed as stage 3 began
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        def killed(path):
            raise KeyboardInterrupt

        patch.setattr("xdistil.runs.shutil.rmtree", killed)
        stages.build_student(params, Run(params))
    assert (folder / ".student-init.tmp").is_dir()
    stages.build_student(params, Run(params))
    assert not list(folder.rglob(".*.tmp")) and Run(params).stage("student-init").done
    assert not any((folder / "hidden").iterdir()) and "files that no run" not in capsys.readouterr().out


def test_a_kill_after_the_done_mark_leaves_no_checkpoint(copied):  # noqa: F811
    folder = copied("hidden")
    (folder / "hidden/checkpoint.safetensors").write_bytes(b"left")
    (folder / "hidden/checkpoint-1.safetensors").write_bytes(b"left")
    params = smoke_params(folder, student_stages=["hidden", "labels"], ft_epochs=1)
    stages.finetune_student(params, Run(params))
    assert not list(folder.rglob("checkpoint*"))


@pytest.mark.parametrize("keep, harm, place", [
    (1, flip, (2, 1, 1)), (1, cut, (2, 1, 1)), (3, flip, (2, 1, 1)), (2, cut, (3, 0, 1)),
    (2, lambda path: path.write_bytes(b""), (1, 1, 1)), (2, Path.unlink, (1, 1, 1))])
def test_a_damaged_checkpoint_is_said_and_the_one_before_it_taken(tmp_path, capsys, keep, harm, place):
    whole, _, history = train(tmp_path / "whole")
    folder = tmp_path / "broken"
    with pytest.raises(Interrupted):
        train(folder, batches=failing_feed(place), keep=keep)
    checkpoint = folder / "checkpoint.safetensors"
    assert len(list(folder.glob("checkpoint*"))) == keep
    updates = training.load_checkpoint(checkpoint)[0].updates
    harm(checkpoint)
    capsys.readouterr()
    at, _ = training.load_checkpoint(checkpoint)
    said = capsys.readouterr().out
    assert f"{checkpoint} is damaged (" in said or harm is Path.unlink
    assert not checkpoint.exists() and at.updates == (updates - 2 if keep > 1 else 0)  # a chunk has two
    again, _, found = train(folder, keep=keep)
    assert same(weights_of(again), weights_of(whole)) and found == history


def test_every_bit_of_a_checkpoint_counts(tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path, batches=failing_feed((1, 0, 1)))
    path, whole = tmp_path / "checkpoint.safetensors", (tmp_path / "checkpoint.safetensors").read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 300)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        found = training.load_checkpoint(path)[1]  # names are not sorted in the file: padding and order mean nothing
        assert found == {}, place
        path.write_bytes(whole)
    assert training.load_checkpoint(path)[1]


@pytest.mark.parametrize("harm", [cut, Path.unlink])
def test_a_history_that_is_damaged_meanwhile_is_whole_again_at_the_end(tmp_path, harm):
    whole = train(tmp_path / "whole")[2]
    with pytest.raises(Interrupted):
        train(tmp_path / "broken", batches=failing_feed((2, 1, 1)))
    harm(tmp_path / "broken/history.jsonl")
    assert train(tmp_path / "broken")[2] == whole


@pytest.mark.parametrize("name, harm", [
    ("model.safetensors", flip), ("model.safetensors", cut), ("model.safetensors", Path.unlink),
    ("metrics.json", flip), ("done.json", cut), ("checksums.json", cut), ("tokenizer.json", flip)])
def test_what_a_stage_wrote_is_checked_by_the_next_and_made_again(copied, smoke, capsys, name, harm):  # noqa: F811
    folder = copied("student-init")
    params = smoke_params(folder)
    run = Run(params)
    path = folder / "student-init" / name
    harm(path)
    before = hashes(folder)
    with pytest.raises(RuntimeError, match=f"^hidden needs stage student-init: {path} is .*; run build_student first"):
        stages.distil_hidden(params, run)
    assert hashes(folder) == before and not (folder / "hidden").exists()
    stages.build_student(params, run)
    assert f"[student-init] runs again: {path} is damaged" in capsys.readouterr().out
    assert run.stage("student-init").damage is None
    assert (folder / "student-init/model.safetensors").read_bytes() == (
        smoke / "student-init/model.safetensors").read_bytes()


def test_a_damaged_begun_mark_means_a_fresh_start_and_damaged_files_are_named(copied, capsys):  # noqa: F811
    folder = copied("student-init")
    params = smoke_params(folder)
    cut(folder / "student-init/begun.json")
    stages.build_student(params, Run(params))
    assert "runs again: begun.json is damaged" in capsys.readouterr().out
    for path, read in ((folder / "teacher/metrics.json", read_json), (folder / "teacher/history.jsonl", read_jsonl)):
        cut(path)
        with pytest.raises(DamagedError, match=f"^{path} is damaged .*; delete it and run its stage again"):
            read(path)
        assert read_json(path, 3, lenient=True) == 3


def test_a_vanished_transfer_file_is_named_and_may_come_back(copied, smoke, tmp_path, monkeypatch, capsys):  # noqa: F811
    folder, text = copied("student-init"), tmp_path / "transfer.tsv"
    whole = (ROOT / "tests/data/toy/transfer.tsv").read_bytes()
    text.write_bytes(whole)
    params = smoke_params(folder, transfer_file=str(text))

    def saved(path, at, *others):
        save(path, at, *others)
        raise Interrupted

    save = training.save_checkpoint
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(training, "save_checkpoint", saved)
        stages.distil_hidden(params, Run(params))
    text.unlink()
    before = hashes(folder)
    with pytest.raises(DataError, match=f"^{text}: no such file"):
        stages.distil_hidden(params, Run(params))
    assert hashes(folder) == before
    text.write_bytes(whole)
    stages.distil_hidden(params, Run(params))
    assert "resumes at step" in capsys.readouterr().out
    assert (folder / "hidden/model.safetensors").read_bytes() == (smoke / "hidden/model.safetensors").read_bytes()


HOLDER = "import sys, time; from pathlib import Path; from xdistil.files import hold\nwith hold(Path(sys.argv[1])): " \
         "print('held', flush=True); time.sleep(600)"


def test_a_second_process_is_told_who_works_there_and_a_dead_one_is_no_obstacle(copied):  # noqa: F811
    folder = copied("teacher")
    params, lock = smoke_params(folder), folder / "stage.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, lock], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        assert holder.stdout.readline() == "held\n"
        before = hashes(folder)
        with pytest.raises(RuntimeError, match=f"(?s)^{folder} is in use by process {holder.pid} on .* since 20.*"
                                               "python.*; wait until it ends, stop it, or choose another model_dir"):
            stages.build_student(params, Run(params))
        assert hashes(folder) == before
        stages.finetune_teacher(params, Run(params))  # done before: nothing to hold
    finally:
        holder.kill()
        holder.communicate()
    assert lock.is_file()
    stages.build_student(params, Run(params))
    assert not lock.exists()


def test_a_lock_of_another_host_is_named_and_an_unsigned_one_taken(tmp_path):
    lock = tmp_path / "stage.lock"
    lock.write_text("321\nelsewhere\n77\n")
    with pytest.raises(RuntimeError, match=f"process 321 on elsewhere; .*no such process any more, delete {lock}"):
        with hold(lock, wait=0.1):
            pass
    (tmp_path / "stage.lock.break.1.ab").write_text("")  # and that one, while it took over
    lock.write_text("")  # its process was killed before it signed
    with hold(lock, wait=0.1):
        assert lock.read_text().split()[0] == str(os.getpid())
        with pytest.raises(RuntimeError, match=f"in use by process {os.getpid()} on"), hold(lock, wait=0.1):
            pass
    assert not list(tmp_path.iterdir())


FULL = """
import json, resource, sys
from pathlib import Path
from xdistil import files, stages
from xdistil.params import load_params
from xdistil.runs import Run
usual = resource.getrlimit(resource.RLIMIT_FSIZE)
for asked, n in json.loads(sys.argv[1]):
    params = load_params(asked)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n or usual[0], usual[1]))
    try:
        stages.distil_hidden(params, Run(params))
        print("done", file=sys.stderr)
    except OSError as error:
        left = [str(path) for path in Path(params.model_dir).rglob("*") if path.suffix in (".tmp", ".lock")]
        print(error, left, Run(params).stage("hidden").done, file=sys.stderr)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, usual[1]))
try:
    files.reserve(Path(params.model_dir, "mapped"), 5000)
except OSError as error:
    print("reserve", error, file=sys.stderr)
"""


def test_a_full_disk_is_said_and_the_stage_goes_on_once_it_is_not(copied, smoke):  # noqa: F811
    folder = copied("student-init")  # room: for no lock, a lock alone, not for teacher outputs, not for a checkpoint
    plans = [("disk", 10), ("disk", 60), ("disk", 30_000), ("memory", 200_000), ("disk", None)]
    plans = [(smoke_params(folder, targets_cache=cache).model_dump(exclude_none=True), n) for cache, n in plans]
    done = subprocess.run([sys.executable, "-c", FULL, json.dumps(plans)], env=ENVIRONMENT, text=True,
                          capture_output=True)
    *said, ended, reserved = done.stderr.splitlines()
    assert len(said) == 4 and ended == "done" and reserved == "reserve [Errno 27] File too large", done.stderr
    for line in said:
        assert line.startswith(f"{folder}: no room to write there (") and line.endswith(" [] None")
        assert "free some of this disk" in line and "then run the same again" in line
    assert (folder / "hidden/model.safetensors").read_bytes() == (smoke / "hidden/model.safetensors").read_bytes()


def test_room_for_teacher_outputs_is_set_aside_before_they_are_written(tmp_path):
    files.reserve(path := tmp_path / "deep" / "hidden.bin", 5000)
    assert path.stat().st_size == 5000 and path.stat().st_blocks * 512 >= 5000


@pytest.fixture
def ordinary():
    """Takes from root what lets it write where it may not; gives it back."""
    if os.geteuid():
        yield
        return
    libc, head = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    if not sys.platform.startswith("linux") or libc.capget(head, sets):
        pytest.skip("root may write everywhere, and here it cannot be made an ordinary user")
    whole, sets[0] = sets[0], sets[0] & ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(head, sets) == 0
    yield
    sets[0] = whole
    assert libc.capset(head, sets) == 0


def test_a_folder_that_may_not_be_written_is_said(copied, ordinary):  # noqa: F811
    folder = copied("student-init")
    params = smoke_params(folder)
    folder.chmod(0o555)
    before = hashes(folder)
    try:
        with pytest.raises(OSError, match=f"^{folder}: may not be written .*Permission denied.*; let this user write "
                                          "there, or choose another model_dir"):
            stages.distil_hidden(params, Run(params))
        assert hashes(folder) == before
        stages.build_student(params, Run(params))  # done before: reads alone
    finally:
        folder.chmod(0o755)
    stages.distil_hidden(smoke_params(folder, distil_epochs=1), Run(smoke_params(folder, distil_epochs=1)))


def test_a_budget_too_small_for_a_checkpoint_is_said_before_training(copied):  # noqa: F811
    folder = copied("student-init")
    params = smoke_params(folder, disk_budget_gb=files.folder_bytes(folder) / 1e9 + 1e-5, keep_checkpoints=2)
    with pytest.raises(ParamsError, match="^disk_budget_gb: .* are left in .*stage hidden take up to .*; raise it, "
                                          "lower keep_checkpoints"):
        stages.distil_hidden(params, Run(params))
    assert not (folder / "hidden/checkpoint.safetensors").exists() and not (folder / "hidden/history.jsonl").exists()


def test_teacher_outputs_past_the_budget_are_not_kept(copied, smoke, monkeypatch):  # noqa: F811
    folder, sizes = copied("student-init"), []
    need = checkpoint_bytes(Run(smoke_params(smoke)) and stages.models.load_classifier(
        smoke / "student-init", ["O", "B-X"], "x"), 1)
    budget = (files.folder_bytes(folder) + need + 300_000) / 1e9
    params = smoke_params(folder, disk_budget_gb=budget)

    def saved(path, *others):
        save(path, *others)
        sizes.append(sum(x.stat().st_size for x in folder.rglob("*") if x.is_file()) / 1e9)

    save = training.save_checkpoint
    monkeypatch.setattr(training, "save_checkpoint", saved)
    stages.distil_hidden(params, Run(params))
    assert max(sizes) <= budget
    assert Run(params).stage("hidden").metrics["teacher_windows"] > (
        Run(smoke_params(smoke)).stage("hidden").metrics["teacher_windows"])
    one, other = weights(folder / "hidden"), weights(smoke / "hidden")
    assert all((one[name] - other[name]).abs().max() < 1e-3 for name in one)


@pytest.mark.notebook
@pytest.mark.slow
@pytest.mark.parametrize("number, code, word", [
    (signal.SIGTERM, 143, "terminated"), pytest.param(signal.SIGINT, 130, "interrupted", marks=pytest.mark.long)])
def test_the_command_stops_at_a_checkpoint_and_says_that_it_goes_on(tmp_path, number, code, word):
    folder = tmp_path / "run"
    flags = ["--model_dir", folder, "--teacher_epochs", "400", "--patience", "400", "--device", "cpu"]
    command = [sys.executable, "-m", "xdistil", "run", ROOT / "params/smoke.yaml", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
                               start_new_session=True)
    deadline = time.monotonic() + 300
    while not (folder / "teacher/checkpoint.safetensors").is_file():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    second = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert second.returncode == 1 and f"{folder} is in use by process {process.pid} on" in second.stderr
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == code, said
    assert f"xdistil: {word}; the same command goes on from the last checkpoint" in said and "Traceback" not in said
    stage = Run(smoke_params(folder)).stage("teacher")
    assert stage.done is None and (stage.dir / "checkpoint.safetensors").is_file()
    assert not list(folder.rglob("*.lock")) and not list(folder.rglob(".*.tmp"))
    text = json.dumps(json.loads((folder / "notebooks/01_finetune_teacher.ipynb").read_text()))
    assert "[teacher] stopped at a checkpoint after" in text
