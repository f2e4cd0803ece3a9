"""Processes for tests, forked from a server that holds the imports, so that each starts at once.

What torchrun tells its processes through the environment is told here in the same way; that
torchrun itself starts them is a test of its own in test_training.py.
"""
import multiprocessing, os, runpy, socket, sys, time
from pathlib import Path
from types import SimpleNamespace

CLI = "puma-nb"
PRELOAD = ["puma_nb.cli", "puma_nb.recipes.system", "accelerate", "torch.distributed.fsdp"]


def _work(what, argv, said, env, threads):
    "Run a script, or the command line; what it says goes to two files."
    import torch
    for end, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{said}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), end)
    os.environ.update(env)
    torch.set_num_threads(threads)
    sys.argv = [what, *argv]
    if what != CLI:
        runpy.run_path(what, run_name="__main__")
        return
    from puma_nb.cli import main
    code = main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start(what, argv, said, env=None, threads=1):
    "Begin one process: a script's path, or `CLI`; `said` names its files without their ending."
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOAD)
    process = server.Process(
        target=_work, args=(str(what), list(map(str, argv)), str(said), env or {}, threads)
    )
    process.start()
    return process


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def as_torchrun(rank, processes, port):
    "What torchrun tells the process of this rank."
    return dict(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
        LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )


def wait(started, patience):
    "Wait for all, or for the first that fails; the others are ended then. Its code, or 0."
    deadline = time.time() + patience
    while any(p.is_alive() for p in started) and time.time() < deadline:
        if any(p.exitcode for p in started): break
        time.sleep(.02)
    codes = [p.exitcode for p in started]
    late = time.time() + (5 if any(codes) else 0)  # the others may still want to say why
    for p in started:
        p.join(max(0, late - time.time()))
        if p.is_alive(): p.kill()
        p.join()
    assert any(codes) or None not in codes, f"not ended after {patience} s"
    return next((c for c in codes if c), 0)


def run(what, argv, folder, processes=1, env=None, threads=1, patience=300):
    "Run a script (or the command line) to its end; `folder` takes what it says."
    folder, port, started = Path(folder), free_port(), []
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("said_*"): old.unlink()
    for rank in range(processes):
        told = dict(env or {})
        if processes > 1: told |= as_torchrun(rank, processes, port)
        started.append(start(what, argv, folder / f"said_{rank}", told, threads))
    code = wait(started, patience)
    said = {}
    for end in ("out", "err"):
        said[end] = "".join(f.read_text() for f in sorted(folder.glob(f"said_*.{end}")))
    return SimpleNamespace(returncode=code, stdout=said["out"], stderr=said["err"])
