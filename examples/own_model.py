"""Train a model of your own, which s2ft does not know, by describing its couplings.

Run it:

    python examples/own_model.py

A coupling says which channels of which layers belong together: channel i of `up` feeds channel i of `down`. s2ft checks
the description by running the model on an example. The script prints what is trained, the loss before and after, the
type of a merged layer, and the difference of the merged model's outputs.
"""

import torch
from torch import nn

import s2ft

WIDTH, CHANNELS = 16, 64


class Block(nn.Module):
    """A residual block with a feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, CHANNELS)
        self.down = nn.Linear(CHANNELS, WIDTH)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.Linear(WIDTH, 1))
    x = torch.randn(256, WIDTH)
    y = x.square().mean(1, keepdim=True)

    couplings = [
        s2ft.Coupling.ffn(layer, up=f"{layer}.up", down=f"{layer}.down", channels=CHANNELS) for layer in (0, 1)
    ]
    print(s2ft.attach(model, s2ft.S2FTConfig(u_ratio=0.25, d_ratio=0.25), couplings=couplings, example=x[:2]))

    optimizer = torch.optim.AdamW((each for each in model.parameters() if each.requires_grad), lr=1e-2)
    losses = []
    for _ in range(100):
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss: {losses[0]:.4f} before, {losses[-1]:.4f} after")

    with torch.no_grad():
        trained = model(x)
        s2ft.save_adapter(model, "own-adapter")  # the couplings are saved too, so that loading needs none
        merged = s2ft.merge(model)
        print(f"merged: {type(merged[0].up).__name__}, largest difference {(merged(x) - trained).abs().max():.1e}")


if __name__ == "__main__":
    main()
