"""How `s2ft generate` and `s2ft chat` choose the tokens of an answer: their common options."""

from dataclasses import dataclass

from s2ft.train.options import check_fields, option


@dataclass
class SamplingArguments:
    max_new_tokens: int = option(512, "longest answer", unit="tokens", least=1)
    temperature: float = option(0.0, "sampling temperature; 0 always takes the most likely token")
    top_p: float = option(
        1.0, "sample from the most likely tokens whose probabilities add up to this share", metavar="SHARE"
    )
    top_k: int = option(0, "sample from so many most likely tokens; 0 is all", least=0)
    min_p: float = option(
        0.0, "leave out tokens whose probability is below this share of the most likely one's", metavar="SHARE"
    )
    repetition_penalty: float = option(1.0, "above 1, tokens of the prompt and of the answer become less likely")
    seed: int | None = option(
        None, "seed of the sampling; the same seed gives the same answers", shown="another one each time"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or above, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be from 0 to 1, got {self.min_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")

    def sampler(self, seed: int | None = None):
        """Return the Sampler of an answer, with another seed if one is given."""
        from s2ft.text.running_batch import Sampler

        return Sampler(
            self.temperature,
            self.top_p,
            self.seed if seed is None else seed,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )
