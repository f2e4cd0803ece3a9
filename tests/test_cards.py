"""The data cards: a schema for every header, every set of the paper, and broken headers refused.

What a card's `puma:` mapping says, beside the keys of the Hugging Face card convention:

stage     which stages use the set (STAGES)
home      its repository on the hub, or an https address; nothing is fetched unless asked for by
          name
format    how its rows come (FORMATS)
columns   the set's own column names, a dot for each level -> one of our FIELDS, or a list of them;
          columns that share a field are alternatives, or parts of one text in this order
filters   stage -> rules (RULES)
roots     column -> the folder that its paths begin in, where rows leave it out (optional)
split     the name of the split to read
weight    stage -> its share among the stage's sets, and where that number comes from; none for
          evaluation
standin   the builder of the drawn world that takes its place, "" where there is none
paper     the sections and tables that speak of it
"""
import re

import pytest
import yaml

from puma_nb.data.cards import FIELDS, load_cards, read_card
from puma_nb.errors import UserError, package_dir
from puma_nb.world.samples import BUILDERS, world_samples

STAGES = (
    "decoders", "pretrain", "instruct-t2i", "instruct-edit", "instruct-condition",
    "instruct-understand", "eval",
)
FORMATS = ("hub-streaming", "parquet", "webdataset", "image-folder", "json")
RULES = {
    "min_side": int,
    "min_box_side": float,
    "crop": str,
    "nonempty": list,
    "drop_subsets": dict,
    "dedup_with": list,
    "text_rows": bool,
}
CROPS = ("center", "random", "squash")
KEYS = {"stage", "home", "format", "columns", "filters", "split", "weight", "standin", "paper"}
HUB_KEYS = {
    "pretty_name", "license", "language", "task_categories", "size_categories", "source_datasets",
}
# stage -> the sets that the paper names for it: sections A.1.1, 3.4 with A.2.2, A.2.4,
# 4 with B and C
PAPER = {
    "decoders": {"laion-2b", "laion-aesthetics", "journeydb"},
    "pretrain": {"laion-2b", "laion-aesthetics", "grit", "the-pile", "ocr-vqa-200k", "llavar"},
    "instruct-t2i": {"laion-aesthetics", "journeydb"},
    "instruct-edit": {"seed-data-edit"},
    "instruct-condition": {"multigen-20m"},
    "instruct-understand": {"llava-onevision", "cambrian"},
    "eval": {
        "imagenet-val", "coco-30k", "emu-edit-test", "mmbench", "mme", "gqa", "vqav2", "pope",
        "vizwiz",
        # the last two train the models of Table 5
        "llava-1.5-pretrain",
        "llava-1.5-finetune",
    },
}
CARDS = load_cards()
each = pytest.mark.parametrize("name", sorted(CARDS))


def test_every_set_of_the_paper_has_its_card():
    found = {stage: {c.name for c in CARDS.values() if stage in c.stage} for stage in STAGES}
    assert found == PAPER


def test_cards_are_named_after_their_files():
    assert (
        sorted(CARDS)
        == sorted(p.stem for p in package_dir("data_cards").glob("*.md"))
        == sorted(c.name for c in CARDS.values())
    )


@each
def test_header_has_the_required_keys(name):
    meta = CARDS[name].meta
    assert HUB_KEYS <= set(meta)
    assert set(meta["puma"]) - {"roots"} == KEYS
    assert set(meta["puma"].get("roots", {})) <= set(meta["puma"]["columns"])
    assert all(
        isinstance(meta[k], list) and meta[k]
        for k in ("language", "task_categories", "size_categories", "source_datasets")
    )
    for size in meta["size_categories"]:
        assert re.fullmatch(r"(\d+[KMBT]?)?<?n[<>]\d+[KMBT]", size), size
    assert isinstance(meta["license"], str) and isinstance(meta["pretty_name"], str)


@each
def test_where_the_set_is_and_how_it_comes(name):
    p = CARDS[name].meta["puma"]
    assert p["stage"] and set(p["stage"]) <= set(STAGES) and len(set(p["stage"])) == len(p["stage"])
    assert p["format"] in FORMATS and isinstance(p["split"], str) and p["split"]
    assert re.fullmatch(r"[\w.-]+/[\w.-]+|https://\S+", p["home"]), p["home"]
    assert re.search(r"\d|Table", p["paper"])


@each
def test_columns_map_to_our_fields(name):
    columns, stages = CARDS[name].meta["puma"]["columns"], CARDS[name].stage
    fields = {f for v in columns.values() for f in (v if isinstance(v, list) else [v])}
    assert fields and fields <= set(FIELDS)
    if "question" in fields: assert "answer" in fields and "image" in fields
    if "instruct-edit" in stages:
        assert {"source", "instruction", "target"} <= fields
    if "instruct-condition" in stages:
        assert {"source", "caption", "target"} <= fields
    if "instruct-t2i" in stages: assert {"image", "caption"} <= fields


@each
def test_filters_are_known_rules(name):
    p = CARDS[name].meta["puma"]
    assert set(p["filters"]) == set(p["stage"])
    for rules in p["filters"].values():
        for rule, value in rules.items():
            assert isinstance(value, RULES[rule]), (rule, value)
        assert rules.get("crop", "center") in CROPS
        assert set(rules.get("nonempty", [])) <= set(FIELDS)
        assert set(rules.get("drop_subsets", {"column": 0, "match": 0})) == {"column", "match"}
        assert set(rules.get("dedup_with", [])) <= set(CARDS) - {name}
    if "decoders" in p["stage"]:
        assert p["filters"]["decoders"] == {"min_side": 512, "crop": "center"}  # A.1.1


@each
def test_weights_say_where_they_come_from(name):
    p = CARDS[name].meta["puma"]
    assert set(p["weight"]) == set(p["stage"]) - {"eval"}
    for w in p["weight"].values():
        assert set(w) == {"share", "source"} and 0 < w["share"] <= 1
        assert re.match(r"ours\b|[1-6A-D]\.[\d.]+$", w["source"]), w["source"]


@pytest.mark.parametrize("stage", [s for s in STAGES if s != "eval"])
def test_shares_of_a_stage_add_up(stage):
    shares = [c.meta["puma"]["weight"][stage]["share"] for c in CARDS.values() if stage in c.stage]
    assert sum(shares) == pytest.approx(1)


def test_what_the_paper_says_of_shares():
    weight = lambda name: CARDS[name].meta["puma"]["weight"]["instruct-t2i"]
    # "with a data ratio 1:1"
    assert weight("laion-aesthetics") == weight("journeydb") == {"share": 0.5, "source": "A.2.4"}


@each
def test_body_is_for_a_student(name):
    about = CARDS[name].about
    assert about.startswith("# ") and 120 <= len(about.split()) <= 250
    for part in ("**Licence.**", "**Known problems.**", "**Use.**"):
        assert about.count(part) == 1, part


def test_every_set_has_a_stand_in():
    assert all(c.standin for c in CARDS.values())


@pytest.mark.parametrize("name", sorted(n for n, c in CARDS.items() if c.standin))
def test_stand_in_builds_a_sample(name):
    s = world_samples(CARDS[name].standin, 1)[0]
    assert any(g.supervised for g in s["segments"])
    for g in s["segments"]:
        if g.kind == "image": assert s["images"][g.image].shape[0] == 3
        else: assert g.text


# ---- headers that are refused

GOOD = dict(pretty_name="A set", puma=dict(stage=["pretrain"], standin="t2i"))


def write(folder, header, body="About it.\n"):
    path = folder / "some-set.md"
    header = header if isinstance(header, str) else yaml.safe_dump(header)
    path.write_text(f"---\n{header}---\n{body}")
    return path


def test_a_small_card_is_read(tmp_path):
    card = read_card(write(tmp_path, GOOD))
    assert (card.name, card.title, card.about) == ("some-set", "A set", "About it.")
    assert (card.stage, card.standin) == (["pretrain"], "t2i")
    without = {**GOOD, "puma": {"stage": ["pretrain"], "standin": ""}}
    assert read_card(write(tmp_path, without)).standin == ""


def test_rules_in_the_body_belong_to_the_body(tmp_path):
    assert read_card(write(tmp_path, GOOD, "One.\n\n---\n\nTwo.\n")).about == "One.\n\n---\n\nTwo."


@pytest.mark.parametrize("header, says", [
    ({"puma": GOOD["puma"]}, "pretty_name"),
    ({"pretty_name": "A set"}, "puma"),
    ({**GOOD, "puma": {**GOOD["puma"], "standin": "dreams"}}, "unknown stand-in 'dreams'")])
def test_a_broken_header_is_refused(tmp_path, header, says):
    with pytest.raises(UserError, match=says) as e:
        read_card(write(tmp_path, header))
    assert "some-set.md" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "text", ["", "# A set\n\nNo header.\n", "---\npretty_name: A set\nno end\n"]
)
def test_a_missing_header_is_refused(tmp_path, text):
    path = tmp_path / "some-set.md"
    path.write_text(text)
    with pytest.raises(UserError, match="no YAML header"): read_card(path)


@pytest.mark.parametrize(
    "header",
    [
        "pretty_name: [A set\n", "- a\n- list\n", "",
        {**GOOD, "puma": None},
        {**GOOD, "puma": {"standin": "t2i"}},
    ],
    ids=["not YAML", "a list", "empty", "puma is empty", "no stage"],
)
def test_a_header_of_another_shape_is_refused(tmp_path, header):
    with pytest.raises(UserError, match="some-set.md"):
        read_card(write(tmp_path, header))
