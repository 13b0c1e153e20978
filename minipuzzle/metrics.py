"""Names of the scores. No torch in here: the recipe knows them too."""

from __future__ import annotations

from typing import Literal, get_args

LayerMetric = Literal["hidden_mse", "logit_mse", "kl", "cosine"]
"""What a layer is worth, all larger where it matters more.

`hidden_mse`: mean squared error of the state just before the head, with the layer against without
it (MiniPuzzle: Nemotron-H, arXiv 2504.03624, section 3.2). `logit_mse`: the same of the logits,
divided by their mean square (Nemotron Elastic, arXiv 2511.16664). `kl`: KL(with || without) of the
next-token distributions, nats per token (Minitron-SSM, arXiv 2504.11409). `cosine`: block influence
1 - E cos(what enters the layer, what leaves it) (ShortGPT, arXiv 2403.03853).
"""

UnitMetric = Literal["activation", "flap", "energy", "surgeon"]
"""What a unit (channel, head) is worth, all larger where it matters more.

`activation`: the published score: mean of |a| over the sequence, L2 over the sequences, L2 over the
channels of a head (Minitron, arXiv 2407.14679; Minitron-SSM, equations 19 to 24). `flap`: variance
of what the writing projection reads times the squared norm of its column, as a root (WIFV: FLAP,
arXiv 2312.11983). `energy`: the same with the mean square in the variance's place. `surgeon`: place
in the order in which units can go when the others make up for them (prune/surgeon.py).
"""

Control = Literal["order", "reverse", "random"]
"""Rankings that know nothing of the model: a score must beat them to be worth something."""

LAYER_METRICS: tuple[LayerMetric, ...] = get_args(LayerMetric)
UNIT_METRICS: tuple[UnitMetric, ...] = get_args(UnitMetric)
CONTROLS: tuple[Control, ...] = get_args(Control)
