"""Killed again and again, in saves too, a run ends in the weights of one that was left alone.

Runs are forked (processes.py) and start in no time, so that dozens of kills fit into a few minutes.
Each has one thread. By hand, over a longer run:

    python tests/test_faults.py --stage pretrain --scale_steps 0.1 --kills 1 --model DIR
"""
import argparse, os, random, shutil, signal, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest
import processes
from processes import CLI
from puma_nb.training.log import read_log

KILLS = 50
LANES = 2  # runs beside each other, with a thread each
# what a clock says
SPEED = {"samples_per_second", "tokens_per_second", "data_share", "memory_gb", "mfu", "seconds"}


def start(argv):
    "Begin a run; the files beside its folder are for what it says."
    said = Path(argv[argv.index("--out") + 1]).with_suffix(".said")
    return processes.start(CLI, argv, said)


def ends(process, patience=1800):
    "Wait for a run that nobody kills."
    process.join(patience)
    assert process.exitcode == 0, "see the .said files beside the folder"


def unfinished(folder):
    "What is being written: files and folders under temporary names."
    try: return {str(p) for p in Path(folder).rglob("*.tmp")}
    except FileNotFoundError:
        return set()  # a folder was renamed while we looked


def held(process, folder, before):
    "Hold the process if it is writing something; whether it is."
    if not unfinished(folder) - before: return False
    os.kill(process.pid, signal.SIGSTOP)
    if unfinished(folder) - before: return True
    os.kill(process.pid, signal.SIGCONT)
    return False


def kill_often(argv, folder, kills, longest, seed=0):
    "Start, kill, resume ...; then let it end. Returns (kills, those in the middle of a save)."
    rng, struck, in_save = random.Random(seed), 0, 0
    while struck < kills:
        before, at_save, wait = unfinished(folder), struck % 2 == 1, rng.uniform(.05, longest)
        process = start([*argv, "--resume"])
        deadline = time.time() + wait
        while process.is_alive() and time.time() < deadline: time.sleep(.002)
        while (
            at_save
            and process.is_alive()
            and time.time() < deadline + 3
            and not held(process, folder, before)
        ):
            pass  # the next save, as soon as it begins
        if not process.is_alive():  # it came to its end: the rest is for the caller
            ends(process)
            return struck, in_save
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        struck += 1
        in_save += bool(unfinished(folder) - before)  # what this kill left behind
        for left in unfinished(folder):
            if Path(left).is_dir() and rng.random() < .5:
                shutil.rmtree(left)  # half of it stays
    ends(start([*argv, "--resume"]))
    return struck, in_save


def without_speed(log):
    "The log's rows without what a clock says."
    return [{k: v for k, v in r.items() if k not in SPEED} for r in read_log(log)]


def same(a, b):
    "Both folders hold the same weights, bit for bit, and the same logs but for what a clock says."
    names = [sorted(str(p.relative_to(x)) for p in Path(x).rglob("*.safetensors")) for x in (a, b)]
    assert names[0] == names[1] and names[0]
    for n in names[0]:
        assert (Path(a) / n).read_bytes() == (Path(b) / n).read_bytes(), n
    for log in Path(a).rglob("log.jsonl"):
        assert without_speed(log) == without_speed(Path(b) / log.relative_to(a)), log
    return len(names[0])


@pytest.mark.slow
def test_fifty_kills_change_nothing(tmp_path):
    "Every stage of pico, killed at random moments; every second kill strikes during a save."
    argv = (
        "train", "--preset", "pico", "--scale-steps", 8, "--save-every", 3, "--quiet", "--device",
        "cpu", "--out",
    )
    begun = time.time()
    ends(start([*argv, tmp_path / "straight"]))
    longest = (time.time() - begun) / 4

    def killed(lane):
        "(kills, those in a save) of one run after the other, until a lane's share is reached."
        struck, in_save, k = 0, 0, 0
        while struck < KILLS / LANES or in_save < 3 and k < 10:
            out = tmp_path / f"killed{lane}_{k}"
            out.mkdir()
            kills = max(6, KILLS // LANES - struck)
            counts = kill_often([*argv, out], out, kills, longest, seed=10 * lane + k)
            same(tmp_path / "straight", out)
            struck, in_save, k = struck + counts[0], in_save + counts[1], k + 1
        return struck, in_save

    with ThreadPoolExecutor(LANES) as lanes:
        struck, in_save = map(sum, zip(*lanes.map(killed, range(LANES))))
    print(f"{struck} kills, {in_save} of them in a save")
    assert struck >= KILLS and in_save >= 5


def main():
    p = argparse.ArgumentParser(
        description="Kill a run, resume it, compare with one that was left alone."
    )
    for name, default in (
        ("preset", "nano"),
        ("stage", "pretrain"),
        ("scale_steps", 0.1),
        ("kills", 1),
        ("model", None),
        ("longest", 60.0),
        ("work", "kills"),
    ):
        kind = type(default) if default is not None else str
        p.add_argument(f"--{name}", default=default, type=kind)
    a = p.parse_args()
    home = Path(a.work)
    for x in ("straight", "killed"):
        (home / x).mkdir(parents=True)
        if a.model:
            shutil.copytree(
                a.model, home / x, dirs_exist_ok=True, ignore=shutil.ignore_patterns(a.stage)
            )
    argv = (
        "train", "--preset", a.preset, "--stage", a.stage, "--scale-steps",
        a.scale_steps, "--save-every",
        50, "--quiet", "--out",
    )
    ends(start([*argv, home / "straight"]))
    struck, in_save = kill_often([*argv, home / "killed"], home / "killed", a.kills, a.longest)
    files = same(home / "straight", home / "killed")
    print(
        f"{struck} kills, {in_save} in a save; "
        f"{files} files of weights are the same, and so are the logs"
    )


if __name__ == "__main__": main()
