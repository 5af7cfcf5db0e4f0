"""Malicious folders: each is refused with an error that names the fault, before a weight changes."""

import copy
import hashlib
import json
import os
import pickle
import shutil
import struct
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from support.inside import CONFIG, TENSORS, reading
from support.models import fit, model_of
from support.states import same, saved_adapter, with_adapter

import s2ft
from s2ft import S2FTConfig, read_adapter

DOWN, QUERY = "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"
NORM, KEY = "model.norm.weight", "extra_weights/model.norm.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    config = S2FTConfig(q_ratio=0.5, d_ratio=0.1, modules_to_save=["model.norm"])
    return saved_adapter(
        fit(with_adapter(model_of("llama"), config, name="victim"), 1), tmp_path_factory.mktemp("saved")
    )


def rewrite(config=lambda config: None, tensors=lambda tensors: None):
    """Change a folder and write digests that fit the change, as an attacker can do too."""

    def change(folder):
        content, found = json.loads((folder / CONFIG).read_text()), load_file(folder / TENSORS)
        config(content), tensors(found)
        save_file({key: tensor.contiguous() for key, tensor in found.items()}, folder / TENSORS)
        content["tensors_sha256"] = hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
        content.pop("config_sha256", None)
        with suppress(TypeError, KeyError, AttributeError):
            units = {path: entry["units"] for path, entry in sorted(content["projections"].items())}
            content["selection_digest"] = hashlib.sha256(json.dumps(units).encode()).hexdigest()
        (folder / CONFIG).write_text(json.dumps(content))

    return change


def renamed(new):
    """Rename DOWN in both files."""

    def config(content):
        for part in (content["projections"], content["structure"]["locations"]):
            part[new] = part.pop(DOWN)

    def tensors(found):
        for part in ("delta", "index"):
            found[f"{new}.{part}"] = found.pop(f"{DOWN}.{part}")

    return rewrite(config, tensors)


def located(**changes):
    return rewrite(lambda config: config["structure"]["locations"][DOWN].update(changes))


def entry(**changes):
    return rewrite(lambda config: config["projections"][DOWN].update(changes))


def tensor(part, change):
    return rewrite(tensors=lambda found: found.update({f"{DOWN}.{part}": change(found[f"{DOWN}.{part}"])}))


def text(change):
    """Change the text of the config file."""
    return lambda folder: (folder / CONFIG).write_text(change((folder / CONFIG).read_text()))


def raw(content):
    return lambda folder: (folder / CONFIG).write_bytes(content)


def header(change, length=None):
    """Change the header of the safetensors file, and write `length` as its length."""

    def spoil(folder):
        blob = (folder / TENSORS).read_bytes()
        size = struct.unpack("<Q", blob[:8])[0]
        found = json.loads(blob[8 : 8 + size])
        found = change(found) or found
        made = found if isinstance(found, bytes) else json.dumps(found).encode()
        said = struct.pack("<Q", len(made) if length is None else length)
        (folder / TENSORS).write_bytes(said + made + blob[8 + size :])

    return spoil


def extra(value=None, tensors=lambda found: None, name=NORM, **changes):
    """Change the entry of an extra weight, or put a value in its place; and change the tensors."""

    def config(content):
        entries = content["extra_weights"]
        entries[name] = {"dtype": "F32", "shape": [24], **entries.get(name, {}), **changes} if value is None else value

    return rewrite(config, tensors)


def shape(*shape, dtype="F32"):
    return header(lambda found: found[f"{DOWN}.delta"].update(shape=list(shape), dtype=dtype))


def grown(name, size):
    """Extend a file to `size` bytes that need no disk space."""
    return lambda folder: os.truncate(folder / name, size)


def instead(name, make):
    """Put something else in place of a file."""
    return lambda folder: ((folder / name).unlink(), make(folder / name))


def out_of_the_folder(name, relative=False):
    """Move a file out, and link to it."""

    def link(folder):
        outside = folder.parent / f"{folder.name}-outside"
        outside.mkdir()
        (folder / name).rename(outside / name)
        (folder / name).symlink_to(os.path.relpath(outside / name, folder) if relative else outside / name)

    return link


def with_coupling(**changes):
    """Write a coupling with a changed consumer into the config."""

    def config(content):
        producer = dict(
            key="u",
            path="model.layers.1.mlp.up_proj",
            count=52,
            unit=1,
            dim=0,
            start=0,
            stride=None,
            size=None,
            expert=None,
        )
        content["couplings"] = [
            dict(
                kind="ffn",
                layer=0,
                producers=[producer],
                consumer={**producer, "key": "d", "path": DOWN, "dim": 1, **changes},
                vectors=[],
                fixed=False,
                block=None,
                activation=None,
            )
        ]

    return rewrite(config)


HOSTILE = {
    # names
    "path up": (renamed("../../etc/passwd"), "is not the name of a projection"),
    "absolute path": (renamed("/etc/passwd"), "is not the name of a projection"),
    "empty words": (renamed("model..layers"), "is not the name of a projection"),
    "a dunder that is none of the model's": (renamed("__class__.__init__"), "no projection __class__"),
    "control characters": (renamed("model\x1b[2J"), r"'model\\x1b\[2J' is not the name of a projection"),
    "lone surrogate": (text(lambda t: t.replace(DOWN, "model.\\ud800")), r"\\ud800' is not the name of a projection"),
    "null character": (renamed("model.\0"), "is not the name of a projection"),
    "long name": (renamed("a" * 10**5), "is not the name of a projection"),
    "adapter's name up": (rewrite(lambda c: c.update(name="../up")), "word without slashes, got '../up'"),
    "adapter's name hidden": (rewrite(lambda c: c.update(name=".ssh")), "word without slashes"),
    "adapter's name moves the cursor": (rewrite(lambda c: c.update(name="a\x1b[1A")), r"got 'a\\x1b\[1A'"),
    "adapter's name empty": (rewrite(lambda c: c.update(name="")), "word without slashes"),
    "adapter's name long": (rewrite(lambda c: c.update(name="a" * 10**6)), "word without slashes"),
    "adapter's name a list": (rewrite(lambda c: c.update(name=["a"])), "name is missing or not a str"),
    # files that are cut, changed or missing
    "truncated": (lambda f: os.truncate(f / TENSORS, (f / TENSORS).stat().st_size - 100), "truncated or damaged"),
    "empty": (lambda f: os.truncate(f / TENSORS, 0), "truncated or damaged"),
    "one bit": (lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-3] + b"\1\1\1"), "sha256 differs"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), f"no {TENSORS}"),
    "no config": (lambda f: (f / CONFIG).unlink(), f"no {CONFIG}"),
    "other info": (text(lambda t: t.replace('"model_type": "llama"', '"model_type": "other"')), "config_sha256"),
    # the config as JSON
    "not UTF-8": (raw(b'{"schema": 1, "name": "\xff"}'), "is not UTF-8"),
    "UTF-16": (lambda f: (f / CONFIG).write_text((f / CONFIG).read_text(), "utf-16"), "is not UTF-8"),
    "key twice": (text(lambda t: t.replace('"schema"', '"name": "other", "schema"')), "the key 'name' twice"),
    "projection twice": (text(lambda t: t.replace(f'"{QUERY}"', f'"{DOWN}"')), f"the key '{DOWN}' twice"),
    "deep": (raw(b'{"schema": 1, "info": ' + b"[" * 10**5 + b"]" * 10**5 + b"}"), "is nested too deeply|recursion"),
    "deep objects": (raw(b'{"a":' * 10**5 + b"1" + b"}" * 10**5), "is nested too deeply|recursion"),
    "NaN": (text(lambda t: t.replace('"schema": 1', '"schema": NaN')), "NaN is not a number in JSON"),
    "infinity": (text(lambda t: t.replace('"info": {', '"info": {"x": -Infinity,')), "-Infinity is not a number"),
    "long number": (text(lambda t: t.replace('"schema": 1', f'"schema": {"9" * 10**5}')), "is not JSON: Exceeds"),
    "huge schema": (
        text(lambda t: t.replace('"schema": 1', f'"schema": {"9" * 4000}')),
        "has schema 999.* reads schema 1: use the version",
    ),
    "schema true": (text(lambda t: t.replace('"schema": 1', '"schema": true')), "no schema number"),
    "schema negative": (text(lambda t: t.replace('"schema": 1', '"schema": -1')), "no schema number"),
    "no schema": (rewrite(lambda c: c.pop("schema")), "no schema number"),
    "schema 99": (rewrite(lambda c: c.update(schema=99)), "has schema 99, .*reads schema 1"),
    "huge config": (grown(CONFIG, reading.MAX_CONFIG + 1), "such a file has at most"),
    "foreign field": (rewrite(lambda c: c.update(code="import os")), r"foreign fields \['code'\]"),
    "no projections": (rewrite(lambda c: c.update(projections={})), "projections is empty"),
    "projections a list": (rewrite(lambda c: c.update(projections=[])), "projections is missing or not a dict"),
    "info a list": (rewrite(lambda c: c.update(info=[1])), "info is missing or not a dict"),
    "config of another": (rewrite(lambda c: c["config"].update(__class__="x")), "config does not fit"),
    "config of a wrong kind": (rewrite(lambda c: c["config"].update(layers=5)), "config does not fit|layers must be"),
    "units in a file": (rewrite(lambda c: c["config"].update(units=5)), "units must be"),
    "layers of the base": (rewrite(lambda c: c["base_fingerprint"]["layers"].update({"0": 1})), "every layer of base"),
    "samples of the base": (
        rewrite(lambda c: c["base_fingerprint"]["layers"]["0"].update(samples=["a"])),
        "every layer of base",
    ),
    "another digest": (text(lambda t: t.replace('"victim"', '"friend"')), "config_sha256 differs"),
    # where the slices lie
    "structure a list": (rewrite(lambda c: c.update(structure=[1])), "structure is missing or not a dict"),
    "structure with code": (
        rewrite(lambda c: c["structure"].update(code="x")),
        "structure can't be read: it must have",
    ),
    "locations a list": (rewrite(lambda c: c["structure"].update(locations=[1])), "structure can't be read"),
    "location missing": (rewrite(lambda c: c["structure"]["locations"].pop(DOWN)), "one location for each projection"),
    "location foreign": (located(code="x"), "structure can't be read"),
    "location up": (located(path="../../etc/passwd"), "is not the name of a projection"),
    "location of a list": (located(path=["x"]), "has no valid path"),
    "size of words": (located(size="52"), "has no valid path, size"),
    "size zero": (located(size=0), "has no valid path, size"),
    "size huge": (located(size=2**40), "has no valid path, size"),
    "size below an index": (located(size=3), "has a unit outside the size"),
    "storage unknown": (located(storage="pickle"), "has no valid path, size, storage"),
    "storage a list": (located(storage=["linear"]), "has no valid path, size, storage"),
    "expert below zero": (located(expert=-1), "has no valid path"),
    "weights of the base up": (
        rewrite(lambda c: c["structure"]["base_weights"].update({"0": [["u.weight", "../x"]]})),
        "is not the name of a parameter",
    ),
    "weights of the base a number": (
        rewrite(lambda c: c["structure"]["base_weights"].update({"0": [5]})),
        "structure can't be read",
    ),
    "weights of the base of another layer": (
        rewrite(lambda c: c["structure"]["base_weights"].update({"99": []})),
        "must have the layers of base_fingerprint",
    ),
    # units
    "units huge": (entry(units=list(range(10**6))), "units listed are not the ones that were saved"),
    "units of huge numbers": (entry(units=[2**70]), "units in s2ft_config.json must be ascending numbers"),
    "units negative": (entry(units=[-1, 2, 3, 4, 5]), "must be ascending numbers"),
    "units twice": (entry(units=[3, 3, 4, 5, 6]), "must be ascending numbers"),
    "units true": (entry(units=[False, True]), "must be ascending numbers"),
    "units fractions": (entry(units=[1.5]), "must be ascending numbers"),
    "units in units": (entry(units=[[1]]), "must be ascending numbers"),
    "no units": (entry(units=[]), "at least one"),
    "units of another": (entry(units=[0, 1, 2, 3, 4]), "does not name the selected units"),
    "dim 2": (entry(dim=2), "must have dim 0 or 1"),
    "dim true": (entry(dim=True), "must have dim 0 or 1"),
    "dim the other": (entry(dim=0), "do not fit along dim 0"),
    "entry a list": (rewrite(lambda c: c["projections"].update({DOWN: [1]})), "must have dim 0 or 1"),
    # tensors
    "index out of range": (tensor("index", lambda t: t + 48), "outside 0..51"),
    "index far out": (tensor("index", lambda t: t.long() + 2**60), "outside 0..51"),
    "index negative": (tensor("index", lambda t: t - 52), "ascending and not negative"),
    "index repeated": (tensor("index", lambda t: t * 0 + 3), "ascending and not negative"),
    "index of floats": (tensor("index", lambda t: t.float()), "index integers, not F32 and F32"),
    "index of bytes": (tensor("index", lambda t: t.to(torch.uint8)), "index integers, not F32 and U8"),
    "index of truths": (tensor("index", lambda t: t > 0), "index integers, not F32 and BOOL"),
    "index square": (tensor("index", lambda t: t[None]), "do not fit along dim 1"),
    "delta of integers": (
        tensor("delta", lambda t: t.int()),
        f"{DOWN}: delta must be floating-point and index integers, not I32",
    ),
    "delta complex": (tensor("delta", lambda t: t.to(torch.complex64)), "index integers, not C64"),
    "delta of eight bits": (tensor("delta", lambda t: t.to(torch.float8_e4m3fn)), "index integers, not F8_E4M3"),
    "delta NaN": (tensor("delta", lambda t: t * float("nan")), f"{DOWN}.delta is not finite"),
    "delta infinite": (tensor("delta", lambda t: t + float("inf")), f"{DOWN}.delta is not finite"),
    "delta misshapen": (tensor("delta", lambda t: t[:5]), "needs dim 1 and shape"),
    "delta of fewer units": (tensor("delta", lambda t: t[:, :-1]), f"{DOWN}: delta .*do not fit along dim 1"),
    "delta flat": (tensor("delta", lambda t: t.flatten()), "do not fit along dim 1"),
    "delta empty": (tensor("delta", lambda t: t[:0]), "do not fit along dim 1"),
    "foreign tensor": (
        rewrite(tensors=lambda t: t.update({"\x1b[2J": torch.ones(1)})),
        r"foreign keys \['\\x1b\[2J'\]",
    ),
    "missing tensor": (rewrite(tensors=lambda t: t.pop(f"{DOWN}.index")), "missing keys .*down_proj.index"),
    "header huge": (header(lambda found: None, length=2**63), "its header ends outside the file"),
    "header longer than the file": (header(lambda found: None, length=10**6), "its header ends outside the file"),
    "header of gigabytes": (
        lambda f: (header(lambda found: None, length=2**30)(f), grown(TENSORS, 2**31)(f)),
        "has a header of 1,073,741,824 bytes",
    ),
    "header no JSON": (header(lambda found: b"{]"), "truncated or damaged: its header is not JSON"),
    "header no object": (header(lambda found: b"[1]"), "its header is no object"),
    "header deep": (header(lambda found: b"[" * 10**5 + b"]" * 10**5), "its header is nested too deeply|recursion"),
    "header with a name twice": (
        header(lambda found: json.dumps(found).replace(f"{QUERY}.delta", f"{DOWN}.delta").encode()),
        "delta' twice",
    ),
    "shape absurd": (shape(24, 2**39), "truncated or damaged: .*delta' has no valid place"),
    "shape of another order": (shape(5, 24), "do not fit along dim 1"),
    "shape overflows": (shape(2**39, 5, 2**39), "truncated or damaged: .*delta' has no valid place"),
    "shape beyond": (shape(2**70, 5), "has no valid shape"),
    "shape negative": (shape(-24, -5), "has no valid shape"),
    "shape of fractions": (shape(24.0, 5), "has no valid shape"),
    "shape deep": (shape(*[1] * 1000), "has no valid shape"),
    "shape a number": (header(lambda found: found[f"{DOWN}.delta"].update(shape=5)), "has no valid shape"),
    "dtype unknown": (shape(24, 5, dtype="F3"), "has dtype 'F3', which s2ft does not read"),
    "entry a text": (header(lambda found: found.update({f"{DOWN}.delta": "F32"})), "has dtype None"),
    "no offsets": (header(lambda found: [found[f"{DOWN}.delta"].pop("data_offsets")] and found), "has no valid place"),
    "dtype a list": (header(lambda found: found[f"{DOWN}.delta"].update(dtype=["F32"])), r"has dtype \['F32'\]"),
    "offsets overlap": (
        header(lambda found: found[f"{DOWN}.delta"].update(data_offsets=[0, 480])),
        "truncated or damaged",
    ),
    "offsets out": (
        header(lambda found: found[f"{DOWN}.delta"].update(data_offsets=[10**9, 10**9 + 480])),
        "truncated or damaged",
    ),
    "offsets backwards": (
        header(lambda found: found[f"{DOWN}.delta"].update(data_offsets=[480, 0])),
        "truncated or damaged",
    ),
    "tensors of a terabyte": (grown(TENSORS, 2**40), "such a file has at most|describes"),
    "something behind": (lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes() + b"#!/bin/sh"), "describes"),
    # weights that are trained in full
    "extra weights not listed": (rewrite(lambda c: c.pop("extra_weights")), "foreign keys .*extra_weights/model.norm"),
    "extra weights a list": (rewrite(lambda c: c.update(extra_weights=[1])), "extra_weights is missing or not a dict"),
    "extra weights of none": (rewrite(lambda c: c.update(extra_weights={})), "extra_weights is empty"),
    "an extra weight of a list": (extra([1]), "floating-point dtype"),
    "an extra dtype of a list": (extra(dtype=["F32"]), "floating-point dtype"),
    "an extra weight of integers": (extra(None, lambda t: t.update({KEY: t[KEY].long()}), dtype="I64"), "floating-po"),
    "an extra weight of another dtype": (rewrite(tensors=lambda t: t.update({KEY: t[KEY].half()})), "must be F32 of"),
    "an extra weight of another shape": (rewrite(tensors=lambda t: t.update({KEY: torch.ones(4)})), "must be F32 of"),
    "an extra shape of truths": (extra(shape=[True]), "and a shape"),
    "an extra weight of another model": (
        extra(None, lambda t: t.update({KEY: torch.ones(4)}), shape=[4]),
        "is for another model",
    ),
    "an extra weight not finite": (rewrite(tensors=lambda t: t[KEY].fill_(float("nan"))), "weight is not finite"),
    "an extra weight missing": (rewrite(tensors=lambda t: t.pop(KEY)), "missing keys"),
    "an extra weight up": (extra(name="../x"), "is not the name of a parameter"),
    "an extra weight unknown": (
        extra(None, lambda t: t.update({"extra_weights/x.y": torch.zeros(24)}), "x.y"),
        "no weight x.y outside",
    ),
    "an extra weight in a coupling": (
        extra(None, lambda t: t.update({f"extra_weights/{DOWN}.weight": torch.zeros(24)}), f"{DOWN}.weight"),
        "outside its couplings",
    ),
    "modules to train unknown": (rewrite(lambda c: c["config"].update(modules_to_save=["nothing"])), "not a module of"),
    # files
    "pickle": (
        instead(TENSORS, lambda file: file.with_name("s2ft_adapter.bin").write_bytes(pickle.dumps({"x": 1}))),
        "s2ft_adapter.bin: such files run code",
    ),
    "pickle under our name": (lambda f: torch.save({"x": torch.ones(3)}, f / TENSORS), "truncated or damaged"),
    "link out": (out_of_the_folder(TENSORS), f"{TENSORS} is a link that leads out of its folder"),
    "link of the config out": (out_of_the_folder(CONFIG), f"{CONFIG} is a link that leads out of its folder"),
    "link up": (out_of_the_folder(TENSORS, relative=True), "is a link that leads out"),
    "link to a device": (instead(TENSORS, lambda file: file.symlink_to("/dev/zero")), f"no {TENSORS}"),
    "link to itself": (instead(CONFIG, lambda file: file.symlink_to(file)), f"no {CONFIG}|link"),
    "link to the other": (instead(TENSORS, lambda file: file.symlink_to(CONFIG)), "truncated or damaged"),
    "folder for a file": (instead(TENSORS, lambda file: file.mkdir()), f"no {TENSORS}"),
    "pipe": (instead(TENSORS, os.mkfifo), f"no {TENSORS}"),
    # couplings
    "couplings of huge counts": (with_coupling(count=2**40), "couplings can't be read: .* has more than"),
    "couplings of huge units": (with_coupling(count=2**20, unit=2**20), "couplings can't be read: .* has more than"),
    "couplings of huge strides": (with_coupling(size=2**62, stride=2**60), "couplings can't be read: .* has more than"),
    "couplings of no module": (with_coupling(path="__class__"), "no module __class__|another model"),
    "couplings of a path": (with_coupling(path="../x"), "is not the name of a projection"),
    "couplings of a list": (with_coupling(path=["x"]), "is not the name of a projection"),
    "couplings of words": (with_coupling(count="52"), "couplings can't be read"),
    "couplings of another layout": (with_coupling(count=26), "expected a weight with 26"),
}


@pytest.fixture(scope="module")
def victim():
    """A model that must not change, and its weights."""
    model = model_of("llama")
    return model, copy.deepcopy(model.state_dict())


@pytest.mark.parametrize(
    "hostile,trainable", [(name, bool(i % 2) or "to train" in name) for i, name in enumerate(HOSTILE)]
)
def test_hostile_folders_are_refused_before_a_weight_changes(hostile, trainable, saved, victim, tmp_path):
    spoil, message = HOSTILE[hostile]
    folder = shutil.copytree(saved, tmp_path / "folder")
    spoil(folder)
    model, before = victim
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        s2ft.load_adapter(model, folder, trainable=trainable)
    assert len(str(caught.value)) < 2000 and str(caught.value).isprintable()
    assert same(model, before) and s2ft.status(model).adapters == []
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_unchanged_folder_loads(saved, tmp_path):
    rewrite()(shutil.copytree(saved, tmp_path / "folder"))
    s2ft.load_adapter(model_of("llama"), tmp_path / "folder")


def test_units_that_reach_into_another_projection_are_refused(tmp_path):
    """q, k and v of Phi-3 are rows of one weight: the key heads follow the last query head."""
    s2ft.save_adapter(fit(with_adapter(model_of("phi3"), S2FTConfig(q_ratio=0.3)), 1), tmp_path)
    path = "model.layers.0.self_attn.qkv_proj.q"
    head = len(load_file(tmp_path / TENSORS)[f"{path}.index"])
    rewrite(
        lambda config: config["projections"][path].update(units=[4]),
        lambda found: found.update({f"{path}.index": (4 * head + torch.arange(head)).int()}),
    )(tmp_path)
    model = model_of("phi3")
    with pytest.raises(ValueError, match="unit"):
        s2ft.load_adapter(model, tmp_path)
    assert s2ft.status(model).adapters == []


def test_links_inside_the_folder_and_in_a_hub_cache_are_read(saved, tmp_path):
    inside = shutil.copytree(saved, tmp_path / "inside")
    (inside / TENSORS).rename(inside / "blob")
    (inside / TENSORS).symlink_to("blob")
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True), (cache / "blobs").mkdir()
    for name in (CONFIG, TENSORS):
        shutil.copy(saved / name, cache / "blobs" / name[5:8])
        (snapshot / name).symlink_to(f"../../blobs/{name[5:8]}")
    (tmp_path / "whole").symlink_to(saved)
    assert {read_adapter(folder).name for folder in (inside, snapshot, tmp_path / "whole")} == {"victim"}


def everything(adapter):
    """The full content of an adapter, for comparisons."""
    deltas = {
        path: (delta.dim, delta.index.tolist(), delta.values.dtype, delta.values.tolist())
        for path, delta in adapter.deltas.items()
    }
    return (
        adapter.name,
        adapter.config,
        adapter.selection.to_dict(),
        adapter.fingerprint,
        deltas,
        adapter.info,
        adapter.couplings,
        {name: value.tolist() for name, value in adapter.extra_weights.items()},
    )


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from([CONFIG, TENSORS]),
    flips=st.lists(st.tuples(st.integers(0, 2**20), st.integers(1, 255)), min_size=1, max_size=3),
)
def test_flipped_bytes_are_an_error_or_change_nothing(saved, tmp_path_factory, name, flips):
    folder = shutil.copytree(saved, tmp_path_factory.mktemp("flipped") / "folder")
    content = bytearray((folder / name).read_bytes())
    for place, bits in flips:
        content[place % len(content)] ^= bits
    (folder / name).write_bytes(content)
    try:
        adapter = read_adapter(folder)
    except (ValueError, FileNotFoundError):
        return
    finally:
        shutil.rmtree(folder)
    assert everything(adapter) == everything(read_adapter(saved))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=100, deadline=None)
@given(value=JSON, data=st.data())
def test_any_value_anywhere_in_the_config_is_an_error_or_harmless(saved, victim, tmp_path_factory, value, data):
    """The digests fit the change: only ValueError is raised, and then no weight of the model changes."""
    folder = shutil.copytree(saved, tmp_path_factory.mktemp("value") / "folder")

    def replace_somewhere(content):
        place = content
        while True:
            key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else list(range(len(place)))))
            if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
                place[key] = value
                return
            place = place[key]

    rewrite(replace_somewhere)(folder)
    model, before = victim
    try:
        s2ft.load_adapter(model, folder)
    except ValueError:
        assert s2ft.status(model).adapters == []
    else:
        s2ft.detach(model)
    assert same(model, before)
