"""Weight files: three formats, from paths and URLs, and everything that can be wrong with one."""
import io
import os
import pickle
import re
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from timm.data import ImageNetInfo
from timm.utils import ModelEmaV3

import golden
import loopback
from metaformer_edu.core.errors import WeightsError
from metaformer_edu.models.registry import MODELS, create_model
from metaformer_edu.models.weights import load_weights, pick_1k, read_weights, rows_21k_to_1k, save_weights, url_of

TINY = [f"tiny_{f}" for f in golden.FAMILIES]
each_tiny = pytest.mark.parametrize("name", TINY)
# a linear and an MLP head: the layer with the classes
HEADS = {"tiny_poolformerv2": "head", "tiny_caformer": "head.fc2"}
each_head = pytest.mark.parametrize("name, last", HEADS.items(), ids=list(HEADS))
WIDTH = MODELS["tiny_caformer"].dims[-1]
X = golden.images(64, dtype=torch.float32)


@pytest.fixture
def site():
    with loopback.serve() as site:
        yield site


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    return loopback.use_cache(monkeypatch, tmp_path / "torch")


def teacher(name="tiny_caformer", **kwargs):
    return golden.fill(create_model(name, **kwargs))


def saved(state, path):
    torch.save(state, path)
    return path


def body(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def kept(cache, name="w"):
    "What a download left behind; a half of one would be found, too."
    files = list(cache.iterdir())
    assert all(re.fullmatch(rf"{name}\S*\.pth", p.name) for p in files), files
    return files


@pytest.fixture
def quiet():
    "No warning may be given."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# --- three formats ---

@each_tiny
def test_published_names(name, tmp_path, quiet):
    model = teacher(name)
    assert same(create_model(name, checkpoint=saved(model.state_dict(), tmp_path / "w.pth")), model)


@each_tiny
def test_our_safetensors(name, tmp_path, quiet):
    model = teacher(name)
    path = save_weights(model, tmp_path / "w.safetensors")
    assert path == tmp_path / "w.safetensors" and safetensors.torch.load_file(path).keys() == model.state_dict().keys()
    assert same(create_model(name, checkpoint=path), model)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}  # one key: several are written in random order


def timm_model(family):
    "timm's model with weights that are not ours, and the published eps."
    model = golden.small_timm(family).eval()
    model.load_state_dict({k: golden.weight(k, v.shape) for k, v in model.state_dict().items()})
    if family != "poolformerv2":
        model.head.fc.norm.eps = 1e-5
    return model


@pytest.mark.parametrize("family", ["poolformerv2", "convformer", "caformer"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timm_names(family, suffix, tmp_path, quiet):
    theirs, path = timm_model(family), tmp_path / f"timm{suffix}"
    save = safetensors.torch.save_file if suffix == ".safetensors" else torch.save
    save(theirs.state_dict(), path)
    ours = create_model(f"tiny_{family}", checkpoint=path, **golden.SMALL).eval()
    torch.testing.assert_close(ours(X), theirs(X), rtol=1e-4, atol=1e-4)


def test_timm_names_with_other_classes_and_channels(tmp_path):
    path = saved(timm_model("caformer").state_dict(), tmp_path / "timm.pth")
    with pytest.warns(UserWarning):
        assert create_model("tiny_caformer", checkpoint=path, in_chans=1,
                            **{**golden.SMALL, "num_classes": 3})(X[:, :1]).shape == (2, 3)


def test_old_torch_files_are_read(tmp_path):
    # published files are of this kind: torch.save before 1.6
    model = teacher()
    torch.save(model.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(create_model("tiny_caformer", checkpoint=tmp_path / "old.pth"), model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_another_precision_are_converted(dtype, tmp_path):
    path = save_weights(teacher().to(dtype), tmp_path / "w.safetensors")
    model = create_model("tiny_caformer", checkpoint=path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(model.eval()(X), teacher()(X), rtol=0.1, atol=0.1 if dtype == torch.bfloat16 else 1e-5)


def test_saving_keeps_the_model_and_its_memory_format(tmp_path):
    model = teacher().to(memory_format=torch.channels_last)
    path = save_weights(model, tmp_path / "w.safetensors")
    assert same(load_weights(create_model("tiny_caformer"), path), model)
    assert model.downsample_layers[0].conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_saving_under_a_name_that_would_not_be_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match="safetensors"):
        save_weights(teacher(), tmp_path / "w.pth")
    assert not any(tmp_path.glob("w*"))


# --- saving is all or nothing ---

def test_a_missing_folder(tmp_path):
    with pytest.raises(WeightsError, match="there is no folder") as error:
        save_weights(teacher(), tmp_path / "gone/w.safetensors")
    assert str(tmp_path / "gone/w.safetensors") in str(error.value) and str(error.value).count("\n") == 0
    assert not any(tmp_path.iterdir())


def test_a_file_for_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match="Cannot write"):
        save_weights(teacher(), tmp_path / "file/w.safetensors")


def test_a_folder_in_the_way(tmp_path):
    (tmp_path / "w.safetensors").mkdir()
    with pytest.raises(WeightsError, match="directory"):
        save_weights(teacher(), tmp_path / "w.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(WeightsError, match="Permission denied"):
        save_weights(teacher(), tmp_path / "w.safetensors")


@pytest.fixture
def small_disk():
    "No file may grow beyond 100 kB; Python makes this an OSError, as it does a full disk."
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, small_disk):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"the old file")
    with pytest.raises(WeightsError, match="too large") as error:
        save_weights(teacher(), path)
    assert str(path) in str(error.value)
    assert path.read_bytes() == b"the old file" and list(tmp_path.iterdir()) == [path]


def test_an_error_of_safetensors_is_ours(tmp_path, monkeypatch):
    def save(*args, **kwargs):
        raise safetensors.SafetensorError("I/O error: broken")
    monkeypatch.setattr(safetensors.torch, "save", save)
    with pytest.raises(WeightsError, match="w.safetensors: I/O error: broken"):
        save_weights(teacher(), tmp_path / "w.safetensors")


@pytest.mark.parametrize("stopped", [KeyboardInterrupt, OSError])
def test_what_stops_before_the_rename_leaves_nothing(stopped, tmp_path, monkeypatch):
    path, first = tmp_path / "w.safetensors", teacher()
    save_weights(first, path)

    def replace(*args):
        assert len(list(tmp_path.iterdir())) == 2  # in the same folder: a rename across disks is a copy
        raise stopped("stop")
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(WeightsError if stopped is OSError else stopped):
        save_weights(create_model("tiny_caformer"), path)
    assert list(tmp_path.iterdir()) == [path] and same(load_weights(create_model("tiny_caformer"), path), first)


@pytest.mark.skipif(os.name != "posix", reason="modes of files as on Linux and macOS")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_others_may_read_it_if_they_may_read_other_files(umask, tmp_path):
    before = os.umask(umask)
    try:
        path = save_weights(teacher(), tmp_path / "w.safetensors")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_saving_again_replaces(tmp_path):
    save_weights(create_model("tiny_caformer"), tmp_path / "w.safetensors")
    path = save_weights(teacher(), tmp_path / "w.safetensors")
    assert same(load_weights(create_model("tiny_caformer"), path), teacher()) and list(tmp_path.iterdir()) == [path]


# --- training checkpoints ---

WRAPPED = {
    "state_dict": lambda good, bad: {"state_dict": good, "epoch": 3, "arch": "caformer_s18"},
    "EMA is preferred": lambda good, bad: {"state_dict": bad, "state_dict_ema": good, "optimizer": {"state": {}}},
    "EMA is None": lambda good, bad: {"state_dict": good, "state_dict_ema": None},
    "model": lambda good, bad: {"model": good},
    "DDP": lambda good, bad: {"state_dict": {f"module.{k}": v for k, v in good.items()}},
    "compiled": lambda good, bad: {f"_orig_mod.{k}": v for k, v in good.items()},
    "compiled in DDP": lambda good, bad: {f"module._orig_mod.{k}": v for k, v in good.items()},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=list(WRAPPED))
def test_training_checkpoints(wrap, tmp_path, quiet):
    good, bad = teacher(), create_model("tiny_caformer")
    path = saved(wrap(good.state_dict(), bad.state_dict()), tmp_path / "checkpoint-3.pth.tar")
    assert same(create_model("tiny_caformer", checkpoint=path), good)


def resumable(model, ema=None):
    "What a training run writes to go on from: weights, optimizer, scaler, random states, and plain numbers."
    optimizer = torch.optim.AdamW(model.parameters())
    model(X).sum().backward()
    optimizer.step()
    state = dict(epoch=3, best=dict(epoch=2, val_top1=81.5),
                 args=dict(model="tiny_caformer", lr=4e-3, aa=None, model_ema=ema is not None),
                 state_dict=model.state_dict(), optimizer=optimizer.state_dict(),
                 scaler=torch.amp.GradScaler("cpu").state_dict(),
                 rng=[torch.get_rng_state()], log=[dict(epoch=1, train_loss=2.3)])
    return state | (dict(state_dict_ema=ema.state_dict()) if ema else {})


def test_a_resumable_state_without_ema(tmp_path, quiet):
    model = teacher()
    path = saved(resumable(model), tmp_path / "state.pt")
    assert same(create_model("tiny_caformer", checkpoint=path), model)
    assert read_weights(path).keys() == read_weights(path, use_ema=False).keys() == model.state_dict().keys()


def test_a_resumable_state_with_ema(tmp_path, quiet):
    model = teacher()
    ema = ModelEmaV3(model).module
    path = saved(resumable(model, ema), tmp_path / "state.pt")
    assert not same(model, ema)
    assert same(create_model("tiny_caformer", checkpoint=path), ema)  # as timm does
    for use_ema, expected in ((True, ema), (False, model)):
        state = read_weights(path, use_ema=use_ema)
        assert all(torch.equal(state[k], v) for k, v in expected.state_dict().items())


def test_state_dict_of_a_compiled_model(tmp_path):
    model = teacher()
    state = torch.compile(model).state_dict()  # nothing is compiled before the first call
    assert all(k.startswith("_orig_mod.") for k in state)
    assert same(create_model("tiny_caformer", checkpoint=saved(state, tmp_path / "w.pth")), model)


# --- from where ---

def test_paths_in_every_form(tmp_path, monkeypatch, quiet):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = teacher()
    path = saved(model.state_dict(), tmp_path / "w.pth")
    for source in (path, str(path), "~/w.pth", Path("~/w.pth"), "w.pth", "./w.pth", f"{tmp_path}//w.pth"):
        assert same(create_model("tiny_caformer", checkpoint=source), model), source
        assert same(load_weights(create_model("tiny_caformer"), source), model), source
    assert path.exists()
    assert save_weights(model, "~/again.safetensors").is_file() and (tmp_path / "again.safetensors").is_file()


def test_load_weights_gives_back_the_model_it_filled(tmp_path):
    model = create_model("tiny_caformer")
    assert load_weights(model, saved(teacher().state_dict(), tmp_path / "w.pth")) is model


def test_url_is_downloaded_once_with_a_progress_bar(site, cache, capfd, quiet):
    model = teacher()
    site.files["/some/where/w.pth"] = body(model.state_dict())
    assert same(create_model("tiny_caformer", checkpoint=site / "some/where/w.pth"), model)
    assert "100%" in capfd.readouterr().err
    assert len(kept(cache)) == 1
    assert same(create_model("tiny_caformer", checkpoint=site / "some/where/w.pth"), model)
    assert site.requests == ["/some/where/w.pth"] and "%" not in capfd.readouterr().err


def test_two_addresses_with_one_file_name_are_two_files(site):
    models = [teacher(), create_model("tiny_caformer")]
    for i, model in enumerate(models):
        site.files[f"/{i}/best.pth"] = body(model.state_dict())
    for i, model in enumerate(models):
        assert same(create_model("tiny_caformer", checkpoint=site / f"{i}/best.pth"), model)


def test_url_of_safetensors_with_a_query(site, tmp_path):
    model = teacher()
    site.files["/w.safetensors"] = save_weights(model, tmp_path / "w.safetensors").read_bytes()
    assert same(create_model("tiny_caformer", checkpoint=site / "w.safetensors?download=true"), model)


def test_pretrained_fetches_the_published_file_once(site, cache, monkeypatch, capfd, quiet):
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    model, path = create_model("identityformer_s12"), "/sail/dl/resolve/main/identityformer/identityformer_s12.pth"
    site.files[path] = body(model.state_dict())
    assert same(create_model("identityformer_s12", pretrained=True), model)
    assert "100%" in capfd.readouterr().err
    assert same(create_model("identityformer_s12", pretrained=True), model)
    assert site.requests == [path] and len(kept(cache, "identityformer_s12")) == 1


def test_a_published_name_is_fetched(site, cache, monkeypatch, quiet):
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    model, path = create_model("identityformer_s12"), "/sail/dl/resolve/main/identityformer/identityformer_s12.pth"
    site.files[path] = body(model.state_dict())
    assert same(create_model("identityformer_s12", checkpoint="identityformer_s12"), model)
    assert same(load_weights(create_model("identityformer_s12"), "identityformer_s12"), model)
    assert same(create_model("identityformer_s12", pretrained=True), model)
    assert read_weights("identityformer_s12").keys() == model.state_dict().keys()
    assert site.requests == [path] and len(kept(cache, "identityformer_s12")) == 1


def test_a_file_here_goes_before_a_published_name(site, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    monkeypatch.chdir(tmp_path)
    model = teacher()
    saved(model.state_dict(), tmp_path / "caformer_s18")
    assert same(create_model("tiny_caformer", checkpoint="caformer_s18"), model)
    (tmp_path / "caformer_s36").mkdir()  # a folder holds no weights
    with pytest.raises(WeightsError, match="Could not download"):
        create_model("tiny_caformer", checkpoint="caformer_s36")
    assert url_of("caformer_s18") is None and url_of("caformer_s36") == MODELS["caformer_s36"].url


def test_pretrained_means_the_published_weights_whatever_lies_here(site, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "identityformer_s12").write_text("my notes")
    with pytest.raises(WeightsError, match="404"):
        create_model("identityformer_s12", pretrained=True)


@pytest.mark.parametrize("source", ["tiny_caformer", "caformer_s81", "caformer_s18.pth", "edu_caformer_s18", "", "."])
def test_neither_a_file_nor_a_published_name(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError,
                       match="There is no weight file .*nor a published model.*path or URL.*caformer_s18") as error:
        read_weights(source)
    assert source in str(error.value)


def test_a_broken_download_by_name_is_not_kept(site, cache, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    site.files["/sail/dl/resolve/main/caformer/caformer_s18.pth"] = b"<html>"
    with pytest.raises(WeightsError, match="damaged"):
        read_weights("caformer_s18")
    assert not any(cache.iterdir())


def test_checkpoint_goes_before_pretrained(site, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    model = teacher()
    assert same(create_model("tiny_caformer", pretrained=True,
                             checkpoint=saved(model.state_dict(), tmp_path / "w.pth")), model)
    assert not site.requests


# --- no network ---

def assert_says_what_to_do(error, url, cache, name="w"):
    text = str(error.value)
    assert url in text and "checkpoint=" in text and re.search(rf"{re.escape(str(cache))}/{name}\S*\.pth", text)


def test_404(site, cache):
    with pytest.raises(WeightsError, match="404") as error:
        create_model("tiny_caformer", checkpoint=site / "w.pth")
    assert_says_what_to_do(error, site / "w.pth", cache)
    assert not any(cache.iterdir())


def test_nobody_listens(cache):
    url = loopback.nobody()
    with pytest.raises(WeightsError, match="refused") as error:
        create_model("tiny_caformer", checkpoint=f"{url}/w.pth")
    assert_says_what_to_do(error, f"{url}/w.pth", cache)


def test_pretrained_without_network(monkeypatch, cache):
    monkeypatch.setenv("HF_ENDPOINT", loopback.nobody())
    with pytest.raises(WeightsError) as error:
        create_model("caformer_s18", pretrained=True)
    assert_says_what_to_do(error, MODELS["caformer_s18"].url, cache, "caformer_s18")


def test_a_server_that_does_not_speak_http(cache):
    with loopback.not_http() as url, pytest.raises(WeightsError) as error:
        create_model("tiny_caformer", checkpoint=f"{url}/w.pth")
    assert_says_what_to_do(error, f"{url}/w.pth", cache)


def test_malformed_url(cache):
    with pytest.raises(WeightsError, match="http://"):
        create_model("tiny_caformer", checkpoint="http:///w.pth")


def test_url_without_a_file_name(site, cache):
    with pytest.raises(WeightsError):
        create_model("tiny_caformer", checkpoint=site / "")
    with pytest.raises(WeightsError):  # the second time the folder of the cache exists
        create_model("tiny_caformer", checkpoint=site / "")


def test_put_where_the_message_says_the_file_is_found(cache):
    model, url = teacher(), loopback.nobody() + "/w.pth"
    with pytest.raises(WeightsError) as error:
        create_model("tiny_caformer", checkpoint=url)
    where = re.search(r"put it at (\S+?)\.?$", str(error.value))[1]
    saved(model.state_dict(), where)
    assert same(create_model("tiny_caformer", checkpoint=url), model)


def truncated(site, good):
    site.cut = len(good) // 2
    return good


def broken_chunks(site, good):
    site.chunked = True
    return good


def nothing(site, good):
    return b""


def html(site, good):
    return b"<html>Please log in to the hotel's network.</html>"


@pytest.mark.parametrize("spoil", [truncated, broken_chunks, nothing, html])
def test_a_broken_download_is_an_error_and_is_not_kept(spoil, site, cache):
    good, model = body(teacher().state_dict()), create_model("tiny_caformer")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    site.files["/w.pth"] = spoil(site, good)
    with pytest.raises(WeightsError):
        load_weights(model, site / "w.pth")
    assert not any(cache.iterdir())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    site.files["/w.pth"], site.cut, site.chunked = good, 0, False  # so it can be tried again
    assert same(load_weights(model, site / "w.pth"), teacher())


def test_weights_of_another_model_stay_in_the_cache(site, cache):
    # the download is good, only the wrong one: no need to fetch it again
    site.files["/w.pth"] = body(teacher("tiny_convformer").state_dict())
    with pytest.raises(WeightsError, match="do not fit"):
        create_model("tiny_caformer", checkpoint=site / "w.pth")
    assert len(kept(cache)) == 1


# --- files that are no weights ---

class Code:
    "What a malicious pickle holds: unpickling it makes a folder."
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def zipped(thing, path):
    torch.save({"norm.weight": thing}, path)


def legacy(thing, path):
    torch.save({"norm.weight": thing}, path, _use_new_zipfile_serialization=False)


def bare(thing, path):
    path.write_bytes(pickle.dumps({"norm.weight": thing}, protocol=2))


@pytest.mark.parametrize("write", [zipped, legacy, bare])
def test_code_in_a_pickle_is_refused_and_does_not_run(write, tmp_path):
    path = tmp_path / "w.pth"
    write(Code(tmp_path / "owned"), path)
    with pytest.raises(WeightsError, match="run code" if write is not bare else None) as error:
        create_model("tiny_caformer", checkpoint=path)
    assert not (tmp_path / "owned").exists() and str(path) in str(error.value)
    assert path.exists()
    if write is not bare:  # the file is a working one: without the guard it would have run
        torch.load(path, weights_only=False)
        assert (tmp_path / "owned").exists()


def test_code_that_comes_over_the_network_does_not_run(site, cache, tmp_path):
    zipped(Code(tmp_path / "owned"), tmp_path / "w.pth")
    site.files["/w.pth"] = (tmp_path / "w.pth").read_bytes()
    with pytest.raises(WeightsError, match="run code"):
        create_model("tiny_caformer", checkpoint=site / "w.pth")
    assert not (tmp_path / "owned").exists() and not any(cache.iterdir())


def test_torch_load_is_asked_for_weights_only(tmp_path, monkeypatch):
    asked, load = [], torch.load
    monkeypatch.setattr(torch, "load",
                        lambda *args, **kwargs: asked.append(kwargs.get("weights_only")) or load(*args, **kwargs))
    read_weights(saved(teacher().state_dict(), tmp_path / "w.pth"))
    assert asked == [True]


def test_the_package_never_asks_for_more():
    import metaformer_edu
    for path in Path(metaformer_edu.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"weights_only\s*=\s*False", text), path.name
        calls = re.findall(r"(?<!safetensors\.)torch\.load\([^\n]*", text)  # safetensors hold no code
        assert all("weights_only=True" in c for c in calls), f"{path.name}: {calls}"


BROKEN = {
    "missing": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "empty": lambda path: path.touch(),
    "text": lambda path: path.write_text("not weights"),
    "half a file": lambda path: path.write_bytes(body(teacher().state_dict())[:100_000]),
    "a whole model": lambda path: torch.save(teacher(), path),
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "a list": lambda path: torch.save([torch.zeros(3)], path),
    "numbers": lambda path: torch.save({"norm.weight": 3.}, path),
    "no names": lambda path: torch.save({0: torch.zeros(3)}, path),
    "no tensors": lambda path: torch.save({}, path),
    "another model": lambda path: torch.save(teacher("tiny_convformer").state_dict(), path),
    "a key missing":
        lambda path: torch.save({k: v for k, v in teacher().state_dict().items() if k != "norm.bias"}, path),
    "a key left over": lambda path: torch.save({**teacher().state_dict(), "extra": torch.zeros(1)}, path),
    "another shape": lambda path: torch.save({**teacher().state_dict(), "norm.bias": torch.zeros(3)}, path),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("write", BROKEN.values(), ids=list(BROKEN))
def test_a_wrong_file_is_an_error_and_changes_neither_model_nor_file(write, suffix, tmp_path):
    path, model = tmp_path / f"w{suffix}", create_model("tiny_caformer")
    write(path)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    existed, content = path.exists(), path.is_file() and path.read_bytes()
    with pytest.raises(WeightsError) as error:
        load_weights(model, path)
    assert str(path) in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert path.exists() == existed and (not content or path.read_bytes() == content)


@pytest.mark.parametrize("source", ["./w.pth", "~/w.pth", "folder/../w.pth", ".//w.pth"])
def test_a_damaged_file_of_the_user_is_never_deleted(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "w.pth").write_text("half of two weeks of training")
    with pytest.raises(WeightsError):
        read_weights(source)
    assert (tmp_path / "w.pth").exists()


# --- what a mismatch says ---

def message(state, tmp_path, name="tiny_caformer", **kwargs):
    with pytest.raises(WeightsError) as error, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        create_model(name, checkpoint=saved(state, tmp_path / "w.pth"), **kwargs)
    return str(error.value)


def test_mismatch_names_the_first_missing_keys(tmp_path):
    state = {k: v for k, v in teacher().state_dict().items() if not k.startswith("stages.0.")}
    gone = [k for k in teacher().state_dict() if k not in state]
    text = message(state, tmp_path)
    assert f"{len(gone)} missing: {', '.join(gone[:3])}, …" in text and gone[3] not in text
    assert "left over" not in text and "shape" not in text


def test_mismatch_names_the_first_left_over_keys(tmp_path):
    text = message({**teacher().state_dict(), **{f"extra{i}": torch.zeros(1) for i in range(5)}}, tmp_path)
    assert "5 left over: extra0, extra1, extra2, …" in text and "missing" not in text


def test_mismatch_names_shapes(tmp_path):
    text = message({**teacher().state_dict(), "norm.weight": torch.zeros(7), "norm.bias": torch.zeros(9, 9)}, tmp_path)
    assert (
        f"2 of another shape: norm.weight (7,) for ({WIDTH},), norm.bias (9, 9) for ({WIDTH},)" in text
        and "…" not in text
    )


def test_mismatch_names_all_kinds_at_once(tmp_path):
    state = {**teacher().state_dict(), "norm.weight": torch.zeros(7), "extra": torch.zeros(1)}
    del state["norm.bias"]
    text = message(state, tmp_path)
    assert "1 missing: norm.bias" in text and "1 left over: extra" in text and "1 of another shape: norm.weight" in text
    assert str(tmp_path / "w.pth") in text and len(text) < 400 + len(str(tmp_path))


def test_mismatch_of_families_is_short(tmp_path):
    text = message(teacher("tiny_poolformerv2").state_dict(), tmp_path)
    assert (
        "missing: stages.0.0.token_mixer.pwconv1.weight" in text
        and "left over: head.weight, head.bias" in text
        and len(text) < 700
    )


# --- another number of classes ---

@each_head
@pytest.mark.parametrize("classes", [3, 1000])
def test_another_number_of_classes_starts_a_new_classifier_and_says_so(name, last, classes, tmp_path):
    model = teacher(name)
    path = saved(model.state_dict(), tmp_path / "w.pth")
    with pytest.warns(UserWarning) as said:
        student = create_model(name, checkpoint=path, num_classes=classes)
    assert len(said) == 1 and "10" in str(said[0].message) and str(classes) in str(said[0].message)
    for k, v in student.state_dict().items():
        if k.startswith(f"{last}.") and k.rsplit(".", 1)[0] == last:
            assert len(v) == classes and v.isfinite().all() and v.abs().max() < 0.2  # fresh: std 0.02, biases 0
            assert (v == 0).all() if k.endswith("bias") else v.std() > 0.01
        else:
            assert torch.equal(v, model.state_dict()[k]), k  # all else, the rest of an MLP head too
    assert student(X).shape == (2, classes)


@each_head
def test_the_same_number_of_classes_keeps_the_classifier(name, last, tmp_path, quiet):
    model = teacher(name, num_classes=7)
    assert same(create_model(name, checkpoint=saved(model.state_dict(), tmp_path / "w.pth"), num_classes=7), model)


@each_head
def test_no_classes_load_all_but_the_head(name, last, tmp_path, quiet):
    model = teacher(name)
    student = create_model(name, checkpoint=saved(model.state_dict(), tmp_path / "w.pth"), num_classes=0).eval()
    torch.testing.assert_close(student(X), model.forward_head(model.forward_features(X), pre_logits=True))


def test_the_warning_points_to_the_caller(tmp_path):
    path = saved(teacher().state_dict(), tmp_path / "w.pth")
    with pytest.warns(UserWarning) as said:
        load_weights(create_model("tiny_caformer", num_classes=3), path)
    assert said[0].filename == __file__


# --- from ImageNet-21K to 1K ---

FEW, MANY = ImageNetInfo("imagenet-1k"), ImageNetInfo("imagenet-22k")


def test_999_classes_have_a_row_of_the_same_wordnet_id():
    rows = rows_21k_to_1k()
    assert rows.shape == (1000,) and rows.dtype == torch.int64 and MANY.num_classes() == 21841
    assert (rows < 0).nonzero().flatten().tolist() == [850] and rows[850] == -1
    assert rows.max() < 21841 and len(rows.unique()) == 1000
    for i, row in enumerate(rows.tolist()):
        if row >= 0:
            assert FEW.index_to_label_name(i) == MANY.index_to_label_name(row) and FEW.index_to_description(
                i
            ) == MANY.index_to_description(row)
    assert FEW.label_names()[850] not in MANY.label_names() and "teddy" in FEW.index_to_description(850)


def test_the_map_is_made_once_and_on_the_cpu():
    rows_21k_to_1k.cache_clear()
    with torch.device("meta"):
        assert rows_21k_to_1k().device.type == "cpu"
    assert rows_21k_to_1k() is rows_21k_to_1k()


def test_pick_1k():
    for head in (torch.randn(21841, 3), torch.randn(21841), torch.randn(21841, 3).bfloat16()):
        picked, rows = pick_1k(head), rows_21k_to_1k()
        has = rows >= 0
        assert picked.dtype == head.dtype and torch.equal(picked[has], head[rows[has]])
        torch.testing.assert_close(picked[850], head.mean(0))
        assert rows_21k_to_1k()[850] == -1  # the map stays as it is


def knows_21k(family, form, tmp_path):
    "(a network with 21,841 classes, a file of its weights, arguments that build ours)"
    if form == "timm":
        theirs = golden.small_timm(family)
        theirs.reset_classifier(21841)
        theirs.load_state_dict({k: golden.weight(k, v.shape) for k, v in theirs.state_dict().items()})
        if family != "poolformerv2":
            theirs.head.fc.norm.eps = 1e-5
        return (
            theirs.eval(),
            saved(theirs.state_dict(), tmp_path / "timm.pth"),
            {k: v for k, v in golden.SMALL.items() if k != "num_classes"},
        )
    model = teacher(f"tiny_{family}", num_classes=21841)
    return (
        model,
        save_weights(model, tmp_path / "w.safetensors")
        if form == "ours"
        else saved(model.state_dict(), tmp_path / "w.pth"),
        {},
    )


@pytest.mark.parametrize("form", ["published", "timm", "ours"])
@pytest.mark.parametrize("family", ["poolformerv2", "convformer", "caformer"])
@torch.inference_mode()
def test_a_21k_head_becomes_a_1k_head(family, form, tmp_path):
    big, path, build = knows_21k(family, form, tmp_path)
    with pytest.warns(UserWarning) as said:
        model = create_model(f"tiny_{family}", checkpoint=path, num_classes=1000, **build).eval()
    text = str(said[0].message)
    assert len(said) == 1 and "anew" not in text and all(w in text for w in ("21841", "1000", "WordNet", "850", "mean"))
    logits, has = big(X), torch.arange(1000) != 850
    torch.testing.assert_close(model(X)[:, has], logits[:, rows_21k_to_1k()[has]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(X)[:, 850], logits.mean(1), rtol=1e-4, atol=1e-4)
    if form != "timm":  # all else as it was, fc1 and norm of an MLP head too
        last = "head.fc2." if model.mlp_head else "head."
        assert all(torch.equal(v, big.state_dict()[k])
                   for k, v in model.state_dict().items() if not k.startswith(last) or k.count(".") != last.count("."))


@pytest.mark.parametrize("known, wanted", [(21841, 999), (21841, 1001), (21842, 1000), (1000, 21841)])
def test_other_pairs_of_classes_start_anew(known, wanted, tmp_path):
    path = saved(teacher("tiny_poolformerv2", num_classes=known).state_dict(), tmp_path / "w.pth")
    with pytest.warns(UserWarning, match="head starts anew"):
        model = create_model("tiny_poolformerv2", checkpoint=path, num_classes=wanted)
    assert model.head.weight.std() < 0.03 and not model.head.bias.any()


def test_21k_weights_in_a_21k_model_keep_their_head(tmp_path, quiet):
    model = teacher("tiny_poolformerv2", num_classes=21841)
    path = saved(model.state_dict(), tmp_path / "w.pth")
    assert same(create_model("tiny_poolformerv2", checkpoint=path, num_classes=21841), model)
    assert create_model("tiny_poolformerv2", checkpoint=path, num_classes=0)(X).shape == (2, WIDTH)


# --- another number of channels ---

@each_head
def test_grey_images_see_the_sum_of_the_colours(name, last, tmp_path):
    model = teacher(name)
    path = saved(model.state_dict(), tmp_path / "w.pth")
    with pytest.warns(UserWarning, match="stem"):
        grey = create_model(name, checkpoint=path, in_chans=1).eval()
    torch.testing.assert_close(grey(X[:, :1]), model(X[:, :1].expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-3)


def test_four_channels_repeat_the_colours_at_the_same_strength(tmp_path):
    model = teacher()
    path = saved(model.state_dict(), tmp_path / "w.pth")
    with pytest.warns(UserWarning, match="4"):
        four = create_model("tiny_caformer", checkpoint=path, in_chans=4)
    old, new = model.downsample_layers[0].conv.weight, four.downsample_layers[0].conv.weight
    torch.testing.assert_close(new, torch.cat([old, old[:, :1]], 1) * 3 / 4)
    own, state = four.state_dict(), model.state_dict()
    assert all(torch.equal(own[k], state[k]) for k in own if k != "downsample_layers.0.conv.weight")


@pytest.mark.parametrize("channels", [1, 4])
def test_the_same_number_of_channels_needs_no_bridge(channels, tmp_path, quiet):
    model = teacher(in_chans=channels)
    assert same(create_model("tiny_caformer", in_chans=channels,
                             checkpoint=saved(model.state_dict(), tmp_path / "w.pth")), model)


def test_no_bridge_from_one_channel_to_three(tmp_path):
    assert "downsample_layers.0.conv.weight (32, 1, 7, 7) for (32, 3, 7, 7)" in message(
        teacher(in_chans=1).state_dict(), tmp_path
    )


# --- RandFormer and its resolution ---

@pytest.mark.parametrize("trained, wanted", [(64, 96), (96, 64), (224, 64)])
def test_randformer_weights_at_another_resolution_say_why(trained, wanted, tmp_path):
    state = teacher("tiny_randformer", img_size=trained).state_dict()
    text = message(state, tmp_path, "tiny_randformer", img_size=wanted)
    assert "random_matrix" in text and "resolution" in text and f"img_size={trained}" in text


def test_randformer_weights_at_their_resolution(tmp_path, quiet):
    model = teacher("tiny_randformer", img_size=96)
    again = create_model("tiny_randformer", img_size=96, checkpoint=saved(model.state_dict(), tmp_path / "w.pth"))
    assert same(again, model) and not any(p.requires_grad for k, p in again.named_parameters() if "random_matrix" in k)


@pytest.mark.parametrize("size", [(96, 96), (64, 96), (32, 32)])
def test_randformer_on_images_of_another_size_says_why(size):
    with pytest.raises(ValueError, match=r"16 tokens and got \d×\d = \d+.*img_size"):
        create_model("tiny_randformer")(torch.rand(1, 3, *size))


def test_other_families_take_weights_at_any_resolution(tmp_path, quiet):
    for name in set(TINY) - {"tiny_randformer"}:
        model = teacher(name)
        path = saved(model.state_dict(), tmp_path / f"{name}.pth")
        assert same(create_model(name, img_size=96, checkpoint=path), model)
