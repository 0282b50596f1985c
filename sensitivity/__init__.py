"""Sensitivity estimators: each a file, a frozen dataclass with one method, `estimate`."""

from mpsearch.estimator import Estimator as Estimator
from mpsearch.sensitivity.cosine_distance import CosineDistance as CosineDistance
from mpsearch.sensitivity.hessian_trace import HessianTrace as HessianTrace
from mpsearch.sensitivity.kl_divergence import KLDivergence as KLDivergence
from mpsearch.sensitivity.kurtosis import Kurtosis as Kurtosis
from mpsearch.sensitivity.layer_output_error import LayerOutputError as LayerOutputError
from mpsearch.sensitivity.linearity_coefficients import LinearityCoefficients as LinearityCoefficients
from mpsearch.sensitivity.masked_kl import MaskedKL as MaskedKL
from mpsearch.sensitivity.metric_decoupled import MetricDecoupled as MetricDecoupled
from mpsearch.sensitivity.metric_decoupled import Part as Part
from mpsearch.sensitivity.output_mse import OutputMSE as OutputMSE
from mpsearch.sensitivity.prediction_difference import PredictionDifference as PredictionDifference
from mpsearch.sensitivity.relative_weight_error import RelativeWeightError as RelativeWeightError
from mpsearch.sensitivity.sqnr import SQNR as SQNR
from mpsearch.sensitivity.task_metric import TaskMetric as TaskMetric

#: Name on the command line -> class.
ESTIMATORS: dict[str, type] = {
    "kl-divergence": KLDivergence,
    "output-mse": OutputMSE,
    "sqnr": SQNR,
    "cosine-distance": CosineDistance,
    "prediction-difference": PredictionDifference,
    "task-metric": TaskMetric,
    "layer-output-error": LayerOutputError,
    "masked-kl": MaskedKL,
    "metric-decoupled": MetricDecoupled,
    "linearity-coefficients": LinearityCoefficients,
    "hessian-trace": HessianTrace,
    "relative-weight-error": RelativeWeightError,
    "kurtosis": Kurtosis,
}
