"The language model in the hands of transformers and peft: Trainer, LoRA, outputs, several </s>."
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from processes import run as in_processes
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback
from transformers import TrainingArguments

from puma_nb.core import torch_rng
from puma_nb.data.segments import image_segment, text_segment
from puma_nb.models.generation import Generation, generate_image, generate_text
from puma_nb.models.mllm import TERMS, build_mllm, loss_terms, loss_weights, model_inputs
from puma_nb.models.mllm import term_counts
from puma_nb.models.processor import from_llama
from puma_nb.models.pyramid import FeatureStats
from puma_nb.models.sequence import FeatureStore, build_sequence, collate, prompt_batch
from puma_nb.presets import get_preset
from puma_nb.recipes.mllm import segment_weights
from puma_nb.recipes.trainer import PumaTrainer
from puma_nb.training.task import recompute_activations
from puma_nb.world.samples import train_tokenizer

SIZES = ("hidden_size", "layers", "heads", "kv_heads", "mlp_size")
QUIET = dict(
    report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_strategy="no",
    max_grad_norm=0, remove_unused_columns=False,
)


@pytest.fixture(autouse=True)
def one_thread(fixed_threads): torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer(): return train_tokenizer(400)


def preset_of(name):
    "The preset with pico's sizes."
    preset = get_preset(name)
    tiny = {k: getattr(get_preset("pico").mllm, k) for k in SIZES}
    return replace(preset, mllm=replace(preset.mllm, **tiny))


def small_model(name, tokenizer):
    torch.manual_seed(0)
    stats = FeatureStats(torch.zeros(5, 96), torch.ones(5, 96))
    return build_mllm(preset_of(name), tokenizer, stats)


def ragged_rows(tokenizer):
    "Eight sequences of very different lengths: words alone, an image to write, one to read."
    rows, words = [], "a red circle at the top and a blue square at the bottom"
    for k in range(8):
        said = text_segment(words[:4 + 6 * k], k % 3 != 1)
        segments = [[said], [said, image_segment(k, True)], [image_segment(k, False), said]][k % 3]
        rows.append(build_sequence(segments, tokenizer, stop=4 - k % 4, source=4))
    return rows


class Collator:
    "Sequences with random features, as the arguments of `forward`."
    def __init__(self, tokenizer, by_segment):
        f0 = torch.randn(8, 256, 96, generator=torch_rng("f0"))
        self.store = FeatureStore(f0, FeatureStats(torch.zeros(5, 96), torch.ones(5, 96)))
        self.pad, self.by_segment = tokenizer.pad_token_id, by_segment

    def batch(self, rows):
        b = collate(rows, self.store, self.pad)
        if self.by_segment: b.weight = segment_weights(b)
        return b

    def __call__(self, rows): return model_inputs(self.batch(rows))


class Gradient(TrainerCallback):
    "Keeps the gradient of the last step."
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.kept = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def trainer_gradient(folder, model, rows, collator, size, pieces, kind=PumaTrainer):
    args = TrainingArguments(
        folder, per_device_train_batch_size=size, gradient_accumulation_steps=pieces, max_steps=1,
        **QUIET)
    seen = Gradient()
    kind(model, args, collator, rows, callbacks=[seen]).train()
    return seen.kept


def grads_of(model):
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def project_gradient(model, b, weights):
    "What the project's own loop computes."
    counts, terms = term_counts(b), loss_terms(model, b)
    loss = sum(weights[k] * v / max(1, counts[k]) for k, v in terms.items())
    model.zero_grad()
    loss.backward()
    return grads_of(model), float(loss.detach())


def assert_same_gradient(one, other):
    assert set(one) == set(other)
    for n, g in one.items():
        torch.testing.assert_close(g, other[n], rtol=1e-5, atol=1e-5 * float(other[n].abs().max()))


@pytest.mark.parametrize("name", ("nano-plain", "nano"))
def test_trainer_gives_the_gradient_of_one_batch(tokenizer, tmp_path, name):
    "Accumulated in four pieces, in one piece, and by the project's loop; `Trainer` alone is off."
    rows, collator = ragged_rows(tokenizer), Collator(tokenizer, name == "nano")
    weights = loss_weights(preset_of(name).mllm)
    true, loss = project_gradient(small_model(name, tokenizer), collator.batch(rows), weights)
    out = small_model(name, tokenizer)(**collator(rows))
    assert abs(out.loss.item() - loss) < 1e-6
    assert set(out.terms) == set(TERMS)
    for pieces in (1, 4):
        model = small_model(name, tokenizer)
        found = trainer_gradient(tmp_path, model, rows, collator, 8 // pieces, pieces)
        assert_same_gradient(found, true)
    averaged = trainer_gradient(
        tmp_path, small_model(name, tokenizer), rows, collator, 2, 4, Trainer)
    n = "language_model.model.layers.0.mlp.up_proj.weight"
    assert (averaged[n] - true[n]).norm() > .01 * true[n].norm()


WORKER = """
import json, sys, torch
from test_transformers import *
out = sys.argv[1]
tokenizer = train_tokenizer(400)
torch.set_num_threads(1)
rows, collator = ragged_rows(tokenizer), Collator(tokenizer, True)
found = trainer_gradient(out, small_model("nano", tokenizer), rows, collator, 2, 2)
found = {n.removeprefix("module."): g for n, g in found.items()}
rank = torch.distributed.get_rank()
assert torch.distributed.get_world_size() == 2
if rank == 0: torch.save(found, out + "/gradient.pt")
"""


def test_two_processes_give_the_gradient_of_one(tokenizer, tmp_path, root, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.syspath_prepend(str(root / "tests"))
    path = f"{root / 'tests'}:{root}"
    done = in_processes(script, (tmp_path,), tmp_path / "said", 2, dict(PYTHONPATH=path))
    assert done.returncode == 0, done.stderr[-3000:]
    rows, collator = ragged_rows(tokenizer), Collator(tokenizer, True)
    weights = loss_weights(preset_of("nano").mllm)
    model = small_model("nano", tokenizer)
    true, _ = project_gradient(model, collator.batch(rows), weights)
    assert_same_gradient(torch.load(tmp_path / "gradient.pt", weights_only=True), true)


@pytest.mark.parametrize("kind", (Trainer, PumaTrainer))
def test_ten_steps_of_a_trainer_lower_the_loss(tokenizer, tmp_path, kind):
    rows, collator = ragged_rows(tokenizer), Collator(tokenizer, True)
    model = small_model("nano", tokenizer)
    recompute_activations(model)
    args = TrainingArguments(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=10,
        learning_rate=3e-3, **QUIET)
    trainer = kind(model, args, collator, rows, rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < .9 * before
    trainer.save_model(tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved").eval()
    inputs = collator(rows)
    torch.testing.assert_close(again(**inputs).loss, model.eval()(**inputs).loss)


def test_lora_trains_merges_saves_and_loads(tokenizer, tmp_path):
    rows, collator = ragged_rows(tokenizer), Collator(tokenizer, True)
    inputs, model = collator(rows), small_model("nano", tokenizer)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    plain = model.eval()(**inputs).last_hidden_state.detach()
    recompute_activations(model)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    args = TrainingArguments(
        tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=5,
        learning_rate=3e-2, **QUIET)
    PumaTrainer(adapted, args, collator, rows).train()
    base = adapted.get_base_model().state_dict()
    for n, v in before.items():
        for end in ("q_proj", "v_proj"): n = n.replace(end, f"{end}.base_layer")
        assert torch.equal(base[n], v), f"{n} has changed"
    told = adapted.eval()(**inputs)
    assert (told.last_hidden_state - plain).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(small_model("nano", tokenizer), tmp_path / "adapter").eval()
    merged = loaded.merge_and_unload()
    assert type(merged).__name__ == "PumaForConditionalGeneration"
    for other in (merged, adapted.merge_and_unload()):
        again = other(**inputs)
        torch.testing.assert_close(
            again.last_hidden_state, told.last_hidden_state, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again.loss, told.loss)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModel.from_pretrained(tmp_path / "merged").eval()(**inputs)
    torch.testing.assert_close(again.loss, told.loss)


def test_an_output_is_read_by_name_by_number_and_as_a_tuple(tokenizer):
    model = small_model("nano", tokenizer).eval()
    inputs = Collator(tokenizer, True)(ragged_rows(tokenizer)[:3])
    out = model(**inputs, logits_to_keep=0, use_cache=True)
    loss, logits, cache, hidden, terms = out.to_tuple()
    assert out[0] is out.loss is loss
    assert out["logits"] is logits
    assert out.past_key_values is cache
    assert cache.get_seq_length() == hidden.shape[1]
    torch.testing.assert_close(logits, model.word_logits(hidden))
    one = model(**inputs, logits_to_keep=1).logits
    torch.testing.assert_close(one, logits[:, -1:])
    as_tuple = model(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == 3
    torch.testing.assert_close(as_tuple[0], loss)
    inputs.pop("labels")
    inputs.pop("weight")
    assert list(model(**inputs)) == ["last_hidden_state"]


def test_labels_are_the_targets_of_words(tokenizer):
    "Label and input may differ; the input is what is read, the label what is learnt."
    model = small_model("nano-plain", tokenizer).eval()
    ids = torch.tensor([[1, 7, 8, 9]])
    labels = torch.tensor([[-100, -100, 5, -100]])
    out = model(ids, labels=labels)
    logits = model(ids, logits_to_keep=0).logits
    true = torch.nn.functional.cross_entropy(logits[:, 1], torch.tensor([5]))
    torch.testing.assert_close(out.terms["text"], true)
    nothing = model(ids, labels=torch.full_like(ids, -100))
    assert nothing.loss.item() == 0


@pytest.mark.parametrize("tied", (False, True))
def test_the_vocabulary_can_grow(tokenizer, tmp_path, tied):
    torch.manual_seed(0)
    preset = preset_of("nano")
    preset = replace(preset, mllm=replace(preset.mllm, tied=tied))
    model = build_mllm(preset, tokenizer).eval()
    size, inputs = len(tokenizer), Collator(tokenizer, True)(ragged_rows(tokenizer))
    before = model(**inputs, logits_to_keep=0).logits
    assert model.get_input_embeddings() is model.language_model.model.embed_tokens
    model.resize_token_embeddings(size + 5, mean_resizing=False)
    assert model.config.text_config.vocab_size == size + 5
    after = model(**inputs, logits_to_keep=0).logits
    assert after.shape[-1] == size + 5
    torch.testing.assert_close(after[..., :size], before)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**inputs, logits_to_keep=0).logits, after)
    same = again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert same == tied


def test_gradient_checkpointing_changes_no_gradient(tokenizer):
    collator = Collator(tokenizer, True)
    b, weights = collator.batch(ragged_rows(tokenizer)), loss_weights(preset_of("nano").mllm)
    true, _ = project_gradient(small_model("nano", tokenizer).train(), b, weights)
    model = small_model("nano", tokenizer).train()
    recompute_activations(model)
    calls, query = [], model.language_model.model.layers[0].self_attn.q_proj
    query.register_forward_hook(lambda *_: calls.append(1))
    model(**model_inputs(b)).loss.backward()
    assert len(calls) == 2
    assert_same_gradient(grads_of(model), true)


def test_generation_as_methods(tokenizer):
    model, store = small_model("nano", tokenizer).eval(), Collator(tokenizer, True).store
    prompts = [[text_segment("a red circle", False)], [text_segment("a", False)]]
    b = prompt_batch(prompts, tokenizer, store, 2, image=True)
    inputs = model_inputs(b)
    inputs.pop("labels")
    true = generate_image(model, b, 3)
    for found in (model.generate_images(b, stop=3), model.generate_images(**inputs, stop=3)):
        assert list(found) == [4, 3]
        for i in found: assert torch.equal(found[i], true[i])
    b = prompt_batch(prompts, tokenizer, store, 2, image=False)
    said = model.generate(b, max_new_tokens=5)
    assert said == generate_text(model, b, 5)
    assert model.generate(b.ids, attention_mask=b.mask, max_new_tokens=5) == said


def scripted(model, *rows):
    "Makes each row write the given words, whatever it has read."
    words = [iter(r) for r in rows]
    def logits(hidden):
        out = torch.zeros(len(hidden), model.config.text_config.vocab_size)
        for k, w in enumerate(words): out[k, next(w, 0)] = 1
        return out
    model.word_logits = logits


def test_a_llama_with_several_end_ids(tokenizer, tmp_path):
    ends = [11, 13]
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, eos_token_id=ends)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    stats = FeatureStats(torch.zeros(5, 96), torch.ones(5, 96))
    model = from_llama(tmp_path, tokenizer, stats, get_preset("nano-plain"))
    assert model.config.text_config.eos_token_id == ends
    store = Collator(tokenizer, False).store
    prompts = [[text_segment("a red circle", False)], [text_segment("a", False)]]
    b = prompt_batch(prompts, tokenizer, store, 2, image=False)
    scripted(model, [20, 21, 13], [22, 11])
    assert generate_text(model, b) == [[20, 21], [22]]
    scripted(model, [20, 21, 11], [13])
    run = Generation(model, b, 0, 0, True, 9)
    while not all(r.done for r in run.rows): run.step()
    assert [r.pieces for r in run.rows] == [[[20, 21]], []]
    # a row that only paints has no word: the first of the ends stands there
    b = prompt_batch(prompts, tokenizer, store, 2, image=True)
    run = Generation(model, b, 4, 0, False, 9)
    run.step()
    assert run.reader.inputs["input_ids"][:, b.ids.shape[1]].tolist() == [11, 11]
