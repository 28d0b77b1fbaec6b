"""``benchmarks.gpu_run``: its plan, its steps, and what a killed run leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_run
from benchmarks.gpu_run import Step

ROOT = Path(__file__).resolve().parents[2]


def python(code: str) -> str:
    return f'-c "{code}"'


def test_the_plan_is_over_in_nine_minutes():
    names = [step.name for step in gpu_run.STEPS]
    assert len(set(names)) == len(names)
    whole = sum(step.seconds for step in gpu_run.STEPS) + gpu_run.GRACE
    assert whole < 540
    assert all(step.seconds > gpu_run.MARGIN for step in gpu_run.STEPS)


def test_a_step_that_fails_or_is_cut_stops_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "MARGIN", 0.5)
    monkeypatch.setattr(gpu_run, "GRACE", 1)
    writer = tmp_path / "writer.py"
    writer.write_text(
        "import json, os\n"
        "result = {'rows': [1, 2], 'notes': ['left out for time: b', 'busy']}\n"
        "json.dump(result, open(os.environ['FILE'], 'w'))\n"
        "print('wrote', os.environ['FILE'])\n"
    )
    steps = (
        Step("good", 20, (python("print('first'); print('= last =')"), python("")), ()),
        Step("bad", 20, (python("import sys; sys.exit('why')"),)),
        # This step uses what good and bad left; nothing is left for the one after.
        Step("slow", -34, (python("import time; print('begun', flush=True); time.sleep(60)"),)),
        Step("late", 0, (python(""),)),
        Step("writes", 20, (str(writer),), (("FILE", "{work}/part.json"),)),
    )
    began = time.monotonic()
    outcomes = gpu_run.run(steps, tmp_path, [sys.executable], dict(os.environ))
    assert time.monotonic() - began < 20
    assert [(one.step, one.status) for one in outcomes] == [
        ("good", 0), ("good", 0), ("bad", 1), ("slow", 124), ("late", None), ("writes", 0)
    ]  # fmt: skip
    assert [one.failed for one in outcomes] == [False, False, True, False, False, False]
    assert [one.said for one in outcomes[:4]] == ["last", "(silent)", "why", "KeyboardInterrupt"]
    assert outcomes[-1].said == f"wrote {tmp_path}/part.json"
    summary = (tmp_path / "summary.txt").read_text().splitlines()
    assert summary[2].startswith("bad: FAILED (1) in ") and summary[2].endswith(": why")
    assert summary[3].startswith("slow: CUT in ")
    assert summary[4] == "late: CUT, no time to begin"
    assert summary[-1] == "part.json: 2 rows, 1 left out"
    assert (tmp_path / "logs" / "good_0.log").read_text() == "first\n= last =\n"


@pytest.mark.parametrize(
    ("statuses", "expected"), [((0, 0), None), ((0, 124), 3), ((None, -9), 3), ((124, 2), 1)]
)
def test_the_exit_status_tells_failed_from_cut(tmp_path, monkeypatch, capsys, statuses, expected):
    outcomes = [gpu_run.Outcome("step", status, 1.0, "said") for status in statuses]

    def run(steps, work, *_):
        (work / "targets.md").write_text("| a | no |\n| b | not measured |\n")
        return outcomes

    monkeypatch.setattr(gpu_run, "run", run)
    monkeypatch.setattr(sys, "argv", ["gpu_run", "--dry", "--out", str(tmp_path)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    if expected is None:
        gpu_run.main()
    else:
        with pytest.raises(SystemExit) as ended:
            gpu_run.main()
        assert ended.value.code == expected
    said = capsys.readouterr().out
    assert "| a | no |" in said and "| b |" not in said and str(outcomes[-1]) in said
    assert content(tmp_path).keys() == {"targets.md"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_nothing_is_begun(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_run", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "needs CUDA" in done.stderr
    assert "sees no CUDA device" in done.stderr and not (tmp_path / "out").exists()


def content(out: Path) -> dict[str, str]:
    """The packed files by name; none where there is no archive yet."""
    path = out / gpu_run.PACKED
    if not path.exists():
        return {}
    with tarfile.open(path) as archive:
        files = [(one.name, archive.extractfile(one)) for one in archive.getmembers()]
        return {name: file.read().decode() for name, file in files}


def started(tmp_path: Path, code: str, *options: str) -> subprocess.Popen:
    """A run after some code, in a process that can be killed."""
    code = f"import os\nfrom benchmarks import gpu_run\n{code}\ngpu_run.main()"
    command = [sys.executable, "-c", code, "--out", str(tmp_path / "out"), *options]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    variables.pop("TRITON_INTERPRET", None)
    with open(tmp_path / "log", "w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=log)


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def ends(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{process}/stat").read_text().split()[2] == "Z"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_ends_in_the_middle_loses_nothing(tmp_path, how):
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    (tmp_path / "sleeper.py").write_text(code)
    writer = tmp_path / "writer.py"
    writer.write_text("import sys; open(sys.argv[1] + '/rows.json', 'w').write('[1]')")
    steps = (("writes", 60, (f"{writer} {{work}}",)), ("sleeps", 60, (f"{tmp_path}/sleeper.py",)))
    run = started(
        tmp_path,
        "gpu_run.environment = lambda dry: dict(os.environ)\n"
        f"gpu_run.EVERY, gpu_run.STEPS = 0.1, [gpu_run.Step(*step) for step in {steps}]",
    )
    try:
        wait_for(lambda: content(tmp_path / "out").get("logs/sleeps_0.log", "").strip())
    finally:
        run.send_signal(how)
        run.wait(30)
    found = content(tmp_path / "out")
    assert found["rows.json"] == "[1]" and "writes: done" in found["summary.txt"]
    sleeper = int(found["logs/sleeps_0.log"].split()[0])
    if how == signal.SIGKILL:  # it ends with its time
        os.kill(sleeper, signal.SIGKILL)
    wait_for(lambda: ends(sleeper), 20)


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")


@needs_triton
@pytest.mark.slow
@pytest.mark.slow_cpu
@pytest.mark.timeout(600)
def test_every_command_of_the_plan_runs_and_writes_its_files(tmp_path):
    """With tiny shapes and without a GPU: see dry.py."""
    run = started(tmp_path, "", "--dry")
    run.wait()
    log = (tmp_path / "log").read_text()
    assert run.returncode == 0, log[-5000:]
    found = content(tmp_path / "out")
    summary = found["summary.txt"].splitlines()
    commands = [step.name for step in gpu_run.STEPS for _ in step.commands]
    assert [line.partition(":")[0] for line in summary[: len(commands)]] == commands
    assert all(": done in " in line for line in summary[: len(commands)])

    results = {name: json.loads(text) for name, text in found.items() if name.endswith(".json")}
    stages, tuned = results["stages.json"], results["tuned/stages.json"]
    kernels, tiles = results["kernels.json"], results["tiles.json"]
    # The rates are measured once.
    rates = results["rates.json"]
    assert rates["l2_read_gbs"] >= 0 and set(rates["matmul_tflops"]) > {"tf32", "bfloat16"}
    assert all(one["measured"] == rates for one in (stages, tuned, kernels))
    assert {row["backend"] for row in stages["rows"]} >= {"triton", "eager", "bmm"}
    assert {row["graph"] for row in stages["rows"]} == {False, True}
    assert [note for note in tuned["notes"] if "REPMTL_TILES=own.json" in note]
    assert not any("REPMTL_TILES" in note for note in stages["notes"])
    # The compiled rivals came to the rows of the step before.
    ways = [(r["function"], r["backend"], r["direction"], r["graph"]) for r in kernels["rows"]]
    assert len(set(ways)) == len(ways)
    assert {way[:2] for way in ways} >= {
        ("tsr_loss", "triton"), ("rep_mtl_loss", "triton"), ("rep_mtl_loss", "reference_compiled")
    }  # fmt: skip
    assert {(row["kernel"], row["shape"]) for row in tiles["rows"]} == {
        (kernel, shape) for kernel in ("gram", "gradient") for shape in ("nyuv2", "cityscapes")
    }
    assert all(not row["error"] for one in (stages, kernels, tiles) for row in one["rows"])
    lines = [line for line in found["targets.md"].splitlines() if line.startswith("| ")]
    measured = [line for line in lines if not line.endswith("not measured |")]
    assert len(measured) > 2 and all(line in log for line in measured)
    for tests in ("first_tests", "other_tests"):
        assert 'failures="0"' in found[f"{tests}.xml"] and "test_cuda" in found[f"{tests}.xml"]
    assert " kernels; " in found["logs/build_1.log"]
