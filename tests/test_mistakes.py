"""Mistakes of users: each raises one kind of error, before anything changes, whose text has the words that help.

A row is what the user does, the exception and the words to look for. The words are an argument, what was expected, what
came or the way out, never a sentence. The mistakes on the command line end with exit status 2 and one error on stderr.
"""

import copy
import json
import shlex

import pytest
import torch
from support.states import with_adapter
from torch import nn
from train.tiny import save_random_adapter, save_tiny, sums, tiny_model, write_jsonl

import s2ft
from s2ft import Coupling, S2FTConfig
from s2ft.cli.main import main
from s2ft.peft import S2FTPeftConfig

DOWN = "model.layers.0.mlp.down_proj"


def config_of(**options):
    return lambda world: S2FTConfig(**options)


# ---- options of S2FTConfig ---------------------------------------------------------------------------------------

CONFIGS = [
    (config_of(d_ratio=1.5), ValueError, "d_ratio 1.5"),
    (config_of(d_ratio=-0.1), ValueError, "d_ratio -0.1"),
    (config_of(d_ratio="much"), ValueError, "d_ratio 'much'"),
    (config_of(o_ratio=True), ValueError, "o_ratio True"),
    (config_of(d_ratio=float("nan")), ValueError, "d_ratio nan"),
    (config_of(down_ratio=0.1), TypeError, "down_ratio"),
    (config_of(selection="best"), ValueError, "selection random 'best'"),
    (config_of(order="lowest"), ValueError, "order smallest 'lowest'"),
    (config_of(allocation="each"), ValueError, "allocation uniform 'each'"),
    (config_of(layout="dense"), ValueError, "layout permuted 'dense'"),
    (config_of(delta_dtype="int8"), ValueError, "delta_dtype bfloat16 'int8'"),
    (config_of(ffn_kernel="yes"), ValueError, "ffn_kernel 'yes'"),
    (config_of(seed=-1), ValueError, "seed -1"),
    (config_of(seed=0.5), ValueError, "seed 0.5"),
    (config_of(layers=[]), ValueError, "layers []"),
    (config_of(layers="01"), ValueError, "layers '01'"),
    (config_of(layers=[0, 0]), ValueError, "layers twice"),
    (config_of(layers=[-1]), ValueError, "layers -1"),
    (config_of(towers=["sight"]), ValueError, "towers vision 'sight'"),
    (config_of(modules_to_save="head"), ValueError, "modules_to_save list 'head'"),
    (config_of(modules_to_save=[]), ValueError, "modules_to_save at least one"),
    (config_of(budget="9 apples"), ValueError, "budget 9.2M '9 apples'"),
    (config_of(budget=0), ValueError, "budget at least 1"),
    (config_of(match_lora_rank=0), ValueError, "match_lora_rank at least 1"),
    (config_of(budget=9, match_lora_rank=8), ValueError, "budget match_lora_rank exclude"),
    (config_of(align=0), ValueError, "align at least 1"),
    (config_of(align=8, allocation="global"), ValueError, "align uniform 'global'"),
    (config_of(group=0), ValueError, "group at least 1"),
    (config_of(group=32, align=8), ValueError, "align group exclude"),
    (config_of(codec="q4_0"), ValueError, "codec none auto 'q4_0'"),
    (config_of(protect_ratio=1.0), ValueError, "protect_ratio below 1"),
    (config_of(units={DOWN: [0]}, d_ratio=0.1), ValueError, "units d_ratio"),
    (config_of(units=[1, 2]), ValueError, "units selection list"),
    (config_of(exclude=3), ValueError, "exclude selection int"),
]

# ---- attach, plan, select ----------------------------------------------------------------------------------------


def attach(**options):
    arguments = {name: options.pop(name) for name in ("name", "verify", "example", "on_top") if name in options}
    return lambda world: s2ft.attach(world.model, S2FTConfig(**options), **arguments)


def twice(world):
    s2ft.attach(world.model, S2FTConfig(d_ratio=0.1))
    try:
        s2ft.attach(world.model, S2FTConfig(d_ratio=0.1), name="other")
    finally:
        s2ft.detach(world.model)


def with_two(call):
    """Two adapters are loaded."""

    def mistake(world):
        s2ft.load_adapter(world.model, world.adapter, name="a")
        try:
            call(world)
        finally:
            s2ft.set_adapter(world.model, None)
            s2ft.delete_adapter(world.model, "a")

    return mistake


def changed(change, call=s2ft.attach):
    """Call with a copy of the model whose blocks were changed."""

    def mistake(world):
        model = copy.deepcopy(world.model)
        change(model.model.layers)
        call(model, S2FTConfig(d_ratio=0.1, layout="indexed"))

    return mistake


def share_a_module(layers):
    layers[1].mlp.down_proj = layers[0].mlp.down_proj


def in_inference_mode(world):
    with torch.inference_mode():
        model = tiny_model()
    s2ft.attach(model, S2FTConfig(d_ratio=0.1))


def plain_net():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def coupled(producer, consumer):
    return lambda world: s2ft.attach(
        plain_net(),
        S2FTConfig(d_ratio=0.5),
        couplings=[Coupling.ffn(0, down=consumer, up=producer, channels=8)],
        example=torch.ones(1, 4),
    )


ATTACHING = [
    (lambda world: s2ft.attach(world.model, S2FTPeftConfig(d_ratio=0.1)), TypeError, "S2FTConfig S2FTPeftConfig"),
    (lambda world: s2ft.attach(world.model, {"d_ratio": 0.1}), TypeError, "S2FTConfig dict"),
    (attach(), ValueError, "selected ratio"),
    (attach(d_ratio=0.1, layers=[9]), ValueError, "9"),
    (attach(d_ratio=0.1, verify="yes"), TypeError, "verify 'yes'"),
    (attach(d_ratio=0.1, verify=0), TypeError, "verify 0"),
    (
        lambda world: s2ft.merge(with_adapter(tiny_model().to("meta"), S2FTConfig(d_ratio=0.1))),
        ValueError,
        "meta device prepare",
    ),
    (attach(d_ratio=0.1, on_top="yes"), TypeError, "on_top 'yes'"),
    (attach(d_ratio=0.1, name="a/b"), ValueError, "name a/b"),
    (attach(d_ratio=0.1, name=""), ValueError, "name"),
    (attach(d_ratio=0.1, example="words"), TypeError, "example tensor str"),
    (attach(d_ratio=0.1, selection="activation"), ValueError, "activation calibration"),
    (attach(d_ratio=0.1, exclude={DOWN: [64]}), ValueError, "exclude 64"),
    (attach(d_ratio=0.1, exclude={"nowhere.down_proj": [0]}), ValueError, "exclude nowhere"),
    (attach(d_ratio=1.0, exclude={DOWN: [0]}), ValueError, "exclude d"),
    (attach(d_ratio=0.1, modules_to_save=["score"]), ValueError, "modules_to_save score"),
    (attach(d_ratio=0.1, towers=["vision"]), ValueError, "towers vision"),
    (attach(l_ratio=0.1, layers=[0]), ValueError, "l_ratio"),
    (attach(d_ratio=0.1, budget=1), ValueError, "budget 1"),
    (attach(units={DOWN: [64]}), ValueError, "units 64"),
    (attach(units={DOWN: [1, 1]}), ValueError, "units twice"),
    (attach(units={DOWN: ["1"]}), ValueError, "units"),
    (attach(units={"model.layers.9.mlp.down_proj": [1]}), ValueError, "model.layers.9"),
    (attach(units="nowhere.json"), (FileNotFoundError, ValueError), "nowhere.json"),
    (twice, ValueError, "default freeze_adapter detach"),
    (with_two(lambda world: s2ft.attach(world.model, S2FTConfig(i_ratio=0.2))), ValueError, "i_ratio other"),
    (with_two(lambda world: s2ft.plan(world.model, S2FTConfig(d_ratio=0.1))), ValueError, "adapter"),
    (changed(share_a_module), ValueError, "layers.0.mlp.down_proj layers.1.mlp.down_proj one tied weight"),
    (
        changed(
            lambda layers: setattr(layers[1].mlp.up_proj, "weight", layers[0].mlp.up_proj.weight),
            lambda model, _: s2ft.plan(model, S2FTConfig(d_ratio=0.1)),
        ),
        ValueError,
        "layers.0.mlp.up_proj one tied weight indexed",
    ),
    (changed(share_a_module, s2ft.plan), ValueError, "layers.0.mlp.down_proj layers.1.mlp.down_proj one tied weight"),
    (
        changed(lambda layers: setattr(layers[1].mlp.down_proj.weight, "data", layers[0].mlp.down_proj.weight.data)),
        ValueError,
        "layers.0.mlp.down_proj layers.1.mlp.down_proj one tied weight",
    ),
    (
        changed(lambda layers: layers[0].mlp.down_proj.weight.data[0, :1].fill_(float("inf"))),
        ValueError,
        "d.weight finite",
    ),
    (in_inference_mode, ValueError, "inference_mode no_grad"),
    (
        changed(lambda layers: setattr(layers[1].mlp, "up_proj", nn.Sequential(layers[1].mlp.up_proj))),
        ValueError,
        "layers.1.mlp.up_proj Sequential",
    ),
    (attach(o_ratio=0.01), ValueError, "none heads"),
    (
        lambda world: s2ft.attach(world.model, S2FTConfig(d_ratio=0.1), protect="text"),
        TypeError,
        "protect DataLoader str",
    ),
    (
        lambda world: s2ft.attach(
            tiny_model().to("meta"), S2FTConfig(d_ratio=0.1), protect=[torch.ones(1, 4, dtype=torch.int64)]
        ),
        ValueError,
        "protect meta device",
    ),
    (
        lambda world: s2ft.attach(world.model, S2FTConfig(d_ratio=0.1, selection="activation"), calibration=[]),
        ValueError,
        "calibration",
    ),
    (
        lambda world: s2ft.attach(world.model, S2FTConfig(d_ratio=0.1), calibration=[{"input_ids": torch.ones(1, 4)}]),
        ValueError,
        "calibration random",
    ),
    (coupled("0", "9"), ValueError, "9"),
    (coupled("2", "0"), ValueError, "expected 8 shape"),
    (coupled("0", "1"), (ValueError, TypeError), "1"),
    (lambda world: s2ft.attach(plain_net(), S2FTConfig(d_ratio=0.5)), ValueError, "example couplings"),
    (
        lambda world: s2ft.attach(
            plain_net(), S2FTConfig(d_ratio=0.5, modules_to_save=["0", "2"]), example=torch.ones(1, 4)
        ),
        ValueError,
        "modules_to_save no coupling train",
    ),
    (
        lambda world: s2ft.attach(
            nn.Sequential(nn.Conv2d(4, 8, 1, groups=2), nn.ReLU(), nn.Conv2d(8, 3, 1)),
            S2FTConfig(d_ratio=0.5),
            couplings=[Coupling.ffn(0, up="0", down="2", channels=8)],
            example=torch.randn(1, 4, 4, 4),
        ),
        ValueError,
        "Conv2d 2 groups one",
    ),
    (lambda world: s2ft.detach(world.model), ValueError, "attach"),
    (lambda world: s2ft.merge(world.model), ValueError, "attach"),
    (lambda world: s2ft.select(world.model, S2FTConfig()), ValueError, "ratio"),
]

# ---- adapters ----------------------------------------------------------------------------------------------------


ADAPTERS = [
    (lambda world: s2ft.load_adapter(world.model, "nowhere"), FileNotFoundError, "nowhere"),
    (lambda world: s2ft.load_adapter(world.model, world.folder), (ValueError, FileNotFoundError), "adapter"),
    (lambda world: s2ft.load_adapter(world.other, world.adapter), ValueError, "base"),
    (lambda world: s2ft.load_adapter(world.model, world.adapter, name="a b/c"), ValueError, "name a b/c"),
    (lambda world: s2ft.set_adapter(world.model, "nobody"), ValueError, "adapter"),
    (with_two(lambda world: s2ft.set_adapter(world.model, "b")), ValueError, "'b' a"),
    (with_two(lambda world: s2ft.set_adapter(world.model, {"a": "much"})), (TypeError, ValueError), "much"),
    (with_two(lambda world: s2ft.set_adapter(world.model, {"a": float("inf")})), ValueError, "inf"),
    (with_two(lambda world: s2ft.load_adapter(world.model, world.adapter, name="a")), ValueError, "'a'"),
    (with_two(lambda world: s2ft.delete_adapter(world.model, "b")), ValueError, "'b'"),
    (with_two(lambda world: s2ft.rename_adapter(world.model, "b", "c")), ValueError, "'b'"),
    (with_two(lambda world: s2ft.rename_adapter(world.model, "a", "x/y")), ValueError, "x/y"),
    (with_two(lambda world: s2ft.save_adapter(world.model, world.root / "s", name="b")), ValueError, "'b'"),
    (with_two(lambda world: s2ft.get_adapter(nn.ModuleDict({"module": world.model}), "a")), ValueError, "model.module"),
    (lambda world: s2ft.save_adapter(world.model, world.root / "s"), ValueError, "adapter"),
    (lambda world: s2ft.read_adapter("nowhere"), FileNotFoundError, "nowhere"),
    (lambda world: s2ft.combine_adapters(world.model, {}, "sum"), ValueError, "adapter"),
    (with_two(lambda world: s2ft.combine_adapters(world.model, {"a": 1.0, "b": 1.0}, "sum")), ValueError, "'b'"),
    (lambda world: s2ft.export_lora(world.model, world.root / "lora"), ValueError, "adapter"),
    (
        lambda world: s2ft.import_lora(world.model, world.adapter),
        (ValueError, FileNotFoundError),
        "adapter_config.json",
    ),
    (lambda world: s2ft.save_merged(world.model, world.model_folder), ValueError, "adapter attach"),
    (lambda world: s2ft.freeze_adapter(world.model), ValueError, "adapter"),
]

# ---- commands ----------------------------------------------------------------------------------------------------


def command(text, **files):
    """Run a command. {model}, {data}, {adapter}, {out} and the names of `files`, which are written, are paths."""

    def run(world, capsys):
        paths = world.paths()
        for name, content in files.items():
            path = world.root / (name + (".py" if content.startswith("def ") else ".jsonl"))
            path.write_text(content)
            paths[name] = path
        try:
            status = main([word.format(**paths) for word in shlex.split(text)])
        except SystemExit as leave:
            status = leave.code
        assert status == 2, f"exit status {status}"
        assert not (world.root / "out").exists(), "something was written"
        return capsys.readouterr().err

    return run


SFT = "sft --model {model} --output {out} --data"
EVAL = "eval --model {model} --task arithmetic --data"
SELECT = "select --model {model} --output {out}"
DPO = "dpo --model {model} --output {out} --data"
GRPO = (
    "grpo --model {model} --output {out} --data {tasks} --batch-size 4 --max-steps 2 --num-generations 4 "
    "--max-completion-length 8"
)
PAIR = '{"question": "1+1=", "chosen": "2", "rejected": "no idea"}'
TASK = '{"question": "1+1=", "answer": "2"}'
SHORT = "def short(completions, **_):\n    return [-float(len(text)) for text in completions]\n"

COMMANDS = [
    (command("trian --model {model}"), "trian"),
    (command("sft"), "--model"),
    (command("sft --model {model} --output {out}"), "--data"),
    (command("sft --model {model} --data {data}"), "output"),
    (command(SFT + " {data} --d-ration 0.1"), "--d-ratio"),
    (command(SFT + " {data} --d-ratio 1.5"), "d_ratio 1.5"),
    (command(SFT + " {data} --d-ratio much"), "d-ratio much"),
    (command(SFT + " {data} --layers 7"), "7"),
    (command(SFT + " {data} --selection best"), "selection best"),
    (command(SFT + " {data} --resume"), "resume"),
    (command(SFT + " {data} --max-steps few"), "max-steps few"),
    (command(SFT + " {data} --optim sgdd"), "sgdd"),
    (command(SFT + " {data} --max-length 1"), "max_length"),
    (command(SFT + " {data} --packing maybe"), "packing maybe"),
    (command(SFT + " {data} --split train[:10%"), "split"),
    (command(SFT + " {data} --field prompt"), "field prompt"),
    (command(SFT + " {data} --config nowhere.yaml"), "nowhere.yaml"),
    (command(SFT + " nowhere.jsonl"), "nowhere.jsonl"),
    (command(SFT + " {empty}", empty=""), "empty"),
    (command(SFT + " {bad}", bad='{"instruction": "a", "output": "b"}\noops\n'), "line 2 JSON"),
    (command(SFT + " {bad}", bad='{"question": "a"}\n'), "'question'"),
    (command(SFT + " {bad}", bad='{"instruction": "a", "output": ""}\n'), "output empty"),
    (command(SFT + " {bad}", bad='{"messages": [{"role": "user", "content": "a"}]}\n'), "line 1 messages"),
    (command(SFT + " {bad}", bad='{"messages": "hello"}\n'), "messages"),
    (command(SFT + " {bad}", bad="[1, 2]\n"), "row 1 int"),
    (command(SFT.replace("{model}", "./nowhere") + " {data}"), "nowhere"),
    (command(SFT.replace("{model}", "{adapter}") + " {data}"), "an adapter --adapter"),
    (command(EVAL + " nowhere.jsonl"), "nowhere.jsonl"),
    (command(EVAL + " {data} --adapter {root}/nowhere"), "nowhere"),
    (command(EVAL + " {bad}", bad='{"instruction": "a", "output": "b"}\n'), "number"),
    (command(EVAL + " {data} --batch-size 0"), "batch_size 0"),
    (command("eval --model {model} --data {data} --task poetry"), "task poetry"),
    (command("merge --model {model} --adapter {adapter} --output {model}"), "exists"),
    (command("merge --model {model} --adapter {root}/nowhere --output {out}"), "nowhere"),
    (command("merge --model {other} --adapter {adapter} --output {out}"), "base"),
    (command("generate --model {model} --prompt a --adapter {root}/nowhere"), "nowhere"),
    (command("generate --model {model} --prompt a --temperature -1"), "temperature -1"),
    (command("generate --model {model} --prompt a --top-p 2"), "top_p 2"),
    (command("info {root}/nowhere"), "nowhere"),
    (command("info {root}/nothing"), "adapter"),
    (command("export --model {model} --format lorra --output {out} {adapter}"), "lorra"),
    (command("combine {adapter} --weights 1 2 --output {out}"), "weights"),
    (command("export --model {model} --output {out}"), "ADAPTER --from-lora"),
    (command("export {adapter} --from-lora x --model {model} --output {out}"), "ADAPTER --from-lora not both"),
    (command("export --from-lora x --format lora --model {model} --output {out}"), "--from-lora --format"),
    (command("export {adapter} --format merged --rank 8 --model {model} --output {out}"), "--rank lora merged"),
    (command("export {adapter} --max-shard-size 1GB --model {model} --output {out}"), "--max-shard-size merged lora"),
    (command("export {adapter} --name x --model {model} --output {out}"), "--name from-lora lora"),
    (command("export {adapter} --rank 1 --model {model} --output {out}"), "rank at least"),
    (
        command("export {adapter} --format merged --max-shard-size 0GB --model {model} --output {out}"),
        "max_shard_size above 0",
    ),
    (command("export {adapter} --dtype int8 --model {model} --output {out}"), "--dtype bfloat16 'int8'"),
    (command("export {root}/nowhere --model {model} --output {out}"), "nowhere"),
    (command("export --from-lora {adapter} --model {model} --output {out}"), "LoRA adapter_config.json"),
    (command("export {adapter} --format gguf --quantization q4_k_n --model {model} --output {out}"), "q4_k_"),
    (command("export {adapter} --format gguf --llama-cpp nowhere --model {model} --output {out}"), "nowhere folder"),
    (command("export {adapter} --format gguf --num-ctx 8 --model {model} --output {out}"), "--num-ctx ollama"),
    (command("export {adapter} --format ollama --num-ctx 0 --model {model} --output {out}"), "at least 1, got 0"),
    (command("merge --adapter {adapter} --model {model} --output {out}.gguf"), "export --format gguf"),
    (command("merge --adapter {adapter} --model {model} --output {out}.gguf --dtype float16"), "--dtype types"),
    (command("patch {model} {adapter}"), ".gguf export"),
    (command("patch --undo {model} {adapter}"), "--undo ADAPTER"),
    (command("combine {adapter} {foreign} --output {out}"), "bases"),
    (command("chat --model {model} --adapter {adapter} {adapter}"), "adapter both NAME="),
    (command("chat --model {model} --adapter base={adapter}"), "'base' NAME="),
    (command("chat --model {model} --top-p 0"), "top_p above 0"),
    (command("eval --model {model} --task commonsense --data {data}"), "example 1"),
    (command("plan {root}/nowhere"), "nowhere"),
    (command("estimate {model} --batch-size 0"), "batch 0"),
    (command("estimate {model} --devices 2"), "devices strategy ddp"),
    (command("estimate {model} --strategy ddp --offload all"), "offload ddp None"),
    (command("estimate {model} --strategy ddp --load-in-4bit"), "counted one device"),
    (command("estimate {model} --ratios 1.5"), "ratios 1.5"),
    (command("estimate {model} --device-memory much"), "device_memory 24GB 'much'"),
    (command("estimate {model} --load-in-4bit --load-in-8bit"), "load_in_4bit load_in_8bit"),
    (command("estimate {model} --load-in-4bit --keep-packed"), "load_in_4bit keep_packed"),
    (command("estimate {model} --keep-packed"), "keep_packed GGUF"),
    (command("export {adapter} --model {model} --output {model}"), "exists"),
    (command("serve --model {model} --adapters {root}/nowhere --check"), "nowhere"),
    (command("serve --model {model} --port 70000"), "port"),
    (command("serve --model {model} --queue-size 0"), "queue_size"),
    (command("serve --model {model} --api-key 'a b'"), "API key"),
    (command("serve --model {model} --api-key ''"), "API key"),
    (command("serve --model {model} --max-tokens-limit 0"), "max_tokens_limit"),
    (command("chat --model {model} --adapter {root}/nowhere"), "nowhere"),
    # names of commands and options
    (command("train"), "sft"),
    (command("evaluate"), "eval"),
    (command("push"), "--push-to-hub"),
    (command("fuse"), "combine"),
    (command("finetnue"), "finetune"),
    (command("--verison"), "--verison"),
    (command(SFT + " {data} --learning-rat 1"), "--learning-rate sft"),
    (command(SFT + " {data} --selection wieght"), "weight"),
    (command(SFT + " {data} --optimizer adamw_torch_fusd"), "adamw_torch_fused"),
    (command(SFT + " {data} --lr 1 --learning-rate 2"), "--lr --learning-rate same"),
    (command(EVAL + " {data} --lr 1"), "--lr eval"),
    (command("eval --model_name_or_path=m"), "--model"),
    (command(EVAL + " {data} --max-new-token 1"), "--max-new-tokens"),
    (command(EVAL + " {data} --bf16"), "--dtype bfloat16"),
    (command("export {adapter} --model {model} --output {out} --lora-rank 3"), "--lora-rank --rank"),
    (command("info {adapter} more"), "more"),
    (command("select --d-ratio 0.1"), "--model --output select"),
    # values of s2ft sft
    (command(SFT + " {data} --d-ratio"), "--d-ratio argument"),
    (command(SFT + " {data} --max-steps 1" + "0" * 30), "max_steps 4294967295"),
    (command(SFT + " {data} --limit 0"), "limit 1"),
    (command(SFT + " {data} --eval-limit 0"), "eval_limit 1"),
    (command(SFT + " {data} --schedule sine"), "--schedule linear sine"),
    (command(SFT + " {data} --dtype int8"), "--dtype bfloat16 int8"),
    (command(SFT + " {data} --overwrite perhaps"), "--overwrite true perhaps"),
    (command(SFT + " {data} --stop-after -1"), "stop_after 0"),
    (command(SFT + " {data} --name a/b"), "name a/b"),
    (command(SFT + " {data} --epochs inf"), "num_train_epochs inf"),
    (command(SFT + " {data} --batch-size 5 --micro-batch-size 2"), "batch_size 5 per_device_train_batch_size"),
    (command(SFT + " {data} --resume elsewhere"), "resume_from_checkpoint elsewhere"),
    (command(SFT + " {data} --report-to no_such_logger"), "no_such_logger"),
    (command(SFT + " {data} --report-to comet_ml"), "comet-ml pip"),
    # what the data, the model and the machine do not have
    (command(SFT + " {data} --packing --packing-strategy wrapped"), "packing_strategy 'wrapped'"),
    (command(SFT + " {data} --resume --overwrite"), "resume overwrite exclude"),
    (command(SFT + " {data} --fp16"), "float16 GPU"),
    (command(SFT + " {data} --attn-implementation newton"), "causal newton"),
    (command(SFT + " {data} --eos-token <|no|>"), "eos_token <|no|> vocabulary"),
    (command(SFT + " {data} --eval-task arithmetic"), "eval_task eval_data test_split_size"),
    (command(SFT + " {data} --eval-strategy epoch"), "evaluation eval_data"),
    (command(SFT + " {data} --eval-data none.jsonl"), "none.jsonl"),
    (command(SFT + " {data} --early-stopping-patience 2 --save-strategy no"), "load_best_model_at_end save_strategy"),
    (command(SFT + " {data} --calibration-examples 4"), "calibration_examples effect"),
    (command(SFT + " {data} --on-top {root}/nothing"), "nothing"),
    (command(SFT + " {data} --stop-at-forgetting 0.1"), "stop_at_forgetting forgetting_data"),
    (command(SFT + " {data} --forgetting-data none.jsonl"), "none.jsonl"),
    (command(SFT + " {data} --protect-ratio 0.3"), "protect_ratio=0.3 protect"),
    (command(SFT + " {long}", long=json.dumps({"instruction": "x" * 400, "output": "y"})), "1 rows fits"),
    (command(SFT + " {deep}", deep="[" * 100000), "nested"),
    (command(SFT + " {half}", half='{"instruction": "\\ud800", "output": "x"}'), "line 1 instruction"),
    (command(SFT + " {data} --d-ratio 0 --q-ratio=0.0"), "q_ratio d_ratio above 0"),
    (command(DPO + " {data} --d-ratio 0"), "d_ratio above 0"),
    (command(GRPO + " --rewards exact --d-ratio 0", tasks=TASK), "d_ratio above 0"),
    (command(SELECT + " --d-ratio 0"), "d_ratio above 0"),
    (command("plan {model} --d-ratio 0"), "d_ratio above 0"),
    (command("estimate {model} --d-ratio 0"), "d_ratio above 0"),
    # s2ft select
    (command(SELECT + " --budget lots"), "budget 9.2M"),
    (command(SELECT + " --budget 1"), "budget=1"),
    (command(SELECT + " --units nowhere.json"), "nowhere.json"),
    (command(SELECT + " --units {data}"), "selection"),
    (command(SELECT + " --units x --d-ratio 0.1"), "units d_ratio"),
    (command(SELECT + " --selection activation"), "activation data"),
    (command(SELECT + " --data {data}"), "random data"),
    (command(SELECT + " --selection gradient --data {data} --calibration-examples 5"), "calibration_examples 1 4"),
    (command(SELECT + " --selection gradient --data {data} --calibration-examples 0"), "calibration_examples 1 4"),
    (command(SELECT + " --batch-size 0"), "batch_size 1"),
    (command(SELECT + " --protect-ratio 0.5"), "protect_ratio=0.5 protect"),
    (command("select --model {model} --output {data}"), "exists"),
    (command("select --model {model} --output no/folder/s.json"), "folder no/folder"),
    # answers
    (command("generate --model {model}"), "--prompt --prompt-file"),
    (command("generate --model {model} --prompt a --prompt-file b"), "--prompt --prompt-file"),
    (command("generate --model {model} --prompt-file nowhere.txt"), "nowhere.txt"),
    (command("generate --model {model} --prompt a --max-new-tokens 0"), "max_new_tokens 1"),
    (command("generate --model {model} --prompt a --min-p 2"), "min_p 1"),
    (command("generate --model {model} --prompt a --repetition-penalty 0"), "repetition_penalty 0"),
    (command("generate --model {model} --raw --system b --prompt a"), "raw system"),
    (command("generate --model {model} --prompt " + "a" * 300), "256"),
    (command("generate --model {model} --prompt a\udc80"), "Unicode"),
    (command("eval --model {model}"), "--data"),
    (command("eval --data {data}"), "--model adapter base"),
    (command(EVAL + " {data} --num-fewshot 1"), "num_fewshot data"),
    (command(EVAL + " {data} --num-beams 0"), "num_beams 1"),
    (command(EVAL + " {data} --output {data}"), "exists"),
    (command(EVAL + " {data} --kl"), "kl --adapter"),
    (command("eval --model {model} --adapter a --kl"), "kl --data"),
    (command("eval --model {model} --lm-eval arc_easy --num-beams 2"), "num_beams without task"),
    (command("eval --adapter a --data {data} --num-beams 2"), "num_beams without task"),
    (command("eval --adapter a --forgetting {data} --kl-on answers"), "kl_on without kl"),
    (command("eval --model {model} --lm-eval arc_easy --data x"), "data lm_eval"),
    (command("eval --model {model} --lm-eval arc_easy --split test"), "split lm_eval"),
    (command("eval --model {model} --lm-eval arc_easy --forgetting o --adapter a"), "forgetting lm_eval"),
    (command("combine {adapter} nowhere --output {out}"), "nowhere"),
    (command("combine {adapter} --weights nan --output {out}"), "finite"),
    (command("combine {adapter} --name ../x --output {out}"), "name ../x"),
    (command("combine {adapter} --output {adapter}"), "exists"),
    # preferences and rewards
    (command(DPO + " {data}"), "line 1 chosen"),
    (command(DPO + " {pairs} --sync-ref-model true", pairs=PAIR), "sync_ref_model"),
    (command(DPO + " {pairs} --label-smoothing-factor 0.1", pairs=PAIR), "label_smoothing_factor sft"),
    (command(DPO + " {pairs} --padding-free true", pairs=PAIR), "padding_free DPOTrainer"),
    (command(DPO + " {pairs} --eval-task arithmetic", pairs=PAIR), "eval_task sft"),
    (command(DPO + " {pairs} --max-length 8", pairs=PAIR), "max_length 8"),
    (command(DPO + " {pairs} --bete 0.1", pairs=PAIR), "--beta"),
    (command(DPO + " {pairs} --dtype float16", pairs=PAIR), "float16 GPU"),
    (command(DPO + " {pairs} --fsdp full_shard", pairs=PAIR), "FSDP"),
    (command(GRPO + " --rewards answer_equals", tasks=TASK), "answer_equals answer_equal"),
    (command(GRPO + " --rewards answer_equal", tasks='{"question": "1+1="}'), "answer_equal 'answer'"),
    (command(GRPO + " --rewards format --num-generations 1", tasks=TASK), "num_generations 2 1"),
    (
        command(GRPO + " --rewards format --chat-template-kwargs '{{\"a\": 1}}'", tasks=TASK),
        "chat_template_kwargs record",
    ),
    (command(GRPO + " --rewards format --num-iterations 3 --save-steps 4", tasks=TASK), "save_steps 4 3"),
    (command(GRPO + " --rewards format --num-iterations 3 --save-steps 0.5", tasks=TASK), "save_steps 0.5 3"),
    (
        command(GRPO + " --rewards answer_equal --eval-data {held}", tasks=TASK, held='{"question": "1+1="}'),
        "answer_equal 'answer'",
    ),
    (command(GRPO + " --rewards format --sync-ref-model true --beta 0.1", tasks=TASK), "sync_ref_model base"),
    (
        command(GRPO + " --rewards format --use-transformers-continuous-batching true", tasks=TASK),
        "continuous_batching",
    ),
    (
        command(GRPO + " --rewards format --generation-batch-size 8 --steps-per-generation 1", tasks=TASK),
        "generation_batch_size steps_per_generation",
    ),
    (command(GRPO + " --rewards {mine}:shrot", tasks=TASK, mine=SHORT), "shrot short"),
    (command(GRPO + " --rewards nosuch.py", tasks=TASK), "nosuch.py"),
    (command(GRPO + " --rewards {mine} --reward-weights 1 2", tasks=TASK, mine=SHORT), "reward_weights 2 1"),
    (command(GRPO + " --rewards {mine} --num-generations 3", tasks=TASK, mine=SHORT), "num_generations 3 batch_size"),
    (command(GRPO + " --rewards {mine} --selection activation", tasks=TASK, mine=SHORT), "activation units"),
    (command(GRPO + " --rewards {mine} --max-completion-length 255", tasks=TASK, mine=SHORT), "1 prompts context"),
    (command(GRPO + " --rewards {mine} --num-generations 2", tasks=TASK, mine=SHORT), "1 prompt num_generations"),
    (
        command(GRPO + " --use-vllm true --vllm-enable-sleep-mode true --rewards format", tasks=TASK),
        "vllm_enable_sleep_mode",
    ),
]


class World:
    """A tiny model, another one, an adapter of the first, and files, in one folder."""

    def __init__(self, root):
        self.root, self.folder = root, root / "nothing"
        self.folder.mkdir()
        self.model_folder = save_tiny(root / "model")
        self.other_folder = save_tiny(root / "other", seed=1)
        self.model, self.other = tiny_model(), tiny_model(seed=1)
        self.adapter, self.data = root / "adapter", write_jsonl(root / "data.jsonl", sums(4))
        save_random_adapter(self.adapter, tiny_model(), d_ratio=0.1)
        s2ft.detach(save_random_adapter(root / "foreign", self.other, d_ratio=0.1))

    def paths(self):
        return {
            "root": self.root,
            "model": self.model_folder,
            "other": self.other_folder,
            "adapter": self.adapter,
            "foreign": self.root / "foreign",
            "data": self.data,
            "out": self.root / "out",
        }


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def lacks(text, words):
    return [word for word in words.split() if word not in text]


CALLS = [*CONFIGS, *ATTACHING, *ADAPTERS]


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_a_mistake_in_python_raises_and_changes_nothing(world, number):
    call, error, words = CALLS[number]
    before = {name: value.clone() for name, value in world.model.state_dict().items()}
    with pytest.raises(error) as raised:
        call(world)
    assert lacks(str(raised.value), words) == [], str(raised.value)
    after = world.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_a_mistake_on_the_command_line_ends_with_one_error(world, capsys, number):
    run, words = COMMANDS[number]
    error = run(world, capsys)
    assert "Traceback" not in error and error.count("error: ") == 1
    assert lacks(error, words) == [], error
