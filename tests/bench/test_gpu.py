"""`bench/gpu.py`: order and time of parts, what is skipped or gone on with, how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gpu
import gpu_files
import gpu_preflight
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

# A part that does what its "script" says: exits, sleeps, dies, raises, leaves children behind.
PART = """
import json, os, pathlib, subprocess, sys, time
name = pathlib.Path(__file__).stem[4:]
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
seconds = int(sys.argv[sys.argv.index("--seconds") + 1])
found = json.loads(out.read_text()) if out.is_file() else {"results": []}
content = {"state": json.loads(os.environ["STATE"]), "results": found["results"], "left_out": 0}
content["results"].append({"seconds": seconds, "cache": os.environ["TRITON_CACHE_DIR"]})
def write(): out.write_text(json.dumps(content))
exec(json.loads(os.environ["SCRIPTS"]).get(name, "write()"))
"""


class Suite:
    """A folder of such parts, and runs of them."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.out, self._patch = folder / "out", patch
        for part in gpu.SHARES:
            (folder / f"gpu_{part}.py").write_text(PART)
        patch.setattr(gpu, "HERE", folder)
        patch.setattr(sys, "argv", ["gpu.py"])
        patch.setattr(gpu_files, "state", lambda rehearse: self.state)
        patch.setattr(gpu_preflight, "refusal", lambda rehearse: "")
        patch.setenv("OUT", str(self.out))
        patch.setenv("TRITON_CACHE_DIR", str(folder / "kernels"))
        self.state = {"source": "a", "gpu": "b"}

    def run(self, parts: str = "", minutes: float = 9, **scripts: str) -> int:
        self._patch.setenv("PARTS", parts)
        self._patch.setenv("MINUTES", str(minutes))
        self._patch.setenv("SCRIPTS", json.dumps(scripts))
        self._patch.setenv("STATE", json.dumps(self.state))
        return gpu.main()

    def content(self, part: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / f"{part}.json").read_text())
        return found


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    return Suite(tmp_path, monkeypatch)


def test_all_parts_run_in_order_and_share_the_time_that_is_left(
    suite: Suite, capfd: pytest.CaptureFixture[str]
) -> None:
    assert suite.run() == 0
    lines = capfd.readouterr().out.splitlines()
    begun = [line.partition(":")[0] for line in lines if line.endswith("s at most")]
    assert begun == ["smoke", "tests", "profile", "kernels", "engine", "tune"]
    seconds = [suite.content(part)["results"][0]["seconds"] for part in gpu.SHARES]
    assert seconds[0] in (44, 45)
    assert seconds[1] > 130  # what smoke did not take is shared
    assert 500 < seconds[-1] <= 540
    assert lines[-1] == "all right"
    assert "profile: done; 1 results in profile.json" in lines


def test_a_complete_part_is_left_alone_unless_it_is_asked_for(
    suite: Suite, capfd: pytest.CaptureFixture[str]
) -> None:
    suite.run("smoke,tests", tests="content['failures'] = ['x is wrong']; write(); sys.exit(1)")
    assert suite.run("", 9) == 1  # tests failed, and still do
    said = capfd.readouterr().out
    assert "tests: failed; 1 results in tests.json; wrong: x is wrong (before)" in said
    assert "WRONG: tests" in said
    assert len(suite.content("kernels")["results"]) == 1
    assert suite.run("tests") == 0
    assert len(suite.content("tests")["results"]) == 1  # from the start


def test_a_part_that_was_cut_short_goes_on(suite: Suite) -> None:
    cut = "content['left_out'] = 3; write()"
    assert suite.run("kernels", kernels=cut) == 0
    assert not suite.content("kernels")["complete"]
    assert suite.run("kernels", kernels=cut) == 0
    suite.run()
    assert len(suite.content("kernels")["results"]) == 3
    assert suite.content("kernels")["complete"]


def test_results_of_other_code_are_made_anew(suite: Suite) -> None:
    suite.run("smoke")
    suite.state = {"source": "changed", "gpu": "b"}
    suite.run("smoke,tests", tests="write(); os._exit(9)")
    suite.run()
    assert len(suite.content("smoke")["results"]) == 1
    assert len(suite.content("tests")["results"]) == 2


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("os.abort()", "tests: failed with status -6; no results"),
        ("write(); os.kill(os.getpid(), 9)", "tests: failed with status -9; 1 results"),
        ("raise SystemExit(2)", "tests: failed with status 2; no results"),
        (
            "content.update(crashed='x', failures=['engine: Traceback\\n  in y\\nKeyError: 3'])\n"
            "write(); sys.exit(1)",
            "tests: failed; 1 results in tests.json; wrong: engine: Traceback KeyError: 3",
        ),
    ],
)
def test_a_part_that_dies_costs_no_other(
    suite: Suite, capfd: pytest.CaptureFixture[str], script: str, said: str
) -> None:
    assert suite.run("tests,kernels", tests=script) == 1
    found = capfd.readouterr().out
    assert said in found
    assert "kernels: done" in found
    assert "WRONG: tests\n" in found
    assert not gpu_files.read(suite.out / "tests.json").get("complete")


def test_an_old_file_is_not_taken_for_the_results_of_a_part_that_never_wrote(suite: Suite) -> None:
    suite.run("tests", tests="content['left_out'] = 3; write()")
    assert suite.run("tests", tests="sys.exit(1)") == 1
    assert not suite.content("tests")["complete"]
    suite.run("tests")
    assert suite.run("tests", tests="sys.exit(1)") == 1
    assert not (suite.out / "tests.json").exists()


def test_a_part_that_hangs_is_ended_with_all_it_started(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "GRACE", 1)
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])"
    script = f"content['child'] = {child}.pid; write(); time.sleep(99)"
    assert suite.run("tests,kernels", minutes=0.2, tests=script) == 1
    assert "tests: ended for time; 1 results in tests.json" in capfd.readouterr().out
    assert suite.content("tests")["exit_status"] == gpu.ENDED
    pid = suite.content("tests")["child"]
    assert soon(lambda: has_ended(pid))


def has_ended(pid: int) -> bool:
    """Also if whoever inherited it has not noticed."""
    path = Path(f"/proc/{pid}/stat")
    return not path.exists() or path.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_part_without_time_does_not_begin(
    suite: Suite, capfd: pytest.CaptureFixture[str]
) -> None:
    assert suite.run("smoke,tests", minutes=0.2) == 0  # 12 s: 3 of them for smoke
    assert not (suite.out / "smoke.json").exists()
    assert "all right; no time for smoke" in capfd.readouterr().out


def test_slow_cases_are_counted(suite: Suite, capfd: pytest.CaptureFixture[str]) -> None:
    suite.run("kernels", kernels="content['slow'] = [1, 2]; write()")
    assert "kernels: done; 1 results in kernels.json; 2 slow" in capfd.readouterr().out


def test_kernels_are_packed_and_come_back(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_one = (
        "folder = pathlib.Path(os.environ['TRITON_CACHE_DIR']) / name.upper(); folder.mkdir()\n"
        "(folder / 'x.cubin').write_bytes(b'code'); write()"
    )
    suite.run("smoke,tune", smoke=compile_one, tune=compile_one)
    assert (suite.out / "cache-0.tar.gz").is_file()
    fresh = suite.out.parent / "elsewhere"
    monkeypatch.setenv("FROM", str(suite.out))
    monkeypatch.setenv("OUT", str(fresh))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(fresh / "kernels"))
    seen = "content['found'] = os.listdir(os.environ['TRITON_CACHE_DIR']); write()"
    suite.out = fresh
    assert suite.run("", tests=seen) == 0
    assert suite.content("tests")["found"] == ["SMOKE"]  # tune's are not worth their way
    assert (fresh / "smoke.json").is_file()  # complete: taken over


def begun(suite: Suite, tmp_path: Path) -> subprocess.Popen[bytes]:
    """A run in a process of its own, with a part that runs for long and has written its pid."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(gpu.__file__).parent)!r})\n"
        "import gpu, pathlib; gpu.gpu_preflight.refusal = lambda rehearse: ''\n"
        f"gpu.HERE = pathlib.Path({str(tmp_path)!r}); sys.exit(gpu.main())"
    )
    script = "content['pid'] = os.getpid(); write(); time.sleep(99)"
    environment = {
        **os.environ,
        **{"PARTS": "tests", "SCRIPTS": json.dumps({"tests": script}), "STATE": "{}"},
    }
    running = subprocess.Popen([sys.executable, "-c", code], env=environment)
    assert soon(lambda: bool(gpu_files.read(suite.out / "tests.json")))
    return running


def soon(is_so: Callable[[], bool]) -> bool:
    """Whether something comes true within a minute."""
    for _ in range(600):
        if is_so():
            return True
        time.sleep(0.1)
    return False


def test_an_end_from_outside_ends_the_part(suite: Suite, tmp_path: Path) -> None:
    running = begun(suite, tmp_path)
    running.terminate()
    assert running.wait(30) == 143
    assert not Path(f"/proc/{suite.content('tests')['pid']}").exists()


def test_no_two_runs_write_to_one_folder(
    suite: Suite, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    running = begun(suite, tmp_path)
    before = suite.content("tests")
    assert suite.run("tests") == 2
    assert capfd.readouterr().err == f"another run is writing to OUT={suite.out}\n"
    running.kill()  # it can do nothing about it: the part ends all the same
    running.wait()
    assert soon(lambda: suite.run("smoke") == 0)
    assert has_ended(before["pid"])
    assert suite.content("tests") == before


def test_what_it_does_not_know_is_refused(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert suite.run("tests,kernel") == 2
    monkeypatch.setenv("FROM", "/nowhere")
    assert suite.run("tests") == 2
    said = capsys.readouterr().err
    known = "smoke, tests, profile, kernels, engine, tune"
    assert f"unknown part 'kernel'; PARTS may name {known}" in said
    assert "FROM=/nowhere is no folder" in said


def test_without_a_gpu_nothing_runs(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, str(Path(gpu.__file__)), *sys.argv[1:]]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("no GPU: ")
    assert done.stdout == ""
    assert not suite.out.exists()


def test_what_is_wrong_is_not_measured_unless_it_is_asked_for(
    suite: Suite, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = "content['failures'] = ['off by 3']; write(); sys.exit(1)"
    others = "tests,profile,kernels,engine,tune"
    for _ in range(2):  # the second time it is known before
        assert suite.run(smoke=wrong) == 1
        lines = capfd.readouterr().out.splitlines()
        assert lines[-2] == f"what is wrong is not measured; all the same: PARTS={others}"
        assert lines[-1] == f"WRONG: smoke; left out: {others.replace(',', ', ')}"
        assert not (suite.out / "tests.json").exists()
    assert suite.run("smoke,tests", smoke=wrong) == 1
    assert (suite.out / "tests.json").exists()


def test_a_smoke_that_is_only_slow_stops_nothing(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "GRACE", 0)
    assert suite.run(minutes=1.3, smoke="write(); time.sleep(99)") == 1
    assert (suite.out / "tests.json").exists()


def test_what_is_missing_and_left_out_is_said_first(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_preflight, "spared", lambda: (["pytest"], "missing: pytest"))
    assert suite.run("smoke,tests") == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "missing: pytest"
    assert lines[-1] == "all right; left out: tests"
    assert not (suite.out / "tests.json").exists()


def test_what_is_not_gone_on_with_is_said(suite: Suite, capfd: pytest.CaptureFixture[str]) -> None:
    suite.run("smoke")
    suite.state = {**suite.state, "tests": "lora"}
    suite.run("tests")
    line = f"{suite.out}/smoke.json is not gone on with: it is of other TESTS"
    assert line in capfd.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("why", "said"),
    [
        ("3 shapes differ:\n  a\n  in all of b\n", "3 shapes differ: in all of b"),
        ("lora: Traceback (most recent call last):\n  in y\nKeyError: 3", "KeyError: 3"),
        ("batch 4: ours differs by 3%\n  more", "batch 4: ours differs by 3%"),
        ("test_x failed: " + "x" * 500, "test_x failed: " + "x" * 222 + "..."),
    ],
)
def test_a_reason_is_not_cut_where_it_begins(why: str, said: str) -> None:
    assert gpu.short(why).endswith(said)
