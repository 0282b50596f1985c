"""Sensitivity estimators: each a file, a frozen dataclass with one method, `estimate`."""

from mpsearch.estimation.estimator import Estimator as Estimator
from mpsearch.sensitivity.activation_entropy import ActivationEntropy as ActivationEntropy
from mpsearch.sensitivity.adapt_divergence import AdaPTDivergence as AdaPTDivergence
from mpsearch.sensitivity.channel_fisher import ChannelFisher as ChannelFisher
from mpsearch.sensitivity.cosine_distance import CosineDistance as CosineDistance
from mpsearch.sensitivity.delta_loss import DeltaLoss as DeltaLoss
from mpsearch.sensitivity.empirical_fisher import EmpiricalFisher as EmpiricalFisher
from mpsearch.sensitivity.emq import EMQ as EMQ
from mpsearch.sensitivity.evolved_proxy import EvolvedProxy as EvolvedProxy
from mpsearch.sensitivity.fisher import Fisher as Fisher
from mpsearch.sensitivity.fisher_projection import FisherProjection as FisherProjection
from mpsearch.sensitivity.gauss_newton_trace import GaussNewtonTrace as GaussNewtonTrace
from mpsearch.sensitivity.gradient_importance import GradientImportance as GradientImportance
from mpsearch.sensitivity.gradient_weight import GradientWeight as GradientWeight
from mpsearch.sensitivity.grasp import GraSP as GraSP
from mpsearch.sensitivity.hawq_proxies import HAWQProxy as HAWQProxy
from mpsearch.sensitivity.hawq_proxies import HAWQV2Proxy as HAWQV2Proxy
from mpsearch.sensitivity.hessian_augmented import HessianAugmented as HessianAugmented
from mpsearch.sensitivity.hessian_top_eigenvalue import HessianTopEigenvalue as HessianTopEigenvalue
from mpsearch.sensitivity.hessian_trace import HessianTrace as HessianTrace
from mpsearch.sensitivity.kfac_diagonal import KFACDiagonal as KFACDiagonal
from mpsearch.sensitivity.kl_divergence import KLDivergence as KLDivergence
from mpsearch.sensitivity.kurtosis import Kurtosis as Kurtosis
from mpsearch.sensitivity.layer_output_error import LayerOutputError as LayerOutputError
from mpsearch.sensitivity.linearity_coefficients import LinearityCoefficients as LinearityCoefficients
from mpsearch.sensitivity.lrp import LRP as LRP
from mpsearch.sensitivity.lrp_qvit import LRPQViT as LRPQViT
from mpsearch.sensitivity.lrp_qvit import MixQViT as MixQViT
from mpsearch.sensitivity.masked_kl import MaskedKL as MaskedKL
from mpsearch.sensitivity.metric_decoupled import MetricDecoupled as MetricDecoupled
from mpsearch.sensitivity.metric_decoupled import Part as Part
from mpsearch.sensitivity.orthogonality import Orthogonality as Orthogonality
from mpsearch.sensitivity.output_damage import OutputDamage as OutputDamage
from mpsearch.sensitivity.output_gradient import OutputGradient as OutputGradient
from mpsearch.sensitivity.output_mse import OutputMSE as OutputMSE
from mpsearch.sensitivity.path_shapley import PathShapley as PathShapley
from mpsearch.sensitivity.prediction_difference import PredictionDifference as PredictionDifference
from mpsearch.sensitivity.qe import QE as QE
from mpsearch.sensitivity.relative_weight_error import RelativeWeightError as RelativeWeightError
from mpsearch.sensitivity.salience_groups import SalienceGroups as SalienceGroups
from mpsearch.sensitivity.snip import SNIP as SNIP
from mpsearch.sensitivity.sqnr import SQNR as SQNR
from mpsearch.sensitivity.synflow import Synflow as Synflow
from mpsearch.sensitivity.task_metric import TaskMetric as TaskMetric
from mpsearch.sensitivity.taylor import Taylor as Taylor
from mpsearch.sensitivity.weight_entropy import WeightEntropy as WeightEntropy

#: Name on the command line -> class.
ESTIMATORS: dict[str, type] = {
    "kl-divergence": KLDivergence,
    "output-damage": OutputDamage,
    "output-mse": OutputMSE,
    "sqnr": SQNR,
    "cosine-distance": CosineDistance,
    "prediction-difference": PredictionDifference,
    "task-metric": TaskMetric,
    "layer-output-error": LayerOutputError,
    "masked-kl": MaskedKL,
    "metric-decoupled": MetricDecoupled,
    "linearity-coefficients": LinearityCoefficients,
    "path-shapley": PathShapley,
    "fisher-projection": FisherProjection,
    "fisher": Fisher,
    "gauss-newton-trace": GaussNewtonTrace,
    "kfac-diagonal": KFACDiagonal,
    "hessian-augmented": HessianAugmented,
    "empirical-fisher": EmpiricalFisher,
    "hessian-trace": HessianTrace,
    "hessian-top-eigenvalue": HessianTopEigenvalue,
    "output-gradient": OutputGradient,
    "delta-loss": DeltaLoss,
    "taylor": Taylor,
    "gradient-importance": GradientImportance,
    "relative-weight-error": RelativeWeightError,
    "kurtosis": Kurtosis,
    "lrp": LRP,
    "lrp-qvit": LRPQViT,
    "mix-qvit": MixQViT,
    "activation-entropy": ActivationEntropy,
    "weight-entropy": WeightEntropy,
    "orthogonality": Orthogonality,
    "adapt-divergence": AdaPTDivergence,
    "salience-groups": SalienceGroups,
    "snip": SNIP,
    "synflow": Synflow,
    "grasp": GraSP,
    "channel-fisher": ChannelFisher,
    "gradient-weight": GradientWeight,
    "qe": QE,
    "emq": EMQ,
    "hawq-proxy": HAWQProxy,
    "hawq-v2-proxy": HAWQV2Proxy,
}
