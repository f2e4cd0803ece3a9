"""The loop over processes: DDP and fully_shard give one process's losses, runs move between them,
configurations are valid."""
import json, os
from types import SimpleNamespace
import pytest
import torch
from processes import run as in_processes
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from accelerate.utils import is_deepspeed_available
from safetensors.torch import load_file
from puma_nb.models.decoders import build_decoder
from puma_nb.models.mllm import build_mllm
from puma_nb.presets import get_preset
from puma_nb.recipes.decoders import DecoderTask
from puma_nb.recipes.mllm import MLLMTask
from puma_nb.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from puma_nb.training.launch import _tell_fsdp, accelerate_config
from puma_nb.training.log import read_log
from puma_nb.training.loop import Run, replay
from puma_nb.training.task import Losses, Task

WORKER = """
import json, sys, torch
from dataclasses import replace
from puma_nb.core import *
from puma_nb.models.mllm import *
from puma_nb.models.pyramid import *
from puma_nb.presets import *
from puma_nb.recipes.mllm import *
from puma_nb.training.checkpoint import *
from puma_nb.training.launch import *
from puma_nb.training.loop import *
from puma_nb.training.task import *
from puma_nb.world.samples import *
import puma_nb.training.loop as loop
from accelerate.state import PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from transformers import PreTrainedTokenizerFast
torch.set_num_threads(1)
# accelerate divides models on GPUs only: tell it that these processes count
def fsdp2_on_cpu(device=None, bf16=True):
    a = make_accelerator(device, bf16)
    assert "FSDP" not in str(a.distributed_type)  # what was said below does not last
    a.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    a.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # as accelerate does
    return a
# the same for DeepSpeed, which must also be told that the connections are there
def zero3_on_cpu(device=None, bf16=True):
    import deepspeed
    a, plugin = make_accelerator(device, bf16), DeepSpeedPlugin()
    deepspeed.comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    plugin.set_mixed_precision("no")
    a.state.deepspeed_plugins = plugin
    plugin.select(_from_accelerator_state=True)
    a.state.distributed_type = DistributedType.DEEPSPEED
    PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    return a
root, out, how, steps = *sys.argv[1:4], int(sys.argv[4])
preset = get_preset("pico")
encoder, stats = load_encoder(root, "cpu"), load_stats(root)
tokenizer = PreTrainedTokenizerFast.from_pretrained(root + "/tokenizer")
sets, store = prepare_samples(
    dict(t2i=world_samples("t2i", 32), caption=world_samples("caption", 32)),
    tokenizer, encoder, stats,
)
torch.manual_seed(0)
task = MLLMTask(
    preset, build_mllm(preset, tokenizer, stats), tokenizer, sets, dict(t2i=1, caption=1), store
)
makers = dict(fsdp2=fsdp2_on_cpu, zero3=zero3_on_cpu)
loop.make_accelerator = makers.get(how, make_accelerator)
stage = replace(
    preset.stages["pretrain"], steps=20, batch=12, ema=0.0 if "zero" in how else 0.9,
    checkpointing=how.endswith("recompute"),
)
class Halfway(Exception): pass
batch = task.batch
def until(positions, step):
    if step == steps: raise Halfway
    return batch(positions, step)
task.batch = until
run = Run(
    bf16=how == "bf16", save_every=5, shard=how.startswith("shard"),
    accumulate=2 if how == "accumulate" else 1,
)
try:
    fit(task, stage, out, resume=True, device="cpu", log_every=1, progress=False, run=run)
except Halfway: pass
else:
    if is_main(): save_tensors(task.model.state_dict(), out + "/end.safetensors")
kind = loop.make_accelerator("cpu", bf16=False)
found = dict(
    processes=kind.num_processes, kind=str(kind.distributed_type),
    sharded=is_sharded(Losses(task)) if not is_main() else None,
)
sys.stdout.write("\\n" + json.dumps(found) + "\\n")
sys.stdout.flush()
end_processes()
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "A pico encoder and tokenizer."
    from puma_nb.cli import main
    out = tmp_path_factory.mktemp("engine") / "system"
    argv = ["train", "--preset", "pico", "--stage", "encoder", "--out", str(out)]
    assert main([*argv, "--quiet", "--device", "cpu"]) == 0
    return out


def launched(name):
    "What `accelerate launch --config_file` puts into the environment, by its own code."
    file = str(accelerate_config(name))
    args = launch_command_parser().parse_args(["--config_file", file, "script.py"])
    args, *_ = _validate_launch_command(args)
    if args.use_deepspeed:
        fields = ",".join(load_config_from_file(file).deepspeed_config)
        args.deepspeed_fields_from_accelerate_config = fields
    env = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    env = {k: v for k, v in env.items() if k.startswith(("ACCELERATE_", "FSDP_"))}
    env.pop("ACCELERATE_MIXED_PRECISION", None)
    return env | ({"DS_ACCELERATOR": "cpu"} if args.use_deepspeed else {})


def run(root, out, how, processes, steps=99):
    "Train 20 steps (or until `steps`) in so many real processes; asserts that there were as many."
    script = root.parent / "worker.py"
    script.write_text(WORKER)
    told = launched(how) if how in ("fsdp2", "zero3") else {}
    said = out.with_name(out.name + "_said")
    done = in_processes(script, (root, out, how, steps), said, processes, told)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [json.loads(l) for l in done.stdout.splitlines() if l.startswith("{")]
    assert len(said) == processes
    plain = "MULTI_CPU" if processes > 1 else "NO"
    kind = dict(fsdp2="FSDP", zero3="DEEPSPEED").get(how, plain)
    assert all(s["processes"] == processes and s["kind"].split(".")[1] == kind for s in said)
    assert any(s["sharded"] for s in said) == (how.startswith(("shard", "fsdp2")) and processes > 1)
    return read_log(out / "log.jsonl")


@pytest.fixture(scope="module")
def alone(root): return run(root, root.parent / "alone", "plain", 1)


@pytest.mark.parametrize(
    "how,processes",
    [
        ("plain", 2),
        ("shard", 2),
        ("shard recompute", 2),
        ("fsdp2", 2),
        ("accumulate", 1),
        ("accumulate", 2),
    ],
)
def test_first_twenty_losses_are_those_of_one_process(how, processes, root, alone, tmp_path):
    "Losses, each of their terms, the gradient's norm and the averaged weights at the end."
    rows = run(root, tmp_path / "run", how, processes)
    assert len(rows) == len(alone) == 20
    for a, b in zip(alone, rows):
        assert a.keys() == b.keys()
        for k in {"loss", "text", "f4", "f3", "f2", "f1", "f0", "grad_norm"} & a.keys():
            assert a[k] == pytest.approx(b[k], rel=1e-5), (a["step"], k)
    folders = (root.parent / "alone", tmp_path / "run")
    one, other = (load_file(f / "end.safetensors") for f in folders)
    assert one.keys() == other.keys()
    for k in one:
        torch.testing.assert_close(one[k], other[k], rtol=1e-3, atol=1e-5)


def test_bf16_over_processes(root, tmp_path):
    "Half precision rounds, and rounds otherwise in other batches: the losses stay close."
    alone = run(root, tmp_path / "alone", "bf16", 1)
    rows = run(root, tmp_path / "two", "bf16", 2)
    for a, b in zip(alone, rows, strict=True):
        for k in {"loss", "text", "f4", "f3", "f2", "f1", "f0"} & a.keys():
            assert a[k] == pytest.approx(b[k], rel=2e-3), (a["step"], k)


@pytest.mark.skipif(
    not is_deepspeed_available(),
    reason="DeepSpeed is not installed: pip install puma-nb[deepspeed]",
)
def test_zero3_gives_the_losses_of_one_process(root, tmp_path):
    """What zero3.yaml says, on two CPU processes, stopped in the middle and resumed; only stages
    without averaged weights can."""
    alone = run(root, tmp_path / "alone", "plain without zero", 1)
    run(root, tmp_path / "run", "zero3", 2, steps=10)
    kept = (tmp_path / "run" / "checkpoints").glob("step_*")
    assert sorted(p.name for p in kept) == ["step_0000005", "step_0000010"]
    rows = run(root, tmp_path / "run", "zero3", 2)
    assert [r["step"] for r in rows] == list(range(1, 21))
    for a, b in zip(alone, rows):
        for k in {"loss", "text", "f4", "f3", "f2", "f1", "f0", "grad_norm"} & a.keys():
            assert a[k] == pytest.approx(b[k], rel=1e-5), (a["step"], k)
    one, other = (load_file(f / "end.safetensors") for f in (tmp_path / "alone", tmp_path / "run"))
    assert one.keys() == other.keys()
    for k in one:
        torch.testing.assert_close(one[k], other[k], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "first,then",
    [
        (("shard", 2), ("plain", 1)),
        (("fsdp2", 2), ("plain", 1)),
        (("plain", 1), ("shard", 2)),
        (("plain", 2), ("plain", 1)),
    ],
)
def test_a_run_goes_on_with_another_number_of_processes(first, then, root, alone, tmp_path):
    "Ten steps one way, ten another, from the checkpoint in between."
    out = tmp_path / "run"
    run(root, out, *first, steps=10)
    kept = sorted((out / "checkpoints").iterdir())
    assert [p.name for p in kept] == ["step_0000005", "step_0000010"]
    rows = run(root, out, *then)
    assert [r["step"] for r in rows] == list(range(1, 21))
    for a, b in zip(alone, rows):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), a["step"]


def test_configurations_are_what_accelerate_reads():
    "Each file through accelerate's own reader, which refuses unknown keys, and into its plugins."
    found = {n: load_config_from_file(str(accelerate_config(n))) for n in ("ddp", "fsdp2", "zero3")}
    assert {n: c.distributed_type for n, c in found.items()} == dict(
        ddp=DistributedType.MULTI_GPU, fsdp2=DistributedType.FSDP, zero3=DistributedType.DEEPSPEED
    )
    assert all(
        c.mixed_precision == "bf16" and c.num_processes == 8 and not c.use_cpu
        for c in found.values()
    )
    f = found["fsdp2"].fsdp_config
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=f["fsdp_version"],
        reshard_after_forward=f["fsdp_reshard_after_forward"],
        auto_wrap_policy=f["fsdp_auto_wrap_policy"],
        state_dict_type=f["fsdp_state_dict_type"],
        cpu_ram_efficient_loading=f["fsdp_cpu_ram_efficient_loading"],
    )
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert len(f) == 7 and found["zero3"].deepspeed_config["zero_stage"] == 3


@pytest.mark.parametrize("name", ["base", "paper"])
def test_the_layers_that_are_gathered_one_at_a_time(name):
    """accelerate finds what a stage names, and divides at each layer of the language model and each
    block of a decoder."""
    with torch.device("meta"):
        models = {
            MLLMTask: build_mllm(get_preset(name)),
            DecoderTask: build_decoder(get_preset(name), 0),
        }
    for kind, model in models.items():
        task = SimpleNamespace(
            model=model, blocks=lambda: kind.blocks(SimpleNamespace(model=model))
        )
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP"
        )
        _tell_fsdp(plugin, task, Run())
        plugin.set_auto_wrap_policy(Losses(task))
        divided = fsdp2_prepare_auto_wrap_policy(plugin, Losses(task))
        assert len(task.blocks()) > 10
        assert {m for m in model.modules() if divided(m)} == set(task.blocks())
        assert plugin.mixed_precision_policy.reduce_dtype == torch.float32


def test_one_process_cannot_shard(tmp_path, capsys):
    from puma_nb.cli import main
    argv = ["train", "--preset", "pico", "--stage", "encoder", "--out", str(tmp_path / "x")]
    assert main([*argv, "--quiet", "--shard"]) == 2
    assert "torchrun" in capsys.readouterr().err


def test_tensorboard_holds_the_log(tmp_path):
    "Every number of every row is in the event file."
    from puma_nb.cli import main
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    argv = ["train", "--preset", "pico", "--stage", "encoder", "--out", str(tmp_path / "x")]
    assert main([*argv, "--scale-steps", "10", "--quiet", "--tensorboard", "--norms", "20"]) == 0
    events = EventAccumulator(str(tmp_path / "x" / "encoder" / "tensorboard")).Reload()
    rows = read_log(tmp_path / "x" / "encoder" / "log.jsonl")
    assert len(rows) == 2 and any(k.startswith("norm_") for k in rows[0])
    for k in rows[0]:
        if k == "step": continue
        logged = [r[k] for r in rows]
        assert [e.value for e in events.Scalars(k)] == pytest.approx(logged, rel=1e-5)


FULL = """
import resource, signal, sys, threading, time
from pathlib import Path
from puma_nb.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
out, limit = Path(sys.argv[1]), int(sys.argv[2])
def fill():  # once there is a checkpoint, no file may grow beyond the limit
    while not list((out / "encoder" / "checkpoints").glob("step_*5")):
        time.sleep(.001)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
if limit: threading.Thread(target=fill, daemon=True).start()
argv = ["train", "--preset", "pico", "--stage", "encoder", "--scale-steps", "50",
        "--save-every", "5"]
sys.exit(main([*argv, "--quiet", "--device", "cpu", "--resume", "--out", str(out)]))
"""


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    """No file may grow any more, as on a disk that is full: one line, the last checkpoint is whole,
    and the run goes on from it."""
    script = tmp_path / "full.py"
    script.write_text(FULL)
    start = lambda limit: in_processes(script, (tmp_path / "system", limit), tmp_path / "said")
    full = start(20_000)  # less than a checkpoint
    assert (
        full.returncode == 2
        and "the last good one is untouched" in full.stderr
        and "Traceback" not in full.stderr
        and len(full.stderr.strip().splitlines()) == 1
    ), full.stderr
    kept = sorted((tmp_path / "system" / "encoder" / "checkpoints").iterdir())
    assert kept
    assert not any(p.name.endswith(".tmp") for p in kept)
    assert (kept[-1] / "state.json").exists()
    assert start(0).returncode == 0
    rows = read_log(tmp_path / "system" / "encoder" / "log.jsonl")
    assert [r["step"] for r in rows] == list(range(20, 201, 20))


TOY = """
import sys, torch
import torch.distributed as dist
from puma_nb.core import *
from puma_nb.errors import *
from puma_nb.presets import *
from puma_nb.training.checkpoint import *
from puma_nb.training.launch import *
from puma_nb.training.log import *
from puma_nb.training.loop import *
from puma_nb.training.task import *
torch.set_num_threads(1)
class Toy(Task):
    weights = dict(sq=1.0)
    def __init__(self):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(8, 8)
    def batch(self, positions, step):
        x = torch.stack([torch.randn(8, generator=torch_rng("toy", int(p))) for p in positions])
        if step == 3:
            x[[int(p) % 8 == 1 for p in positions]] = float("nan")  # the second process reads it
        return dict(x=x)
    def counts(self, b): return dict(sq=len(b["x"]))
    def losses(self, model, b, step):
        return dict(sq=((model(b["x"]) - 1) ** 2).sum())
stage = StagePreset(
    steps=6, batch=8, lr=0.05, lr_projector=0, warmup=0, schedule="cosine", clip=1.0,
    weight_decay=0.0, ema=0.0,
)
def train(out, resume=False, **run):
    return fit(Toy(), stage, out, 0, resume, "cpu", progress=False, log_every=1, run=Run(**run))
"""


def toy(tmp_path, code, ok=True):
    "Two processes that run `code` after `TOY`."
    script = tmp_path / "toy.py"
    script.write_text(TOY + code)
    done = in_processes(script, (tmp_path,), tmp_path / "said", 2, patience=120)
    assert (done.returncode == 0) == ok, done.stderr[-2000:]
    return done


def test_gradients_are_added_up_once_a_step(tmp_path):
    "However many micro-batches there are; counted by a hook of DDP's."
    done = toy(
        tmp_path,
        """
a, task, n = make_accelerator("cpu", False), Toy(), []
losses = a.prepare(Losses(task))
def hook(state, bucket):
    n.append(1)
    return (
        dist.all_reduce(bucket.buffer().div_(2), async_op=True)
        .get_future()
        .then(lambda f: f.value()[0])
    )
losses.register_comm_hook(None, hook)
found = []
for k in (1, 4):
    n.clear()
    task.model.zero_grad()
    train_step(a, task, losses, range(16), 0, k)
    found.append([len(n), float(task.model.weight.grad.norm())])
if is_main(): sys.stdout.write(f"found {found}\\n")
end_processes()
""",
    )
    said = next(l for l in done.stdout.splitlines() if l.startswith("found"))
    (one, norm), (four, same) = eval(said.removeprefix("found"))
    assert one == four == 1 and same == pytest.approx(norm, rel=1e-5)


def test_processes_that_find_different_checkpoints_stop(tmp_path):
    "As on two nodes without a common disk: one node's folder has a checkpoint, the other's none."
    toy(tmp_path, "train(sys.argv[1] + '/shared', bad_step='skip', save_every=2); end_processes()")
    done = toy(
        tmp_path,
        "train(sys.argv[1] + ('/shared' if is_main() else '/other'), resume=True, bad_step='skip')",
        ok=False,
    )
    assert "different checkpoints" in done.stderr and "steps 6, 0" in done.stderr


def test_a_bad_step_of_two_processes_is_computed_again(tmp_path):
    "The batch that does harm was the second process's; any of the step's files brings back both."
    done = toy(tmp_path, "train(sys.argv[1] + '/run', bad_step='skip'); end_processes()")
    files = sorted((tmp_path / "run" / "bad").iterdir())
    assert [f.name for f in files] == ["step_0000003_0.pt", "step_0000003_1.pt"]
    assert "each of the 2 processes" in done.stdout
    scope = {}
    exec(TOY, scope)
    for f in files:
        # not a number
        assert replay(scope["Toy"](), f)["norm"] != replay(scope["Toy"](), f)["norm"]


def test_a_step_that_is_saved_again_is_there_all_the_time(tmp_path, monkeypatch):
    "A kill between taking away the old and naming the new one."
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    from puma_nb.training.checkpoint import run_state
    save = lambda: save_checkpoint(tmp_path, 4, run_state(model, optimizer, None), None, {})
    save()
    save()
    assert [p.name for p in checkpoints(tmp_path)] == ["step_0000004"]
    replace = os.replace
    def killed(a, b):
        if str(b).endswith("step_0000004"): raise KeyboardInterrupt
        replace(a, b)
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt): save()
    assert load_checkpoint(tmp_path, model, optimizer, None)["step"] == 4
    monkeypatch.undo()
    save()
    assert load_checkpoint(tmp_path, model, optimizer, None)["step"] == 4


def test_data_that_cannot_be_read_costs_nothing(tmp_path):
    """The second process's data is gone at step 4: both save what they have learnt, and the run
    goes on when it is back."""
    late = """
class Late(Toy):
    def batch(self, positions, step):
        if step == 4 and not is_main() and len(sys.argv) < 3:
            raise OSError("the disk is gone")
        return Toy.batch(self, positions, 0)
log = fit(
    Late(), stage, sys.argv[1] + "/run", 0, True, "cpu", progress=False, log_every=1, run=Run()
)
"""
    said = toy(tmp_path, late, ok=False).stderr
    assert "the disk is gone; what was learnt before is saved" in said
    assert [p.name for p in checkpoints(tmp_path / "run" / "checkpoints")] == ["step_0000004"]
    back = late.replace("and len(sys.argv) < 3", "and False") + "end_processes()"
    toy(tmp_path, back)
    toy(tmp_path, back.replace("/run", "/straight"))
    losses = lambda name: [r["loss"] for r in read_log(tmp_path / name / "log.jsonl")]
    assert losses("run") == losses("straight") and len(losses("run")) == 6
