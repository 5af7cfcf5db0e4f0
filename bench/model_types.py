"""Attaches s2ft to a tiny random model of every model type that transformers maps, and writes what works.

For s2ft.peft and LoRA over the same types see bench/peft_types.py. Each type runs in a process of its own with limits
of time and memory. A row says how FFN and attention are covered, and whether the model computes the same after attach,
trains, merges and loads its adapter again.

    python bench/model_types.py                     # all types
    python bench/model_types.py --only llama bert   # some
    python bench/model_types.py --resume            # those that have no row yet
"""

import argparse
import contextlib
import copy
import csv
import datetime
import importlib.metadata
import multiprocessing
import os
import platform
import re
import resource
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")

OUTPUT = Path(__file__).parent / "results" / "model_types.csv"
MAPPINGS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "speech-seq2seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "ctc": "MODEL_FOR_CTC_MAPPING_NAMES",
    "text-encoding": "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES",
}
FIELDS = (
    *("type", "mappings", "class", "source", "ffn", "attention", "one_sided", "towers", "weights", "inputs"),
    *("output_unchanged", "gradients", "adapter_again", "merged_again", "seconds", "made", "note"),
)
CHECKS = ("output_unchanged", "gradients", "adapter_again", "merged_again")
NOT_FOUND = re.compile(r"requires the (\S+) library|No module named '(\S+)'")
# Relative difference of outputs that are the same but for rounding, in float32 and in float64
CLOSE, CLOSE_IN_DOUBLE = 1e-4, 1e-10
SECONDS, GIGABYTES = 400, 6
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}
QWEN4_INDEXER = {
    "indexer_budget": 32,
    "indexer_compress_ratio": 4,
    "indexer_head_dim": 256,
    "indexer_kv_heads": 1,
    "indexer_n_heads": 4,
    "ple_layer_ids": [1],
    "eos_token_id": 2,
}

# Entries that the default config of a class lacks, so that no model can be made from it or run. Configs of real
# checkpoints have them.
DEFAULTS: dict[str, dict] = {
    "chameleon": {"vocabulary_map": {}},
    "emu3": {"vocabulary_map": {}},
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense"] + 31 * ["sparse"], "num_experts_per_tok": 2}},
    "deepseek_v2": {"num_experts_per_tok": 6, "n_group": 1, "topk_group": 1},
    "diffusion_gemma": {"text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 704}},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 6, "moe_intermediate_size": 1408},
    "esm": {"vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0, "text_config": {"hidden_size_per_layer_input": 0}},
    "granite4_vision": {"downsample_rate": "4/8", "deepstack_layer_map": [[-2, 1]], "spatial_target_layers": [2]},
    "gemma3": {"vision_config": {"image_size": 896, "patch_size": 14}},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "mamba"], "num_hidden_layers": 4},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl": {"text_config": {"head_dim": 128, "rope_parameters": {**MROPE, "mrope_section": [16, 16, 16, 16]}}},
    **{name: {"image_token_index": 50265} for name in ("blip-2", "instructblip", "instructblipvideo")},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "qwen4_exp": {"text_config": QWEN4_INDEXER},
    "qwen4_exp_text": QWEN4_INDEXER,
    "reformer": {"is_decoder": True},
    "step3p7": {"text_config": {"sliding_window": 512}},
    "xmod": {"default_language": "en_XX"},
    "wav2vec2-bert": {"vocab_size": 40},
    "wav2vec2-conformer": {"vocab_size": 40},
    **{
        name: {"text_config": {"rope_parameters": MROPE}}
        for name in (
            "qwen2_vl",
            "qwen2_5_vl",
            "qwen2_5_omni_thinker",
            "glm46v",
            "glm4v",
            "glm_ocr",
            "glmga",
            "paddleocr_vl",
        )
    },
    "glm4v_moe": {
        "text_config": {"rope_parameters": {**MROPE, "mrope_section": [8, 4, 4], "partial_rotary_factor": 0.5}}
    },
}


def types() -> dict[str, list[tuple[str, str]]]:
    """For each model type its mappings with the model class."""
    from transformers.models.auto import modeling_auto

    found: dict[str, list[tuple[str, str]]] = {}
    for mapping, name in MAPPINGS.items():
        for model_type, names in getattr(modeling_auto, name).items():
            found.setdefault(model_type, []).append((mapping, names if isinstance(names, str) else names[0]))
    return found


def default_config(model_type: str):
    """The default config of a model type, with the entries that it lacks."""
    from transformers import CONFIG_MAPPING, BertConfig, ViTConfig, Wav2Vec2Config

    kind = CONFIG_MAPPING[model_type]
    decoder = {"is_decoder": True, "add_cross_attention": True}
    if model_type == "encoder-decoder":
        config = kind.from_encoder_decoder_configs(BertConfig(), BertConfig(**decoder))
    elif model_type == "vision-encoder-decoder":
        config = kind.from_encoder_decoder_configs(ViTConfig(), BertConfig(**decoder))
    elif model_type == "speech-encoder-decoder":
        config = kind.from_encoder_decoder_configs(Wav2Vec2Config(), BertConfig(**decoder))
    else:
        config = kind()
    if config.model_type.endswith("encoder-decoder"):
        config.decoder_start_token_id, config.pad_token_id = 1, 0
    if model_type not in DEFAULTS:
        return config
    return type(config).from_dict(_updated(config.to_dict(), DEFAULTS[model_type]))


def _updated(entries: dict, more: dict) -> dict:
    for key, value in more.items():
        nested = isinstance(value, dict) and isinstance(entries.get(key), dict) and key.endswith("_config")
        entries[key] = _updated(entries[key], value) if nested else copy.deepcopy(value)
    return entries


def config_for(model_class, config):
    """The config that a model class takes: the one given, or the one inside it that is of the right class."""
    wanted = getattr(model_class, "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return config
    inside = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return next((one for one in inside if isinstance(one, wanted)), config)


def tiny_model_of(model_type: str, dtype=None):
    """A tiny random model of a type, by the first mapping that has the type."""
    import torch
    import transformers

    from s2ft.model.discovery.twin import tiny_config, tiny_model

    model_class = getattr(transformers, types()[model_type][0][1])
    config, failures = default_config(model_type), []
    for widths in (True, False):
        try:
            return tiny_model(model_class, config_for(model_class, tiny_config(config, widths)), dtype or torch.float32)
        except ImportError:
            raise
        except Exception as error:
            failures.append(f"{'small' if widths else 'own'} widths: {type(error).__name__}: {error}")
    raise ValueError("can't be built. " + "; ".join(failures))


# ---- one type, in a process of its own --------------------------------------------------------------------


def row_of(model_type: str) -> dict:
    """What works for a type."""
    import torch

    torch.set_num_threads(1)
    rows = types()[model_type]
    row = dict.fromkeys(FIELDS, "")
    row.update(type=model_type, mappings=" ".join(mapping for mapping, _ in rows), made=_now())
    row["class"] = rows[0][1]
    start = time.perf_counter()
    try:
        row |= _filled(row, model_type)
    except Exception as error:  # the row says why
        row["note"] = _why(error)
    row["seconds"] = f"{time.perf_counter() - start:.1f}"
    return row


def _now() -> str:
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M}"


def _filled(row: dict, model_type: str) -> dict:
    """The row in float32; in float64 if float32 rounds so coarsely that the plain model's own output is inexact."""
    import torch

    single = dict(row)
    rounding = _fill(single, model_type, torch.float32)
    if not is_wrong(single) or rounding < CLOSE / 10:
        return single
    double = dict(row)
    _fill(double, model_type, torch.float64)
    note = f"checked in float64, because float32 alone changes the plain model's output by {rounding:.0e}"
    return double | {"note": f"{double['note']}; {note}" if double["note"] else note}


def _why(error: Exception) -> str:
    missing = NOT_FOUND.search(str(error))
    if missing and isinstance(error, ImportError):
        return f"not built: needs the package {missing[1] or missing[2]}"
    return f"{type(error).__name__}: " + " ".join(str(error).split())[:600]


def _fill(row: dict, model_type: str, dtype) -> float:
    """Fill the row in place, as far as the type works, and return the rounding of the plain model."""
    import s2ft
    from s2ft.model.discovery.examples import runnable_example
    from s2ft.model.parts import tower_of
    from s2ft.model.registry import find_couplings

    try:
        model = tiny_model_of(model_type, dtype)
    except ValueError as error:
        raise ValueError(f"not built: {error}") from None
    example = runnable_example(model)
    paths = {path for path, _ in model.named_modules()}
    row["inputs"] = " ".join(example)
    reached = _reached(model, example)
    before = _outputs(model, example)
    if not _same(_outputs(model, example), before, exactly=True):
        raise ValueError("its output differs from one run to the next")
    found = find_couplings(model)
    towers = {coupling: tower_of(model, coupling.main.path) for coupling in found.couplings}
    trained = [coupling for coupling in found.couplings if towers[coupling] == "language"] or found.couplings
    ratios = {f"{projection.key}_ratio": 0.5 for coupling in trained for projection in coupling.projections}
    own = found.couplings if found.is_custom else None  # so that they are not searched for again
    rounding = _rounding(model, example, before)
    try:
        s2ft.attach(model, s2ft.S2FTConfig(**ratios), couplings=own, verify=False)
    except ValueError as error:
        if "layout='indexed'" not in str(error):
            raise
        row["note"] = "weights that layers share: layout='indexed'"
        s2ft.attach(model, s2ft.S2FTConfig(layout="indexed", **ratios), couplings=own, verify=False)
    row["source"] = "discovered" if found.is_custom else "registered"
    row["towers"] = " ".join(sorted(set(towers.values())))
    row["weights"] = " ".join(f"{count} {word}" for word, count in Counter(r.status for r in found.weights).items())
    _coverage(row, found, in_place=bool(row["note"]))
    row["output_unchanged"] = _word(_same(_outputs(model, example), before))
    row["gradients"] = _gradients(model, example, paths, reached)
    _check_files(row, model, example, dtype)
    return rounding


def _rounding(model, example, outputs: list) -> float:
    """How much the outputs differ from those of the same model in float64, relatively; 0 if it does not run there."""
    import torch

    try:
        numbers = {name: value for name, value in example.items() if getattr(value, "is_floating_point", bool)()}
        doubled = {**example, **{name: value.double() for name, value in numbers.items()}}
        exact = _outputs(copy.deepcopy(model).double(), doubled)
    except Exception:  # many models state a dtype inside
        return 0.0
    pairs = [(a, b) for a, b in zip(outputs, exact) if torch.is_floating_point(b) and b.numel()]
    return max((float(_difference(a, b).max() / (_finite(b).abs().max() + 1e-12)) for a, b in pairs), default=0.0)


def _finite(tensor):
    return tensor.nan_to_num(0, 0, 0)


def _difference(a, b):
    return (a - b).abs().nan_to_num(0)  # where both are infinite


def _coverage(row: dict, found, in_place: bool) -> None:
    """How FFN and attention are covered: their units move, or are trained in place; and how many layers one by one."""
    moving = "confirmed" if found.is_custom else "moves"
    whole = [coupling for coupling in found.couplings if coupling.producers and coupling.consumer is not None]
    for field, key in (("ffn", "d"), ("attention", "o")):
        words = {
            moving if coupling.movable and not in_place else "in place"
            for coupling in whole
            if coupling.consumer.key == key
        }
        row[field] = " and ".join(sorted(words))
    row["one_sided"] = len(found.couplings) - len(whole)


def _outputs(model, example) -> list:
    import torch

    from s2ft.model.running import run_example, tensors_in

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [tensor.clone() for tensor in tensors_in(run_example(model, example))]


def _reached(model, example) -> set[str]:
    """The paths of the modules that the example reaches."""
    reached: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, path=path: reached.add(path)) for path, module in model.named_modules()
    ]
    _outputs(model, example)
    for handle in handles:
        handle.remove()
    return reached


def _same(after: list, before: list, exactly: bool = False) -> bool:
    import torch

    if exactly:
        return len(after) == len(before) and all(map(torch.equal, after, before))
    return len(after) == len(before) and all(
        torch.equal(a.isfinite(), b.isfinite())
        and bool((_difference(a, b) <= tolerance * _finite(b).abs().max() + 1e-12).all())
        for a, b in zip(after, before)
        for tolerance in [CLOSE_IN_DOUBLE if b.element_size() == 8 else CLOSE]
    )


def _word(good: bool) -> str:
    return "yes" if good else "NO"


def _gradients(model, example, paths: set[str], reached: set[str]) -> str:
    """How many of the deltas that run get a gradient from the sum of all outputs with random weights."""
    import torch

    from s2ft.model.running import run_example, tensors_in

    generator = torch.Generator().manual_seed(0)
    outputs = [tensor for tensor in tensors_in(run_example(model, example)) if tensor.requires_grad]
    sum((t.nan_to_num(0, 0, 0) * torch.randn(t.shape, generator=generator)).sum() for t in outputs).backward()
    deltas = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    runs = [delta for name, delta in deltas if _owner(name, paths) in reached]
    good = sum(delta.grad is not None and bool(delta.grad.abs().sum() > 0) for delta in runs)
    model.zero_grad(set_to_none=True)
    return f"{good} of {len(runs)}" + f" and {len(deltas) - len(runs)} not run" * (len(runs) < len(deltas))


def _owner(delta: str, paths: set[str]) -> str:
    """The path of the module of the plain model that a delta belongs to. Experts hold their weights themselves."""
    layer = delta.rpartition(".")[0]
    return layer if layer in paths else layer.rpartition(".")[0]


def _check_files(row: dict, model, example, dtype) -> None:
    """Train by a made-up step, save and load the adapter, merge, and load the merged checkpoint."""
    import torch

    import s2ft

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for delta in (parameter for parameter in model.parameters() if parameter.requires_grad):
            delta += 0.01 * torch.randn(delta.shape, generator=generator)
    trained = _outputs(model, example)
    with tempfile.TemporaryDirectory() as folder:
        s2ft.save_adapter(model, f"{folder}/adapter")
        s2ft.detach(model)
        s2ft.load_adapter(model, f"{folder}/adapter")
        s2ft.save_adapter(model, f"{folder}/again")
        same_slices = _tensors(f"{folder}/adapter") == _tensors(f"{folder}/again")
        row["adapter_again"] = _word(same_slices and _same(_outputs(model, example), trained))
        s2ft.merge(model)
        merged = _outputs(model, example)
        model.save_pretrained(f"{folder}/merged")
        again = _loaded(model, f"{folder}/merged", dtype)
        good = _same_weights(again, model) and _same(_outputs(again, example), merged, exactly=True)
        row["merged_again"] = _word(good and _same(merged, trained))
        if not good and not _loads_again(row["type"], example, dtype):
            row["merged_again"] = "plain differs too"
            row["note"] += (
                "; " * bool(row["note"]) + "loaded by transformers, the plain model too differs from the one saved"
            )


def _loaded(model, folder: str, dtype):
    """The model in a folder. It is copied: weights read from a file lie at odd addresses, where some products round
    differently, also in models that s2ft never changed."""
    return copy.deepcopy(type(model).from_pretrained(folder, dtype=dtype).eval().to(dtype))


def _same_weights(one, other) -> bool:
    """Whether all weights and buffers are the same bit for bit, also those that are no numbers."""
    import torch

    pairs = [(value, one.state_dict().get(name)) for name, value in other.state_dict().items()]
    return all(
        b is not None and a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))
        for a, b in pairs
    )


def _bits(tensor):
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _loads_again(model_type: str, example, dtype) -> bool:
    """Whether the plain model of a type, which s2ft never saw, is the same after it was saved and loaded."""
    model = tiny_model_of(model_type, dtype)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = _loaded(model, folder, dtype)
    outputs = _outputs(model, example)
    return _same_weights(again, model) and _same(_outputs(again, example), outputs, exactly=True)


def _tensors(folder: str) -> dict[str, bytes]:
    from safetensors import safe_open

    (file,) = Path(folder).glob("*.safetensors")
    with safe_open(file, "np") as tensors:
        return {name: tensors.get_tensor(name).tobytes() for name in tensors.keys()}


# ---- all types --------------------------------------------------------------------------------------------


def run_type(model_type: str) -> dict:
    """Run a type in a child process; the row says so if it takes too long or too much memory."""
    row = dict.fromkeys(FIELDS, "") | {"type": model_type, "made": _now()}
    fork = multiprocessing.get_context("fork")  # a child need not import the libraries again
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=_send_row, args=(model_type, sender), daemon=True)
    child.start()
    sender.close()
    try:
        if not receiver.poll(SECONDS):
            return _named(row, f"took more than {SECONDS} s")
        return receiver.recv()
    except EOFError:
        return _named(row, "its process died, by lack of memory or otherwise")
    finally:
        child.kill()
        child.join()


def _send_row(model_type: str, sender) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (GIGABYTES << 30, GIGABYTES << 30))
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        sender.send(row_of(model_type))


def _named(row: dict, note: str) -> dict:
    rows = types()[row["type"]]
    return row | {"mappings": " ".join(mapping for mapping, _ in rows), "class": rows[0][1], "note": note}


def read(path: Path) -> dict[str, dict]:
    """The rows of a file by type."""
    if not path.exists():
        return {}
    with path.open() as file:
        lines = [line for line in file if not line.startswith("#")]
    return {row["type"]: row for row in csv.DictReader(lines)}


def write(path: Path, rows: dict[str, dict]) -> None:
    versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        file.write(
            f"# {platform.machine()} {platform.system()}, {os.cpu_count()} cores, {datetime.date.today()}, {versions}, "
            "float32, one thread; made: UTC\n"
        )
        table = csv.DictWriter(file, FIELDS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows[name] for name in sorted(rows))


def is_whole(row: dict) -> bool:
    """FFN and attention are both in couplings."""
    return bool(row["ffn"] and row["attention"])


def is_attached(row: dict) -> bool:
    return bool(row["source"])


def is_wrong(row: dict) -> bool:
    """s2ft took the type, and it computes something else or can't be saved."""
    return is_attached(row) and any(row[check] == "NO" for check in CHECKS)


def has_all_gradients(row: dict) -> bool:
    reached, _, deltas = row["gradients"].partition(" and ")[0].partition(" of ")
    return bool(deltas) and reached == deltas


def print_summary(rows: dict[str, dict]) -> None:
    counted = {
        "types": lambda row: True,
        "FFN and attention": is_whole,
        "attached": is_attached,
        "refused": lambda row: not is_attached(row) and row["note"],
        "all gradients": has_all_gradients,
        "merge": lambda row: row["merged_again"] == "yes",
        "adapter": lambda row: row["adapter_again"] == "yes",
        "wrong": is_wrong,
    }
    print(f"{'':22}" + "".join(f"{name:>19}" for name in counted))
    for mapping in (*MAPPINGS, "all"):
        chosen = [row for row in rows.values() if mapping == "all" or mapping in row["mappings"].split()]
        print(f"{mapping:22}" + "".join(f"{sum(bool(test(row)) for row in chosen):19}" for test in counted.values()))
    for row in rows.values():
        if is_wrong(row):
            print("WRONG:", row["type"], {check: row[check] for check in CHECKS})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="these types")
    parser.add_argument("--resume", action="store_true", help="types without a row in the output")
    parser.add_argument("--workers", type=int, default=1, choices=(1, 2), help="processes at the same time")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the table")
    arguments = parser.parse_args()
    row_of("llama")  # imports everything once, which the children then have
    rows = read(arguments.output)
    wanted = arguments.only or sorted(types())
    wanted = [name for name in wanted if not (arguments.resume and name in rows)]
    with ThreadPoolExecutor(arguments.workers) as pool:
        for row in (done.result() for done in as_completed([pool.submit(run_type, name) for name in wanted])):
            rows[row["type"]] = row
            write(arguments.output, rows)
            print(
                *(row[field] for field in ("type", "source", "ffn", "attention", *CHECKS, "note")),
                sep=" | ",
                flush=True,
            )
    print_summary(rows)


if __name__ == "__main__":
    main()
