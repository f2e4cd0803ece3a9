"""Speed of the language model: ours against a naive loop, against transformers' Trainer, with and without a cache.

    python tests/benchmarks/mllm.py [--rounds 7] [--json tests/benchmarks/mllm.json]

Rivals take turns within one run and medians are compared, so that a busy machine disturbs all of them alike.
"""
import argparse, json, multiprocessing, platform, resource, tempfile, time
from dataclasses import replace
from pathlib import Path
import numpy as np
import torch
from torch import nn
import torch.nn.functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments
from puma_nb.core import *
from puma_nb.data.segments import *
from puma_nb.errors import *
from puma_nb.models.generation import *
from puma_nb.models.mllm import *
from puma_nb.models.processor import *
from puma_nb.models.pyramid import *
from puma_nb.models.sequence import *
from puma_nb.presets import *
from puma_nb.recipes.mllm import *
from puma_nb.training.launch import *
from puma_nb.training.log import *
from puma_nb.training.report import *
from puma_nb.training.task import *
from puma_nb.world.samples import *


def take_turns(jobs, rounds):
    "Median seconds of each job, interleaved; the first round warms up."
    times = {k: [] for k in jobs}
    for r in range(rounds + 1):
        for k, job in jobs.items():
            t = time.perf_counter(); job(); times[k].append(time.perf_counter() - t)
    return {k: float(np.median(v[1:])) for k, v in times.items()}


def setting(vocabulary=None):
    "The nano model on pairs of the world; a larger vocabulary only lengthens the rows of logits."
    nano = get_preset("nano-plain"); tokenizer = load_mllm()[1].tokenizer
    sets, store = prepare_samples(dict(t2i=world_samples("t2i", 600), caption=world_samples("caption", 600)), tokenizer, load_encoder(), load_stats())
    def model(attention):
        torch.manual_seed(0); m = build_mllm(nano, tokenizer, load_stats())
        if vocabulary: m.language_model.resize_token_embeddings(vocabulary); m.config.text_config.vocab_size = vocabulary
        m.language_model.set_attn_implementation(attention)
        return m
    return nano, tokenizer, sets, store, model


class Everywhere(nn.Module):
    "The same model and loss as a plain program would write them: logits at every position."
    def __init__(self, model, weights): super().__init__(); self.puma, self.weights = model, weights

    def forward(self, labels=None, **tensors):
        b = Batch(**tensors)
        hidden = self.puma(b.ids, b.slot, b.fed_features, b.mask).last_hidden_state[:, :-1]
        where, counts = targets(b), {k: v.sum().clamp_min(1) for k, v in targets(b).items()}
        logits = self.puma.word_logits(hidden).float()
        aim = torch.where(where["text"], b.ids[:, 1:], -100)
        loss = self.weights["text"] * F.cross_entropy(logits.flatten(0, 1), aim.flatten(), ignore_index=-100, reduction="sum") / counts["text"]
        error = ((self.puma.out_projector(hidden).float() - b.features[:, 1:]) ** 2).mean(-1)
        for i in SCALES: loss = loss + self.weights[f"f{i}"] * error[where[f"f{i}"]].sum() / counts[f"f{i}"]
        return dict(loss=loss)


def training(rounds, vocabulary=None):
    "Seconds of a step: ours, a naive float32 loop, Trainer in bf16. One step in ten or so is deep, as in training."
    nano, tokenizer, sets, store, build = setting(vocabulary)
    stage, shares, count = nano.stages["pretrain"], dict(t2i=1, caption=1), 6 if vocabulary else 12
    make = lambda m: MLLMTask(nano, m, tokenizer, sets, shares, store, "bench")
    ours = make(build("eager"))
    def optimizer(m, **kw): return torch.optim.AdamW(m.parameters(), lr=1e-4, **kw)
    own_opt, losses = optimizer(ours.model, fused=True), Losses(ours)
    def step_ours():
        accelerator = make_accelerator("cpu")  # Trainer leaves another one behind
        for k in range(count):
            train_step(accelerator, ours, losses, np.arange(k * stage.batch, (k + 1) * stage.batch), k)
            torch.nn.utils.clip_grad_norm_(ours.model.parameters(), 5.); own_opt.step(); own_opt.zero_grad()
    plain = Everywhere(build("sdpa"), ours.weights); plain_opt = optimizer(plain, foreach=False, fused=False)
    def batch(k): return ours.batch(ours.choose(np.arange(k * stage.batch, (k + 1) * stage.batch), k), k)
    def step_plain():
        for k in range(count):
            plain(**batch(k).tensors())["loss"].backward(); torch.nn.utils.clip_grad_norm_(plain.parameters(), 5.); plain_opt.step(); plain_opt.zero_grad()
    class Batches(torch.utils.data.Dataset):
        def __len__(self): return count
        def __getitem__(self, k): return batch(k).tensors()
    arguments = TrainingArguments(tempfile.mkdtemp(), per_device_train_batch_size=1, num_train_epochs=1, bf16=has_bf16(), use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no",
                                  max_grad_norm=5., learning_rate=1e-4, disable_tqdm=True, remove_unused_columns=False, optim="adamw_torch_fused", lr_scheduler_type="constant", dataloader_drop_last=False)
    class Clock(TrainerCallback):
        "The time between the first step's begin and the last one's end: what Trainer sets up beforehand does not count."
        def on_step_begin(self, args, state, control, **kw): self.begun = self.begun if state.global_step else time.perf_counter()
        def on_step_end(self, args, state, control, **kw): self.spent = time.perf_counter() - self.begun
    clock, model = Clock(), Everywhere(build("sdpa"), ours.weights)
    class InOrder(Trainer):
        def _get_train_sampler(self, *a, **kw): return torch.utils.data.SequentialSampler(self.train_dataset)
    def step_trainer(): InOrder(model, arguments, train_dataset=Batches(), data_collator=lambda rows: rows[0], callbacks=[clock]).train()
    spent = []
    def timed(): step_trainer(); spent.append(clock.spent)
    t = take_turns(dict(ours=step_ours, naive=step_plain, trainer=timed), rounds)
    t["trainer"] = float(np.median(spent[1:]))
    return dict(vocabulary=vocabulary or len(tokenizer), steps=count, seconds={k: v / count for k, v in t.items()}, samples_per_second={k: stage.batch * count / v for k, v in t.items()},
                over_naive=t["naive"] / t["ours"], over_trainer=t["trainer"] / t["ours"], share_of_ceiling=step_flops(ours, stage, count) * count / t["ours"] / matmul_ceiling())


def generation(rounds):
    "Seconds for one image of 341 tokens, and for its first ones."
    nano, tokenizer, sets, store, build = setting()
    model, _ = load_mllm()
    torch.manual_seed(0); wide = build_mllm(get_preset("nano"), tokenizer, load_stats()).eval()
    b = prompt_batch([[text_segment("a red circle at the top left and a blue square at the right on a white background", False)]], tokenizer, store, 2, True)
    t = take_turns(dict(cached=lambda: generate_image(model, b, 0), static=lambda: generate_image(model, b, 0, cache="static"), compiled=lambda: generate_image(model, b, 0, cache="static", compile=True), recomputed=lambda: generate_image(model, b, 0, cache="none"),
                        f4=lambda: generate_image(model, b, 4), at_once=lambda: generate_at_once(wide, b, 0)), rounds)
    return dict(seconds=t, cached_over_recomputed=t["recomputed"] / t["cached"], compiled_over_recomputed=t["recomputed"] / t["compiled"], at_once_over_cached=t["cached"] / t["at_once"], f4_over_all=t["cached"] / t["f4"])


def _peak(pieces, queue):
    torch.manual_seed(0)
    head = nn.Linear(512, 128256, bias=False); hidden = torch.randn(8, 401, 512, requires_grad=True); learnt = torch.zeros(8, 401, dtype=torch.bool); learnt[:, :60] = True; ids = torch.randint(0, 128256, (8, 401))
    head.weight.grad = torch.zeros_like(head.weight)
    class Model: config = type("C", (), dict(text_config=type("T", (), dict(vocab_size=128256)))); word_logits = staticmethod(head)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if pieces: loss = text_loss(Model, hidden[learnt], ids[learnt])
    else: loss = F.cross_entropy(head(hidden).float().flatten(0, 1), torch.where(learnt, ids, -100).flatten(), ignore_index=-100, reduction="sum")
    loss.backward(); queue.put((float(loss.detach()), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


def memory():
    "Peak memory of the text loss at LLaMA-3's vocabulary, each in a process of its own: eight samples of 60 words and 341 image tokens."
    spawn, out = multiprocessing.get_context("spawn"), {}
    for name, pieces in (("full", False), ("ours", True)):
        q = spawn.Queue(); p = spawn.Process(target=_peak, args=(pieces, q)); p.start(); out[name] = q.get(); p.join()
    assert abs(out["full"][0] / out["ours"][0] - 1) < 1e-4
    return dict(megabytes={k: v[1] for k, v in out.items()}, full_over_ours=out["full"][1] / out["ours"][1])


def main():
    a = argparse.ArgumentParser(); a.add_argument("--rounds", type=int, default=7); a.add_argument("--json"); a.add_argument("--only"); a = a.parse_args()
    jobs = dict(memory=memory, generation=lambda: generation(max(2, a.rounds // 2)), training=lambda: training(a.rounds), training_128k=lambda: training(max(2, a.rounds // 2), 128256 + 226))  # memory first: a child inherits its parent's peak
    found = dict(machine=f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, bf16 {has_bf16()}")
    if a.only and a.json and Path(a.json).exists(): found = {**json.loads(Path(a.json).read_text()), **found}
    for k, job in jobs.items():
        if a.only in (None, k): found[k] = job(); print(k, json.dumps(found[k], indent=1), flush=True)
        if a.json: Path(a.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__": main()
