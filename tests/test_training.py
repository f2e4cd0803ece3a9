"What crosses processes: a killed run, two processes, a read-only folder."
import json, os, signal, subprocess, sys, time
from pathlib import Path
import pytest
import torch
import processes
from processes import CLI
from puma_nb.cli import main
from puma_nb.training.log import read_log

EXACT = (
    "step", "loss", "text", "f0", "f1", "f2", "f3", "f4", "denoise", "square", "grad_norm", "lr",
)


def command(*argv):
    return [sys.executable, "-m", "puma_nb.cli", *map(str, argv)]


def exact(path):
    return [{k: r[k] for k in EXACT if k in r} for r in read_log(path)]


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    "A pico system with encoder, autoencoder and decoders."
    out = tmp_path_factory.mktemp("system")
    for stage in ("encoder", "autoencoder", "decoders"):
        argv = ["train", "--preset", "pico", "--stage", stage, "--out", str(out), "--quiet"]
        assert main(argv) == 0
    return out


def copy(system, target):
    import shutil
    shutil.copytree(system, target)
    return target


def test_sigkill_and_resume_bit_for_bit(system, tmp_path):
    "A pretraining killed in the middle continues its log exactly as the undisturbed run wrote it."
    straight, killed = copy(system, tmp_path / "straight"), copy(system, tmp_path / "killed")
    # 800 steps, a checkpoint every 400
    argv = (
        "train", "--preset", "pico", "--stage", "pretrain", "--scale-steps", 200, "--quiet",
        "--out",
    )
    assert processes.run(CLI, (*argv, straight), tmp_path / "said").returncode == 0
    process = processes.start(CLI, (*argv, killed), tmp_path / "killed_said")
    log, deadline = killed / "pretrain" / "log.jsonl", time.time() + 300
    # wait until it is past its first checkpoint, and not at a checkpoint
    while time.time() < deadline and process.is_alive():
        if (
            log.exists()
            and (rows := log.read_text().splitlines())
            and json.loads(rows[-1])["step"] >= 500
        ):
            break
        time.sleep(0.02)
    assert process.is_alive(), "it finished before it could be killed"
    process.kill()
    process.join()
    assert not (killed / "pretrain" / "stage.json").exists()
    assert processes.run(CLI, (*argv, killed, "--resume"), tmp_path / "said").returncode == 0
    assert exact(log) == exact(straight / "pretrain" / "log.jsonl")
    one, other = (f / "pretrain" / "model.safetensors" for f in (killed, straight))
    assert one.read_bytes() == other.read_bytes()


def test_sigterm_saves_and_says_so(system, tmp_path):
    out = copy(system, tmp_path / "run")
    argv = ("train", "--preset", "pico", "--stage", "pretrain", "--scale-steps", 500, "--quiet")
    process = subprocess.Popen(
        command(*argv, "--out", out),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )
    log, deadline = out / "pretrain" / "log.jsonl", time.time() + 300
    while time.time() < deadline and not (log.exists() and len(log.read_text().splitlines()) >= 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "--resume" in said.strip().splitlines()[-1]
    assert "Traceback" not in said
    assert list((out / "pretrain" / "checkpoints").glob("step_*"))


WORKER = """
import sys, torch
from puma_nb.data.order import *
from puma_nb.data.segments import *
from puma_nb.models.autoencoder import *
from puma_nb.models.decoders import *
from puma_nb.models.mllm import *
from puma_nb.models.pyramid import *
from puma_nb.presets import *
from puma_nb.recipes.autoencoder import *
from puma_nb.recipes.decoders import *
from puma_nb.recipes.mllm import *
from puma_nb.training.launch import *
from puma_nb.training.task import *
from puma_nb.world.drawing import *
from puma_nb.world.samples import *
from transformers import PreTrainedTokenizerFast
import numpy as np
torch.set_num_threads(1)
preset, kind, root, out = get_preset("pico"), *sys.argv[1:]
encoder, stats = load_encoder(root, "cpu"), load_stats(root)
torch.manual_seed(0)
if kind == "mllm":
    tokenizer = PreTrainedTokenizerFast.from_pretrained(root + "/tokenizer")
    samples = dict(t2i=world_samples("t2i", 16), caption=world_samples("caption", 16))
    sets, store = prepare_samples(samples, tokenizer, encoder, stats)
    model = build_mllm(preset, tokenizer, stats)
    task = MLLMTask(preset, model, tokenizer, sets, dict(t2i=1, caption=1), store)
elif kind == "mixed":  # steps in which one process has pictures only and the other words only
    tokenizer = PreTrainedTokenizerFast.from_pretrained(root + "/tokenizer")
    sets, store = prepare_samples(dict(t2i=world_samples("t2i", 16)), tokenizer, encoder, stats)
    words = ("a red circle", "a cross at the top", "nothing but words", "b")
    sets["words"] = [[text_segment(t, True)] for t in words]
    model = build_mllm(preset, tokenizer, stats)
    task = MLLMTask(preset, model, tokenizer, sets, dict(t2i=1, words=1), store)
    kinds = [mixture_ids([2 * k, 2 * k + 1], task.shares) for k in range(8)]
    assert any(len(set(k)) == 2 for k in kinds)
    assert any(set(k) == {"words"} for k in kinds)
    assert any(set(k) == {"t2i"} for k in kinds)
elif kind == "autoencoder": task = AutoencoderTask(preset)
else:
    decoder = build_decoder(preset, 2)
    latents = load_latents(root, "cpu")
    images = world_images(preset)[0]
    data = decoder_data(preset, encoder, latents, images, stats)
    task = DecoderTask(preset, decoder, data, (2,))
accelerator = make_accelerator("cpu", bf16=False)
wrapped = accelerator.prepare(Losses(task))
size = 2 if kind == "mixed" else 12
for step in range(48 // max(size, 6)):
    # long and short pyramids; gradients add up
    log = train_step(accelerator, task, wrapped, np.arange(size * step, size * step + size), step)
if accelerator.is_main_process:
    found = dict(
        processes=accelerator.num_processes, kind=str(accelerator.distributed_type),
        loss=float(log["loss"]),
        grads={n: p.grad for n, p in task.model.named_parameters() if p.grad is not None},
    )
    torch.save(found, out)
end_processes()
"""


@pytest.mark.parametrize("kind", ["mllm", "mixed", "autoencoder", "decoder"])
def test_two_processes_give_the_gradient_of_one(kind, system, tmp_path):
    "Ragged sequences, or noisy latents, split over two real processes: same loss, same gradient."
    script, results = tmp_path / "worker.py", {}
    script.write_text(WORKER)
    for n in (1, 2):
        target = tmp_path / f"{n}.pt"
        done = processes.run(script, (kind, system, target), tmp_path / "said", n)
        assert done.returncode == 0, done.stderr[-2000:]
        results[n] = torch.load(target, weights_only=True)
    assert results[2]["processes"] == 2 and "MULTI_CPU" in results[2]["kind"]
    assert results[1]["loss"] == pytest.approx(results[2]["loss"], rel=1e-5)
    assert results[1]["grads"].keys() == results[2]["grads"].keys()
    flat = lambda grads: torch.cat([g.flatten() for _, g in sorted(grads.items())])
    whole, parts = flat(results[1]["grads"]), flat(results[2]["grads"])
    assert (whole - parts).norm() <= 1e-5 * whole.norm()


def test_every_stage_trains_in_two_processes(tmp_path):
    "`torchrun -m puma_nb.cli train`: all stages end, one process saves, and the system decodes."
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
            "-m", "puma_nb.cli", "train", "--preset", "pico", "--out", str(tmp_path / "two"),
            "--quiet", "--device", "cpu", "--checkpointing",
        ],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("system: ") == 1  # one process speaks
    reports = {
        s: json.loads((tmp_path / "two" / s / "stage.json").read_text())
        for s in ("encoder", "autoencoder", "decoders", "pretrain", "instruct")
    }
    assert reports["pretrain"]["speed"]["processes"] == 2
    assert main(["demo", "--model", str(tmp_path / "two"), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "demo.png").exists()


def test_accumulation_to_the_end(system, tmp_path):
    "A stage in four pieces a step: the losses of whole steps, a report, a model that can be used."
    whole, pieces = copy(system, tmp_path / "whole"), copy(system, tmp_path / "pieces")
    argv = ["train", "--preset", "pico", "--stage", "pretrain", "--float32", "--quiet", "--out"]
    assert main([*argv, str(whole)]) == 0
    assert main([*argv, str(pieces), "--accumulate", "4"]) == 0
    rows = [read_log(folder / "pretrain" / "log.jsonl") for folder in (whole, pieces)]
    for a, b in zip(*rows, strict=True):
        for k in ("loss", "text", "grad_norm"):
            assert a[k] == pytest.approx(b[k], rel=1e-4)
    assert "speed" in json.loads((pieces / "pretrain" / "stage.json").read_text())
    assert main(["generate", "a cross", "--model", str(pieces), "--out", str(tmp_path)]) == 0


def a_real_set(folder, n=12):
    "Pictures with a question and an answer each, in the layout of the card `llavar`."
    import numpy as np
    from PIL import Image
    folder.mkdir()
    talks, rng = [], np.random.default_rng(0)
    for k in range(n):
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(folder / f"{k}.png")
        turns = [("human", "<image>\nwhat is there?"), ("gpt", f"picture number {k}")]
        told = [{"from": who, "value": said} for who, said in turns]
        talks.append(dict(image=f"{k}.png", conversations=told))
    (folder / "talk.json").write_text(json.dumps(talks))
    return folder


def test_real_data_over_processes(system, tmp_path):
    "`--data` in two processes: the losses of one, every row read, one report."
    data, ends = a_real_set(tmp_path / "set"), {}
    for n in (1, 2):
        out = copy(system, tmp_path / f"system{n}")
        argv = (
            "train", "--preset", "pico", "--stage", "pretrain", "--data", f"llavar={data}",
            "--float32", "--quiet", "--ahead", "0", "--device", "cpu", "--out", out,
        )
        done = processes.run(CLI, argv, tmp_path / f"said{n}", n)
        assert done.returncode == 0, done.stderr[-2000:]
        ends[n] = read_log(out / "pretrain" / "log.jsonl")
        read = json.loads((out / "pretrain" / "stage.json").read_text())["data"]
        assert list(read) == ["llavar"]
    for a, b in zip(ends[1], ends[2], strict=True):
        assert a["text"] == pytest.approx(b["text"], rel=1e-4)


@pytest.mark.parametrize(
    "argv",
    [
        ("generate", "   "),
        ("generate", "a cross", "--scale", "f7"),
        ("reconstruct", "missing.png"),
        ("reconstruct", "broken.png"),
        ("ask", "broken.png", "what?"),
        ("edit", "missing.png", "make it red"),
        ("train", "--preset", "huge"),
        ("train", "--preset", "paper"),
        ("train", "--preset", "base"),
        ("plan", "--gpus", "0"),
        ("train", "--stage", "nothing"),
        ("eval", "--table", "9"),
        ("nonsense",),
        ("demo", "--out", "file/inside"),
    ],
)
def test_bad_input_is_one_line_and_code_2(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    Path("file").write_text("not a folder")
    assert main(list(argv)) == 2
    said = capsys.readouterr().err.strip()
    assert said and len(said.splitlines()) == 1 and "Traceback" not in said
