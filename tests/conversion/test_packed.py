"""An adapter in the blocks of a GGUF file: as a new file, and in place."""

import errno
import hashlib
import importlib.util
import os
import re
import resource
import shutil
import struct
from contextlib import suppress
from functools import partial

import pytest
import torch
from support.convert_hf_to_gguf import convert, random_qwen35
from support.inside import PATCHED, Change, GgufFile, Kept, export_packed, load_model, patch, state, undo
from train.tiny import base_of, save_random_adapter

import s2ft

WIDE = {"hidden_size": 256, "intermediate_size": 512}  # for types with blocks of 256
KINDS = {
    kind: WIDE if kind.endswith("_k") else {} for kind in "q4_0 q4_1 q5_0 q5_1 q8_0 q4_k q5_k q6_k iq4_nl mxfp4".split()
}
RATIOS = {f"{key}_ratio": 0.5 for key in "qkvoug"} | {"d_ratio": 0.5, "group": 32}


def make_base(folder, kind, seed=0, **changes):
    return convert(base_of(folder / "checkpoint", seed=seed, **changes), folder / "model.gguf", kind)


def make_adapter(file, folder, std=0.02, **config):
    config = {**RATIOS, "layout": "indexed", **config}
    if GgufFile(file).value("embedding_length") == 32:
        config["o_ratio"] = 1.0  # heads of 8 in groups of 32
    save_random_adapter(folder, load_model(str(file), "bfloat16")[0], std, folder.name, **config)
    return folder


NEEDS_CONVERSIONS = pytest.mark.skipif(
    importlib.util.find_spec("transformers.integrations.gguf") is None, reason="transformers is older than 5.24"
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A base in Q4_1 and two adapters of it."""
    folder = tmp_path_factory.mktemp("small")
    base = make_base(folder, "q4_1")
    return base, make_adapter(base, folder / "math"), make_adapter(base, folder / "chat", seed=5, q_ratio=0.25)


@pytest.fixture
def copy(small, tmp_path):
    return shutil.copy(small[0], tmp_path / "model.gguf")


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def weights(path):
    return load_model(str(path), "float32")[0].state_dict()


# ---- a new file ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_units_of_the_adapter_change_and_they_come_nearer(kind, tmp_path):
    base = make_base(tmp_path, kind, **KINDS[kind])
    folder = make_adapter(base, tmp_path / "math")
    said = export_packed(str(base), folder, tmp_path / "tuned.gguf")
    assert said.startswith(f"{tmp_path / 'tuned.gguf'}: ") and "no other byte of a weight" in said
    before, after, adapter = weights(base), weights(tmp_path / "tuned.gguf"), s2ft.read_adapter(folder)
    kept, squares = [], []
    for path, delta in adapter.deltas.items():
        old, new = before.pop(f"{path}.weight"), after.pop(f"{path}.weight")
        others = torch.ones(old.shape[delta.dim], dtype=torch.bool)
        others[delta.index] = False
        left = others.nonzero().squeeze(1)
        assert torch.equal(old.index_select(delta.dim, left), new.index_select(delta.dim, left))
        moved = (new - old).index_select(delta.dim, delta.index)
        squares.append(delta.values.square().sum())
        kept.append(float((moved * delta.values).sum() / squares[-1]))
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert min(kept) > (0.4 if "_k" in GgufFile(base).codec(path).name.lower() else 0.9), kept  # scales stay
    share = sum(one * square for one, square in zip(kept, squares)) / sum(squares)
    assert f"{share:.0%} of the update is in it" in said


def test_an_update_that_a_file_cannot_hold_is_warned_of(tmp_path, caplog):
    base = make_base(tmp_path, "q4_1", **KINDS["q4_1"])
    model = load_model(str(base), "float32")[0]
    save_random_adapter(tmp_path / "small", model, 1e-5, d_ratio=0.5)
    assert re.search(
        r"[0-3]% of the update is in it", export_packed(str(base), tmp_path / "small", tmp_path / "t.gguf")
    )
    assert "of the update, and may answer as the base" in caplog.text
    caplog.clear()
    patch(base, tmp_path / "small")
    assert "of the update, and may answer as the base" in caplog.text


@NEEDS_CONVERSIONS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_of_which_transformers_reorders_rows_and_columns(dtype, tmp_path):
    base = random_qwen35(base_of(tmp_path / "checkpoint"), tmp_path / "model.gguf")
    model, file = load_model(str(base), dtype)[0], GgufFile(base)
    for name, parameter in model.named_parameters():
        path, _, part = name.rpartition(".")
        if part == "weight":
            torch.testing.assert_close(file.values(path).to(parameter), parameter, rtol=0.02, atol=0.005)
    packed, ids = load_model(str(base), dtype, keep_packed=True)[0], torch.arange(20)[None]
    torch.testing.assert_close(packed(ids).logits, model(ids).logits, rtol=0.05, atol=0.05)
    save_random_adapter(tmp_path / "math", model, 0.02, d_ratio=0.5, o_ratio=0.5, group=32, codec="auto")
    export_packed(str(base), tmp_path / "math", tmp_path / "tuned.gguf")
    tuned = s2ft.merge(model).state_dict()
    for name, value in load_model(str(tmp_path / "tuned.gguf"), dtype)[0].state_dict().items():
        torch.testing.assert_close(value, tuned[name], rtol=0.02, atol=0.005)


def test_the_new_file_has_the_metadata_of_the_base_and_names_it(small, tmp_path):
    base, folder, other = small
    file = tmp_path / "tuned.gguf"
    export_packed(str(base), folder, file)
    old, new = GgufFile(base), GgufFile(file)
    for name, field in old.reader.fields.items():
        if name != "GGUF.kv_count":
            assert new.reader.fields[name].contents() == field.contents(), name
    assert new.value("base", "s2ft.merged.0.") == "model.gguf" and new.value("adapter", "s2ft.merged.0.") == "math"
    assert new.value("sha256", "s2ft.merged.0.") == digest(base)
    export_packed(str(file), make_adapter(file, tmp_path / "again"), tmp_path / "twice.gguf")
    assert GgufFile(tmp_path / "twice.gguf").value("sha256", "s2ft.merged.1.") == digest(file)


@pytest.mark.parametrize(
    ("mistake", "made", "error", "words"),
    [
        (
            "base",
            ("q4_1", 1),
            ValueError,
            "differ.*the first weight is model.layers.0.*sha256 [0-9a-f]{64},.*[0-9a-f]{64}$",
        ),
        ("quantized again", ("q4_0", 0), ValueError, "another base, .*model.gguf: 2 of 2 layers differ.*sha256"),
        ("float32", ("f32", 0), ValueError, "has the type F32, and there are codecs for Q4_0, Q4_1"),
        ("in full", None, ValueError, "trains model.norm.weight in full"),
        ("no gguf", None, ValueError, "s2ft export --format gguf"),
        ("exists", None, FileExistsError, "exists"),
        ("damaged", None, ValueError, "no GGUF file, or it is damaged"),
        ("full disk", None, OSError, "File too large"),
    ],
)
def test_bad_input_leaves_nothing(small, tmp_path, mistake, made, error, words):
    (model, folder, _), output, place = small, tmp_path / "tuned.gguf", tmp_path / "made"
    place.mkdir()
    if made:
        model = make_base(place, made[0], seed=made[1])
    if mistake == "float32":
        folder = make_adapter(model, place / "adapter")
    elif mistake == "in full":
        folder = make_adapter(model, place / "adapter", modules_to_save=["model.norm"])
    elif mistake == "no gguf":
        model = model.parent / "checkpoint"
    elif mistake == "exists":
        output = place
    elif mistake == "damaged":
        (place / "model.gguf").write_bytes(model.read_bytes()[:200])
        model = place / "model.gguf"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if mistake == "full disk" else soft, hard))
    try:
        with pytest.raises(error, match=words):
            export_packed(str(model), folder, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_scale_that_is_nan_is_another_base_whose_weight_is_named(small, copy, tmp_path):
    content, name = bytearray(copy.read_bytes()), "blk.0.ffn_down.weight"
    start = int(GgufFile(copy).tensors[name].data_offset)
    content[start : start + 2] = struct.pack("<H", 0x7E00)  # the scale of the first block
    copy.write_bytes(content)
    with pytest.raises(ValueError, match="the first weight is model.layers.0.mlp.down_proj.weight"):
        export_packed(str(copy), small[1], tmp_path / "tuned.gguf")


ARRAY, UINT32 = 9, 4  # types of values in the metadata of GGUF


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (struct.pack("<IQ", UINT32, 1 << 60) + bytes(64), "an array has 1152921504606846976 elements"),
        (struct.pack("<IQ", UINT32, 20) + bytes(64), "an array has 20 elements"),
        (struct.pack("<IQ", ARRAY, 1) * 3000 + struct.pack("<IQ", UINT32, 0), "too many arrays in arrays"),
        (struct.pack("<I", UINT32), "it ends too early"),
    ],
)
def test_a_length_in_a_file_that_reaches_past_its_end_is_an_error_at_once(tmp_path, array, words):
    name = b"general.architecture"
    head = struct.pack("<Q", len(name)) + name + struct.pack("<I", ARRAY)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + head + array)
    with pytest.raises(ValueError, match=f"no GGUF file, or it is damaged: {words}"):
        GgufFile(tmp_path / "model.gguf")


# ---- in place --------------------------------------------------------------------------------------------------


def test_a_file_is_patched_switched_and_as_it_was(small, copy, tmp_path, monkeypatch):
    base, math, chat = small
    export_packed(str(base), math, tmp_path / "tuned.gguf")
    tuned = weights(tmp_path / "tuned.gguf")
    assert "'math'" in patch(copy, math) and "has adapter 'math'" in state(copy)
    assert all(torch.equal(value, tuned[name]) for name, value in weights(copy).items())
    with pytest.raises(ValueError, match="has adapter 'math' in place: s2ft patch .* --undo first"):
        export_packed(str(copy), math, tmp_path / "twice.gguf")
    for use in (partial(s2ft.load_adapter, adapter=math), partial(s2ft.attach, config=s2ft.S2FTConfig(d_ratio=0.1))):
        with pytest.raises(ValueError, match="has an adapter in place"):  # in another dtype the samples are near enough
            use(load_model(str(copy), "bfloat16")[0])
    (tmp_path / "link.gguf").symlink_to(copy)
    with pytest.raises(ValueError, match="is one of several names of a file"):
        patch(tmp_path / "link.gguf", chat)
    assert "has adapter 'math'" in state(tmp_path / "link.gguf")
    (tmp_path / "link.gguf").unlink()
    with pytest.raises(ValueError, match="another base.*Its base has the sha256"):  # it is the base with math
        patch(shutil.copy(copy, tmp_path / "other.gguf"), chat)
    once = digest(copy)
    patch(copy, chat)
    assert "has adapter 'chat'" in state(copy) and digest(copy) != once
    with monkeypatch.context() as context:
        context.setattr("s2ft.conversion.packed.replace_file", full)
        patch(copy, chat)  # what is in the file needs no room
    with monkeypatch.context() as context:  # a later switch computes nothing
        context.setattr(GgufFile, "codec", None)
        patch(copy, math)
    assert digest(copy) == once
    assert "'math'" in undo(copy) and digest(copy) == digest(base) and "is not patched" in state(copy)
    assert len(list(copy.parent.glob("model.gguf.s2ft-*"))) == 2 and not copy.with_name(copy.name + PATCHED).exists()


def test_what_an_earlier_switch_has_left_is_not_used_for_another_file_or_adapter(small, copy, tmp_path):
    base, math, chat = small
    patch(copy, math), undo(copy)
    patch(copy, shutil.copytree(chat, tmp_path / "math"))  # another adapter in a folder of the same name
    assert "'chat'" in state(copy)
    copy.write_bytes(copy.read_bytes()[:-4] + b"else"), os.utime(copy, (0, 0))  # in a weight that no adapter changes
    undo(copy)
    with pytest.raises(ValueError, match="trained on another base. Its base has the sha256"):
        patch(copy, math)
    assert copy.read_bytes().endswith(b"else")


def test_what_an_earlier_switch_has_left_may_be_damaged_or_of_a_longer_file(small, copy):
    _, math, _ = small
    patch(copy, math), undo(copy)
    left = next(copy.parent.glob("*.s2ft-*"))
    left.write_bytes(left.read_bytes()[:100]), os.utime(left, ns=2 * (copy.stat().st_mtime_ns,))
    assert "are those of adapter 'math'" in patch(copy, math)
    undo(copy)
    copy.write_bytes(copy.read_bytes()[:4096])
    with pytest.raises(ValueError, match="no GGUF file, or it is damaged"):
        patch(copy, math)


def flip(path, number):
    """Flip one bit of the values of a file of safetensors, and keep its time."""
    content, time = bytearray(path.read_bytes()), path.stat().st_mtime_ns
    start = 8 + int.from_bytes(content[:8], "little")
    content[start + number * (len(content) - start) // 50] ^= 1 << number % 8
    path.write_bytes(content), os.utime(path, ns=(time, time))


def test_a_bit_that_flips_in_what_is_kept_of_the_base_is_never_written(small, copy):
    patch(copy, small[1])
    kept, before = copy.with_name(copy.name + PATCHED), digest(copy)
    for number in range(50):
        flip(kept, number)
        for act in (undo, state, lambda path: patch(path, small[2])):
            with pytest.raises(ValueError, match="truncated or damaged"):
                act(copy)
        flip(kept, number)
        assert digest(copy) == before
    undo(copy)
    assert digest(copy) == digest(small[0])


def test_a_bit_that_flips_in_kept_blocks_is_never_written(small, copy):
    patch(copy, small[1])
    once = digest(copy)
    for number in (0, 17, 33, 49):
        undo(copy)
        flip(next(copy.parent.glob("*.s2ft-blocks-*")), number)
        patch(copy, small[1])
        assert digest(copy) == once


def test_an_undo_says_that_bytes_elsewhere_have_changed_and_stay(small, copy):
    patch(copy, small[1])
    assert undo(copy).endswith("bytes are the base's again, in place of adapter 'math'")
    patch(copy, small[1])
    copy.write_bytes(copy.read_bytes()[:-4] + b"else"), os.utime(copy, (0, 0))  # in a weight that no adapter changes
    assert "what has changed elsewhere in it stays" in undo(copy) and copy.read_bytes().endswith(b"else")


def test_a_file_of_another_user_that_may_be_written_is_not_in_use(small, copy, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(errno.EACCES, "only the owner may have a lease")

    monkeypatch.setattr("fcntl.fcntl", refuse)
    assert "are those of adapter 'math'" in patch(copy, small[1])


class Stop(BaseException):
    """An interrupt."""


def interrupt(monkeypatch, step, number):
    """Stop at the nth write, in the middle of a block, or before or after a step."""
    calls = []

    def stopping(before):
        def run(self, *arguments, **options):
            calls.append(1)
            if len(calls) == number and "write" in step:
                data, content = arguments
                half = self.read(data)
                half[..., : half.shape[-1] // 2] = content[..., : half.shape[-1] // 2]
                before(self, data, half)
            elif len(calls) == number and "after" in step:
                before(self, *arguments, **options)
            if len(calls) == number:
                raise Stop
            return before(self, *arguments, **options)

        return run

    owner, name = (Change, "write") if "write" in step else (Kept, step.split()[-1])
    monkeypatch.setattr(owner, name, stopping(getattr(owner, name)))


STEPS = ["write", "before save_blocks", "after save_blocks", "before rename", "after rename"]


@pytest.mark.parametrize("number", [1, 2, 14, 27])
@pytest.mark.parametrize("step", STEPS)
def test_a_change_that_is_interrupted_can_be_undone(small, copy, monkeypatch, step, number):
    base, math, chat = small
    if number > 1 and step != "write":
        patch(copy, chat)
    with monkeypatch.context() as context, suppress(Stop):
        interrupt(context, step, 1 if step != "write" else number)
        patch(copy, math)
        undo(copy)
    kept = copy.with_name(copy.name + PATCHED)
    if kept.exists():
        state(copy), undo(copy)
    assert digest(copy) == digest(base) and not kept.exists()
    patch(copy, math), undo(copy)
    assert digest(copy) == digest(base)


@pytest.mark.parametrize(
    ("mistake", "error", "words"),
    [
        ("another base", ValueError, "trained on another base"),
        ("replaced", ValueError, "is not the file that was patched"),
        ("kept is damaged", ValueError, "truncated or damaged"),
        ("open elsewhere", ValueError, "is open in a program"),
        ("no file", FileNotFoundError, "doesn't exist"),
        ("read only", PermissionError, "Permission denied"),
        ("full disk", OSError, "No space left"),
        ("read-only folder", PermissionError, "is read-only"),
    ],
)
def test_a_mistake_changes_nothing(small, copy, tmp_path, monkeypatch, mistake, error, words):
    _, math, chat = small
    patch(copy, math)
    path, kept, other = copy, copy.with_name(copy.name + PATCHED), None
    if mistake == "another base":
        (tmp_path / "made").mkdir()
        chat = make_adapter(make_base(tmp_path / "made", "q4_1", seed=1), tmp_path / "made/adapter")
    elif mistake == "replaced":
        copy.write_bytes(copy.read_bytes()[:-4096] + bytes(range(256)) * 16)
    elif mistake == "kept is damaged":
        kept.write_bytes(kept.read_bytes()[:100])
    elif mistake == "open elsewhere":
        other = open(copy, "rb")
    elif mistake == "no file":
        path = tmp_path / "nowhere.gguf"
    elif mistake == "full disk":
        monkeypatch.setattr("s2ft.conversion.packed.replace_file", full)
    elif mistake == "read-only folder":
        monkeypatch.setattr("os.access", lambda *arguments: False)
    else:
        monkeypatch.setattr("builtins.open", refusing(open))  # a user that may do anything can write any file
    before = digest(copy)
    with pytest.raises(error, match=words) as raised:
        patch(path, chat)
    monkeypatch.undo()
    assert digest(copy) == before and kept.exists()
    if other is not None:
        other.close()
    if mistake not in ("replaced", "kept is damaged", "another base"):
        patch(copy, chat)  # while the error is kept, with the frames that had the file open
        assert raised.value is not None


def full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def refusing(function):
    def run(path, mode="r", *arguments, **options):
        if "+" in mode:
            raise PermissionError(13, "Permission denied", str(path))
        return function(path, mode, *arguments, **options)

    return run


def test_what_is_not_patched_is_not_undone(copy):
    with pytest.raises(ValueError, match=f"is not patched: there is no model.gguf{PATCHED}"):
        undo(copy)
