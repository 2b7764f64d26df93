"""The published training and fine-tuning recipes, metaformer_edu/recipes/*.yaml, against reference/recipes.json."""
import json
import re
from pathlib import Path

import pytest
import yaml

import golden
import metaformer_edu
from metaformer_edu.models.registry import MODELS
from metaformer_edu.models.weights import url_of

FOLDER = Path(metaformer_edu.__file__).parent / "recipes"
PUBLISHED = {f"{r['model']}_{r['kind']}": r
             for r in json.loads((golden.REFERENCE / "recipes.json").read_text(encoding="utf-8"))}
OURS = "caformer_s18_in21ft1k_finetune"  # no script was published
SCHED = {"cosine": "cosine", "constant": "None"}  # 'None' is what the published command calls a constant rate
each_recipe = pytest.mark.parametrize("name", sorted(PUBLISHED))


def text(name):
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def wanted(row):
    "What the file of a published recipe must hold, written down from the reference alone."
    same = ("model", "img_size", "global_batch", "epochs", "lr", "warmup_epochs", "opt", "drop_path", "head_dropout",
            "mixup", "cutmix")
    keys = {k: row[k] for k in same} | {"sched": SCHED[row["sched"]]}
    if row["kind"] == "train":
        return keys | {"min_lr": 1e-5, "warmup_lr": 1e-6, "cooldown_epochs": 10}
    return keys | {"initial_checkpoint": re.sub("_384$", "", row["model"]), "model_ema": True,
                   "model_ema_decay": row["ema_decay"]}


def faults(recipe, row):
    "In words, everything in the text of a recipe that is not as published."
    got, want = yaml.safe_load(recipe), wanted(row)
    comments, lines = re.findall(r"^# (.*)", recipe, re.M), re.findall(r"^(\w+):", recipe, re.M)
    found = [f"{k}: {got.get(k)!r}, published {want.get(k)!r}" for k in sorted(got.keys() | want.keys())
             # 1e-4 without a point would be text
             if got.get(k) != want.get(k) or type(got.get(k)) is not type(want.get(k))]
    if len(lines) != len(got):
        found.append(f"{len(lines)} keys in the file, {len(got)} different ones")
    family, size = row["model"].split("_")[:2]
    title = f"{family}-{size} "
    facts = [f" {row['img_size']}", f" top-1 {golden.BY_NAME[row['model']]['published']['top1']} %",
             "Yu et al., TPAMI 2024"]
    first = recipe.splitlines()[0]
    if not first.lower().startswith(f"# {title}"):
        found.append(f"the first line does not begin with a comment on {title}")
    found += [f"the first line does not say {f!r}" for f in facts if f not in first]
    slip = re.search(r"\S+$", row["note"])[0] if row["note"] else None
    said = re.findall(r"--model (\w+)", " ".join(comments))
    if said != ([slip] if slip else []):
        found.append(f"the slip of the published script is {slip}, and the comments name {said}")
    return found


def test_the_31_published_recipes_and_one_of_ours():
    assert len(PUBLISHED) == 31
    assert {p.name for p in FOLDER.iterdir()} == {f"{n}.yaml" for n in (*PUBLISHED, OURS)}


def test_our_recipe_is_the_published_fine_tuning_at_another_size():
    theirs = "caformer_s18_384_finetune"
    own = dict(model="caformer_s18_in21ft1k", initial_checkpoint="caformer_s18_in21k", img_size=224)
    assert yaml.safe_load(text(OURS)) == yaml.safe_load(text(theirs)) | own
    said = text(OURS)
    assert f"top-1 {MODELS[own['model']].top1} %" in said.splitlines()[0] and "We have not run it" in said
    start, end = (MODELS[own[key]] for key in ("initial_checkpoint", "model"))
    assert (start.depths, start.dims, start.num_classes) == (end.depths, end.dims, 21841)


@each_recipe
def test_recipe_is_the_published_one(name):
    assert not faults(text(name), PUBLISHED[name])


@each_recipe
def test_recipe_fits_the_zoo(name):
    recipe = yaml.safe_load(text(name))
    row = MODELS[recipe["model"]]
    assert recipe["img_size"] == row.resolution and f" top-1 {row.top1} %" in text(name).splitlines()[0]
    assert row.data == "in1k" and row.num_classes == 1000
    if "initial_checkpoint" in recipe:  # the same network, trained at 224
        start = MODELS[recipe["initial_checkpoint"]]
        assert (
            url_of(recipe["initial_checkpoint"]) == start.url
            and start.resolution == 224
            and (start.family, start.depths, start.dims) == (row.family, row.depths, row.dims)
        )


def test_every_published_number_of_imagenet_1k_has_its_recipe():
    # numbers after ImageNet-21K have no published script
    assert {
        f"{r.name}_{'train' if r.resolution == 224 else 'finetune'}" for r in MODELS.values() if r.data == "in1k"
    } == PUBLISHED.keys()


def test_files_go_into_the_package():
    setup = (golden.REFERENCE.parent.parent / "setup.py").read_text(encoding="utf-8")
    assert '"recipes/*.yaml"' in setup


# --- these tests see what is wrong ---

BREAKS = {  # what -> (pattern in caformer_s36_384_finetune, what it becomes)
    "another rate": ("^lr: .*", "lr: 2.0e-4"), "a rate that YAML reads as text": ("^lr: .*", "lr: 1e-4"),
    "a whole number for a float": ("^mixup: .*", "mixup: 0"),
          "a float for a whole number": ("^epochs: .*", "epochs: 30.0"),
    "no schedule at all": ("^sched: .*", "sched: null"), "a schedule": ("^sched: .*", "sched: cosine"),
    "the wrong model of the published script": ("^model: .*", "model: caformer_s18_384"),
    "other initial weights": ("^initial_checkpoint: .*", "initial_checkpoint: caformer_s18"),
    "EMA off": ("^model_ema: .*", "model_ema: false"), "EMA as text": ("^model_ema: .*", "model_ema: 'true'"),
    "a key missing": ("^cutmix: .*\n", ""), "a key unknown": (r"\Z", "min_lr: 1.0e-5\n"),
    "a key misspelt": ("^drop_path:", "drop_paths:"), "a key twice": (r"\Z", "opt: lamb\n"),
    "another top-1": (r"top-1 85\.7", "top-1 85.8"), "no source": ("Yu et al., TPAMI 2024", "the paper"),
    "the slip is not said": ("^# The published script.*\n", ""), "no comment": ("^#.*\n", ""),
}


@pytest.mark.parametrize("pattern, instead", BREAKS.values(), ids=list(BREAKS))
def test_a_broken_recipe_is_seen(pattern, instead):
    name = "caformer_s36_384_finetune"
    broken = re.sub(pattern, instead, text(name), count=0 if instead == "" else 1, flags=re.M)
    assert broken != text(name) and not faults(text(name), PUBLISHED[name])
    assert faults(broken, PUBLISHED[name])
