"""Nothing of ours reaches the paper's presets: sequences, masks and losses of every family, written out token by token."""
from dataclasses import replace
import pytest
import torch
import torch.nn.functional as F
from puma_nb.core import COARSE_TO_FINE, PRESETS, TOKENS, get_preset
from puma_nb.data import train_tokenizer, world_samples
from puma_nb.mllm import MLLMTask, build_mllm, loss_weights, prepare_samples
from puma_nb.pyramid import load_encoder, load_stats, pyramid

PICO = get_preset("pico").mllm
OURS = dict(parent_path=False, consistency=False, at_once=0.0, text_mean="token", structure_weight=0.0, disturbed_words=0.0)
SCALES_IN_ORDER = [i for i in COARSE_TO_FINE for _ in range(TOKENS[i])]  # f4, f3 x 4, f2 x 16, f1 x 64, f0 x 256


def small(name, **settings):
    "A preset's rules with pico's sizes, so that a model of it can be made."
    preset = get_preset(name)
    sizes = {k: getattr(PICO, k) for k in ("hidden_size", "layers", "heads", "kv_heads", "mlp_size")}
    return replace(preset, encoder=replace(preset.encoder, hidden_size=96), mllm=replace(preset.mllm, pack=0, attention="plain", **sizes, **settings))


def written_out(sample, tokenizer):
    "The paper's sequence as a list of (word or (image, number), is it learnt?)."
    out = [("<s>", False)]
    segments = sample["segments"]
    for k, s in enumerate(segments):
        if s["kind"] == "text":
            out += [(w, s["supervised"]) for w in tokenizer(s["text"], add_special_tokens=False)["input_ids"]]
            if s["supervised"] and k + 1 < len(segments) and not segments[k + 1]["supervised"]: out.append(("</s>", True))
        else:
            out += [("[IMG]", s["supervised"])]
            out += [((s["image"], n), s["supervised"]) for n in range(341)]
            out += [("[/IMG]", s["supervised"])]
    return out + [("</s>", segments[-1]["supervised"])]


@pytest.fixture(scope="module")
def tokenizer(): return train_tokenizer(512)


@pytest.mark.parametrize("name", ["paper", "base", "nano-plain"])
def test_what_is_ours_is_off(name):
    m = get_preset(name).mllm
    assert {k: getattr(m, k) for k in OURS} == OURS
    assert "structure" not in {k for k, v in loss_weights(m).items() if v}
    model = build_mllm(small(name))
    assert model.path is None and not model.config.parent_path and not model.config.consistency
    assert not any("path" in n for n, _ in model.named_parameters())


@pytest.mark.parametrize("family", ["t2i", "caption", "ground", "question", "edit", "condition", "read", "passage"])
def test_sequence_mask_and_loss_are_the_papers(family, tokenizer):
    preset, samples = small("paper"), world_samples(family, 2)
    stats = load_stats()
    sets, store = prepare_samples({family: samples, "t2i": world_samples("t2i", 1)}, tokenizer, load_encoder(), stats)
    torch.manual_seed(0)
    model = build_mllm(preset, tokenizer, stats).eval()
    task = MLLMTask(preset, model, tokenizer, sets, {family: 1.0}, store)
    for position in range(2):
        b = task.batch([position], 0)
        sample = sets[family].index(task.gather([position])[0][0])
        wanted = written_out(samples[sample], tokenizer)
        assert b["ids"].shape == (1, len(wanted)) and set(b) <= {"ids", "slot", "learn", "mask", "features", "inputs", "words"}
        assert torch.equal(b["inputs"], b["features"])  # no noise
        hidden = model(b["ids"], b["slot"], b["features"], b["mask"]).last_hidden_state[0]
        text, image = 0.0, {i: 0.0 for i in COARSE_TO_FINE}
        for p, (token, learnt) in enumerate(wanted):
            assert bool(b["learn"][0, p]) == learnt
            if isinstance(token, tuple):
                number = token[1]
                scale = SCALES_IN_ORDER[number]
                k = number - SCALES_IN_ORDER.index(scale)
                grid = pyramid(store.f0[[g["image"] for g in task.gather([position])[0][0] if g["kind"] == "image"][token[0]]][None].float())[scale]
                feature = (grid[0, k] - stats.mean[scale]) / stats.std[scale]
                assert int(b["slot"][0, p]) == number
                torch.testing.assert_close(b["features"][0, p], feature, rtol=1e-4, atol=1e-4)
                if learnt: image[scale] += float(((model.out_projector(hidden[p - 1]) - feature) ** 2).mean())
            else:
                word = tokenizer.convert_tokens_to_ids(token) if isinstance(token, str) else token
                assert int(b["ids"][0, p]) == word and int(b["slot"][0, p]) == -1
                if learnt: text += float(F.cross_entropy(model.language_model.lm_head(hidden[p - 1])[None], torch.tensor([word])))
        with torch.no_grad(): terms = task.losses(model, b, 0)
        assert float(terms["text"]) == pytest.approx(text, rel=1e-3, abs=1e-4) and float(terms["structure"]) == 0
        for i in COARSE_TO_FINE: assert float(terms[f"f{i}"]) == pytest.approx(image[i], rel=1e-3, abs=1e-4)
        counts = task.counts(b)
        assert counts["text"] == sum(learnt for t, learnt in wanted if not isinstance(t, tuple)) and counts["structure"] == 0


def test_nano_plain_differs_from_nano_in_what_is_ours_only():
    nano, plain = PRESETS["nano"], PRESETS["nano-plain"]
    assert replace(nano, name="nano-plain", mllm=replace(nano.mllm, **OURS), sources=plain.sources) == plain
