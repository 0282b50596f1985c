"""Quantizers: what turns weights and inputs into what a device computes with. `QUANTIZERS` names them, one's own derives from `Around`."""

from mpsearch.quantizers.awq import ActivationAware as ActivationAware
from mpsearch.quantizers.formats import FORMATS as FORMATS
from mpsearch.quantizers.formats import Format as Format
from mpsearch.quantizers.gptq import GPTQ as GPTQ
from mpsearch.quantizers.hadamard import HadamardRotation as HadamardRotation
from mpsearch.quantizers.input_statistics import InputStatistics as InputStatistics
from mpsearch.quantizers.input_statistics import input_statistics as input_statistics
from mpsearch.quantizers.min_max import MinMax as MinMax
from mpsearch.quantizers.packing import packed_bytes as packed_bytes
from mpsearch.quantizers.percentile import PercentileClip as PercentileClip
from mpsearch.quantizers.quantizer import Around as Around
from mpsearch.quantizers.quantizer import Quantizer as Quantizer
from mpsearch.quantizers.registry import QUANTIZERS as QUANTIZERS
from mpsearch.quantizers.registry import resolve_quantizer as resolve_quantizer
from mpsearch.quantizers.rounding import RoundByLargest as RoundByLargest
from mpsearch.quantizers.rounding import RoundToNearest as RoundToNearest
from mpsearch.quantizers.smoothquant import SmoothQuant as SmoothQuant
