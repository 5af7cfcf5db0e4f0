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
    seed: int | None = option(
        None, "seed of the sampling; the same seed gives the same answers", shown="another one each time"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or above, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    def sampler(self, seed: int | None = None):
        """Return the Sampler of an answer, with another seed if one is given."""
        from s2ft.text.sampling import Sampler

        return Sampler(self.temperature, self.top_p, self.seed if seed is None else seed)
