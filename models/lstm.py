"""Sequence tagger: two bidirectional LSTM layers of 256 units over word ids (untrained)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim

from mopt.models._entry import untrained

NAME = "lstm"
TRAINED = False

VOCABULARY = 10_000
TAGS = 20
UNITS = 256


class Tagger(nn.Module):
    """Word ids int64 [B, T] -> tag logits [B, T, 20]. All rows are full: there is no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 128)
        self.lstm = nn.LSTM(128, UNITS, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * UNITS, TAGS)
        for name, weight in self.lstm.named_parameters():
            if name.startswith("bias_ih"):
                nn.init.zeros_(weight)
                # An open forget gate, as trained networks have it (Jozefowicz et al. 2015).
                nn.init.ones_(weight[UNITS : 2 * UNITS])
            elif name.startswith("bias"):
                nn.init.zeros_(weight)
            else:
                # Gain 2 works the gates; torch's default leaves the cell nearly linear.
                nn.init.normal_(weight, std=2 * weight.shape[1] ** -0.5)
        nn.init.normal_(self.head.weight, std=UNITS**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        states, _ = self.lstm(self.embedding(ids))
        return self.head(states)


def draw() -> tuple[Tensor]:
    return (torch.randint(VOCABULARY, (4, 64)),)


def dynamic_shapes() -> dict[str, dict[int, object]]:
    # torch.export keeps the LSTM as one operator, and that fixes the length.
    return {"ids": {0: Dim("batch", min=1, max=256)}}


MODEL = untrained(name=NAME, summary=__doc__, make=Tagger, draw=draw, dynamic_shapes=dynamic_shapes)
