"""Units whose removal would change the task's loss most, to first order.

Source: Molchanov et al., "Importance Estimation for Neural Network Pruning" (CVPR 2019, arXiv 1906.10771), equation 8:
the square of the sum of gradient × weight over a unit, averaged over the data.
"""

import torch
from torch import Tensor

from bench.evidence.selections.principal import by_unit
from s2ft.model.coupling import Projection
from s2ft.model.weights import weight_at
from s2ft.selection.gradient import root_mean_squares
from s2ft.selection.metric import Metric, Request, Units


def saliency_scores(request: Request) -> Units:
    """Return |sum of gradient × weight| over each unit, as the root mean square over the calibration sequences.

    The gradient is that of one sequence's loss, see `gradient`.

    Returns:
        The scores by projection, shape [count], float64.
    """

    def squares(gradient: Tensor, projection: Projection) -> Tensor:
        weight = weight_at(request.model, projection).matrix
        products = (gradient.double() * weight).movedim(projection.dim, 0).flatten(1).sum(1)
        elements = projection.elements(torch.arange(projection.count)).to(products.device)
        return by_unit(products[elements], projection).square()

    return root_mean_squares(request, squares)


METRIC = Metric(saliency_scores, calibrated=True)
