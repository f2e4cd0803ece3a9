"""Nothing of ours reaches the paper's presets: sequences, masks and losses, written out."""
from dataclasses import replace
import pytest
import torch
import torch.nn.functional as F
from puma_nb.errors import COARSE_TO_FINE, TOKENS
from puma_nb.models.mllm import build_mllm, loss_weights
from puma_nb.models.pyramid import load_encoder, load_stats, pyramid
from puma_nb.presets import PRESETS, get_preset
from puma_nb.recipes.mllm import MLLMTask, prepare_samples
from puma_nb.world.samples import BUILDERS, train_tokenizer, world_samples

PICO = get_preset("pico").mllm
OURS = dict(parent_path=False, consistency=False, at_once=0.0, text_mean="token",
            structure_weight=0.0, disturbed_words=0.0, copy_path=False, edit_plan=False)
FAMILIES = tuple(BUILDERS)
ORDER = [(i, k) for i in COARSE_TO_FINE for k in range(TOKENS[i])]  # f4, f3 x 4, ... f0 x 256
KEYS = {"ids", "slot", "loss_mask", "mask", "words", "features"}


def small(name):
    "A preset's rules with pico's sizes, so that a model of it can be made."
    preset = get_preset(name)
    names = ("hidden_size", "layers", "heads", "kv_heads", "mlp_size")
    sizes = {k: getattr(PICO, k) for k in names}
    rules = replace(preset.mllm, pack=0, attention="plain", **sizes)
    return replace(preset, encoder=replace(preset.encoder, hidden_size=96), mllm=rules)


def written_out(segments, tokenizer):
    "The paper's sequence: (id of a word, or (image, number of its token), is it learnt?)."
    bos, eos, boi, eoi = tokenizer.convert_tokens_to_ids(["<s>", "</s>", "[IMG]", "[/IMG]"])
    out = [(bos, False)]
    for k, s in enumerate(segments):
        learnt = s.supervised
        if s.kind == "image":
            tokens = [boi, *((s.image, n) for n in range(341)), eoi]
        else:
            tokens = tokenizer(s.text, add_special_tokens=False)["input_ids"]
            turn_ends = learnt and k + 1 < len(segments) and not segments[k + 1].supervised
            if turn_ends: tokens = tokens + [eos]
        out += [(t, learnt) for t in tokens]
    return out + [(eos, segments[-1].supervised)]


@pytest.fixture(scope="module")
def tokenizer(): return train_tokenizer(768)


@pytest.mark.parametrize("name", ["paper", "base", "nano-plain"])
def test_what_is_ours_is_off(name):
    m = get_preset(name).mllm
    assert {k: getattr(m, k) for k in OURS} == OURS
    assert loss_weights(m)["structure"] == 0
    model = build_mllm(small(name))
    assert model.path is None and not model.config.parent_path and not model.config.consistency
    assert not model.config.edit_plan
    assert not any("path" in n for n, _ in model.named_parameters())


def normalised_grids(f0, stats):
    "An image's five grids in the units of the model."
    grids = pyramid(f0[None].float())
    return [(g[0] - stats.mean[i]) / stats.std[i] for i, g in enumerate(grids)]


def check_batch(b, wanted, images):
    "Ids, slots, marks and features of a batch of one are those that are wanted."
    assert b.ids.shape == (1, len(wanted)) and set(b.tensors()) == KEYS
    assert b.fed_features is None  # no noise
    for p, (token, learnt) in enumerate(wanted):
        assert bool(b.loss_mask[0, p]) == learnt
        if isinstance(token, tuple):
            scale, k = ORDER[token[1]]
            assert int(b.slot[0, p]) == token[1]
            feature = images[token[0]][scale][k]
            torch.testing.assert_close(b.features[0, p], feature, rtol=1e-4, atol=1e-4)
        else: assert (int(b.ids[0, p]), int(b.slot[0, p])) == (token, -1)


def losses_by_hand(model, b, wanted, images):
    "The sums of Eq. 2, one token at a time: each is predicted by the position before it."
    states = model(b.ids, b.slot, b.features, b.mask).last_hidden_state[0]
    sums = dict.fromkeys(("text", "structure", *(f"f{i}" for i in COARSE_TO_FINE)), 0.0)
    for p, (token, learnt) in enumerate(wanted):
        if not learnt: continue
        if isinstance(token, tuple):
            scale, k = ORDER[token[1]]
            off = model.out_projector(states[p - 1]) - images[token[0]][scale][k]
            sums[f"f{scale}"] += float((off ** 2).mean())
        else:
            logits = model.language_model.lm_head(states[p - 1])
            sums["text"] += float(F.cross_entropy(logits, torch.tensor(token)))
    return sums


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_sequence_mask_and_loss_are_the_papers(family, tokenizer):
    preset, samples, stats = small("paper"), world_samples(family, 2), load_stats()
    also = world_samples("t2i", 1)  # passages have no image
    sets, store = prepare_samples({family: samples, "also": also}, tokenizer, load_encoder(), stats)
    torch.manual_seed(0)
    model = build_mllm(preset, tokenizer, stats).eval()
    task = MLLMTask(preset, model, tokenizer, sets, {family: 1.0}, store)
    for position in range(2):
        prepared = task.gather([position])[0][0]
        own = samples[sets[family].index(prepared)]["segments"]
        wanted = written_out(own, tokenizer)
        numbers = {o.image: p.image for o, p in zip(own, prepared) if o.kind == "image"}
        images = {k: normalised_grids(store.f0[n], stats) for k, n in numbers.items()}
        b = task.batch([position], 0)
        check_batch(b, wanted, images)
        by_hand = losses_by_hand(model, b, wanted, images)
        for term, value in task.losses(model, b, 0).items():
            assert float(value) == pytest.approx(by_hand[term], rel=1e-3, abs=1e-4)
        learnt_words = sum(learnt for t, learnt in wanted if not isinstance(t, tuple))
        assert (task.counts(b)["text"], task.counts(b)["structure"]) == (learnt_words, 0)


def test_nano_plain_differs_from_nano_in_what_is_ours_only():
    nano, plain = PRESETS["nano"], PRESETS["nano-plain"]
    changed = replace(nano.mllm, **OURS)
    same = dict(name="nano-plain", base="nano-plain", sources=plain.sources)
    assert replace(nano, mllm=changed, **same) == plain
