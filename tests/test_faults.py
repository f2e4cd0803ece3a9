"""Killed again and again, in the middle of saves too, a run ends in the weights of one that was left alone.

A forked server holds the imports, so that a run starts in no time and dozens of kills fit into a minute or two.
By hand, over a longer run: python tests/test_faults.py --preset nano --stage pretrain --stretch 0.1 --kills 1 --model DIR
"""
import argparse, multiprocessing, os, random, shutil, signal, time
from pathlib import Path
import pytest
from puma_nb.training import read_log

KILLS = 50
SPEED = {"samples_per_second", "tokens_per_second", "data_share", "memory_gb", "mfu", "seconds"}  # what a clock says


def start(argv, threads):
    "A run in a process of its own; what it says goes to a file beside its folder."
    said = Path(argv[argv.index("--out") + 1]).with_suffix(".said")
    def work():
        import torch
        text = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND); os.dup2(text, 1); os.dup2(text, 2)
        torch.set_num_threads(threads)
        from puma_nb.cli import main
        os._exit(main(list(map(str, argv))))
    context = multiprocessing.get_context("fork")
    process = context.Process(target=work); process.start()
    return process


def saving(folder): return any(Path(folder).rglob("*.tmp"))  # a checkpoint or a file is being written


def kill_often(argv, folder, kills, longest, threads=2, seed=0):
    "Start, kill, resume ...; then let it end. Returns (kills, those in the middle of a save)."
    rng, struck, in_save = random.Random(seed), 0, 0
    while struck < kills:
        process, wait, at_save = start([*argv, "--resume"], threads), rng.uniform(.05, longest), struck % 2 == 1
        deadline = time.time() + wait
        while process.is_alive() and time.time() < deadline: time.sleep(.002)
        while at_save and process.is_alive() and not saving(folder) and time.time() < deadline + 3: pass  # the next save, as soon as it begins
        if not process.is_alive():  # it came to its end: the rest is for the caller
            assert process.exitcode == 0, "see the .said file beside the folder"
            return struck, in_save
        os.kill(process.pid, signal.SIGKILL); process.join()
        struck += 1; in_save += saving(folder)
        for left in Path(folder).rglob("*.tmp"): shutil.rmtree(left) if left.is_dir() and rng.random() < .5 else None  # half of what a kill left behind stays
    process = start([*argv, "--resume"], threads); process.join()
    assert process.exitcode == 0, "see the .said file beside the folder"
    return struck, in_save


def same(a, b):
    "Both folders hold the same weights, bit for bit, and the same logs apart from what a clock says."
    names = [sorted(str(p.relative_to(x)) for p in Path(x).rglob("*.safetensors")) for x in (a, b)]
    assert names[0] == names[1] and names[0]
    for n in names[0]: assert (Path(a) / n).read_bytes() == (Path(b) / n).read_bytes(), n
    for log in Path(a).rglob("log.jsonl"):
        mine, other = ([{k: v for k, v in r.items() if k not in SPEED} for r in read_log(f)] for f in (log, Path(b) / log.relative_to(a)))
        assert mine == other, log
    return len(names[0])


@pytest.mark.slow
def test_fifty_kills_change_nothing(tmp_path):
    "Every stage of pico, killed at random moments; every second kill strikes while something is being written."
    argv = ("train", "--preset", "pico", "--stretch", 8, "--save-every", 3, "--quiet", "--device", "cpu", "--out")
    begun = time.time(); process = start([*argv, tmp_path / "straight"], 2); process.join(); assert process.exitcode == 0
    took, struck, in_save, k = time.time() - begun, 0, 0, 0
    while struck < KILLS:
        out = tmp_path / f"killed{k}"; k += 1; out.mkdir()
        n, s = kill_often([*argv, out], out, KILLS - struck, took / 4, seed=k)
        struck += n; in_save += s
        same(tmp_path / "straight", out)
    print(f"{struck} kills, {in_save} of them in a save, {k} runs")
    assert struck == KILLS and in_save >= 5


def main():
    p = argparse.ArgumentParser(description="Kill a run, resume it, compare with one that was left alone.")
    for name, default in (("preset", "nano"), ("stage", "pretrain"), ("stretch", 0.1), ("kills", 1), ("model", None), ("longest", 60.), ("work", "kills")): p.add_argument(f"--{name}", default=default, type=type(default) if default is not None else str)
    a = p.parse_args(); work = Path(a.work)
    for x in ("straight", "killed"):
        (work / x).mkdir(parents=True)
        if a.model: shutil.copytree(a.model, work / x, dirs_exist_ok=True, ignore=shutil.ignore_patterns(a.stage))
    argv = ("train", "--preset", a.preset, "--stage", a.stage, "--stretch", a.stretch, "--save-every", 50, "--quiet", "--out")
    process = start([*argv, work / "straight"], 2); process.join(); assert process.exitcode == 0
    struck, in_save = kill_often([*argv, work / "killed"], work / "killed", a.kills, a.longest)
    print(f"{struck} kills, {in_save} in a save; {same(work / 'straight', work / 'killed')} files of weights are the same, and so are the logs")


if __name__ == "__main__": main()
