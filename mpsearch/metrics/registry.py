"""The metrics by name."""

from collections.abc import Mapping

from mpsearch.metrics.cosine import Cosine
from mpsearch.metrics.divergences import KL, BernoulliKL
from mpsearch.metrics.metric import Metric
from mpsearch.metrics.squared_errors import MSE, PSNR, RelativeError
from mpsearch.metrics.targets import Accuracy, Loss

#: Name -> metric.
METRICS: Mapping[str, type[Metric]] = {
    "kl": KL,
    "bernoulli-kl": BernoulliKL,
    "mse": MSE,
    "relative-error": RelativeError,
    "psnr": PSNR,
    "cosine": Cosine,
    "loss": Loss,
    "accuracy": Accuracy,
}
