"""Which couplings a model has: one small file a model family, registered by model_type."""
from s2ft.arch import (bert, clip, cohere, deepseek, gpt2, gpt_neox, gptj, llama, mixtral, olmo2, opt,  # noqa: F401
                       phi, phi3, stablelm, starcoder2, t5, vit, whisper)   # each registers its model types
from s2ft.arch.given import given_couplings
from s2ft.arch.registry import couplings_of, known_architectures, register_architecture

__all__ = ["couplings_of", "given_couplings", "known_architectures", "register_architecture"]
