"""Plans in the hands of other quantizers: `export.<target>(plan, model)`, and `verify`, which reads back what they did.

Each tool is one file of `mpsearch.export.tools` with a function that writes a plan, where it can be one that reads it back, and an
`Exporter` that declares both. `mpsearch.testing.exporter_checks` runs over everything that `EXPORTERS` names.
"""

from typing import Any

from torch import nn

from mpsearch.core.plan import Plan
from mpsearch.errors import ExportError, nearest
from mpsearch.export.exporter import Exporter as Exporter
from mpsearch.export.exporter import Setting as Setting
from mpsearch.export.exporter import carried_out
from mpsearch.export.fitting import Snapped as Snapped
from mpsearch.export.fitting import snapped as snapped
from mpsearch.export.tools.aimet import AIMET as AIMET
from mpsearch.export.tools.aimet import aimet as aimet
from mpsearch.export.tools.auto_round import AUTO_ROUND as AUTO_ROUND
from mpsearch.export.tools.auto_round import auto_round as auto_round
from mpsearch.export.tools.bitsandbytes import BITSANDBYTES as BITSANDBYTES
from mpsearch.export.tools.bitsandbytes import bitsandbytes as bitsandbytes
from mpsearch.export.tools.brevitas import BREVITAS as BREVITAS
from mpsearch.export.tools.brevitas import brevitas as brevitas
from mpsearch.export.tools.compressed_tensors import COMPRESSED_TENSORS as COMPRESSED_TENSORS
from mpsearch.export.tools.compressed_tensors import compressed_tensors as compressed_tensors
from mpsearch.export.tools.executorch import EXECUTORCH as EXECUTORCH
from mpsearch.export.tools.executorch import executorch as executorch
from mpsearch.export.tools.exllamav3 import EXLLAMAV3 as EXLLAMAV3
from mpsearch.export.tools.exllamav3 import exllamav3 as exllamav3
from mpsearch.export.tools.gguf import GGUF as GGUF
from mpsearch.export.tools.gguf import gguf as gguf
from mpsearch.export.tools.gptqmodel import GPTQMODEL as GPTQMODEL
from mpsearch.export.tools.gptqmodel import gptqmodel as gptqmodel
from mpsearch.export.tools.hqq import HQQ as HQQ
from mpsearch.export.tools.hqq import hqq as hqq
from mpsearch.export.tools.llama_quantize import LLAMA_QUANTIZE as LLAMA_QUANTIZE
from mpsearch.export.tools.llama_quantize import llama_quantize as llama_quantize
from mpsearch.export.tools.llm_compressor import LLM_COMPRESSOR as LLM_COMPRESSOR
from mpsearch.export.tools.llm_compressor import llm_compressor as llm_compressor
from mpsearch.export.tools.mct import MCT as MCT
from mpsearch.export.tools.mct import mct as mct
from mpsearch.export.tools.mlx import MLX as MLX
from mpsearch.export.tools.mlx import mlx as mlx
from mpsearch.export.tools.modelopt import MODELOPT as MODELOPT
from mpsearch.export.tools.modelopt import modelopt as modelopt
from mpsearch.export.tools.neutral import NEUTRAL as NEUTRAL
from mpsearch.export.tools.neutral import neutral as neutral
from mpsearch.export.tools.nncf import NNCF as NNCF
from mpsearch.export.tools.nncf import nncf as nncf
from mpsearch.export.tools.onnxruntime import ONNXRUNTIME as ONNXRUNTIME
from mpsearch.export.tools.onnxruntime import onnxruntime as onnxruntime
from mpsearch.export.tools.onnxruntime_static import ONNXRUNTIME_STATIC as ONNXRUNTIME_STATIC
from mpsearch.export.tools.onnxruntime_static import onnxruntime_static as onnxruntime_static
from mpsearch.export.tools.pt2e import PT2E as PT2E
from mpsearch.export.tools.pt2e import pt2e as pt2e
from mpsearch.export.tools.quanto import QUANTO as QUANTO
from mpsearch.export.tools.quanto import quanto as quanto
from mpsearch.export.tools.torchao import TORCHAO as TORCHAO
from mpsearch.export.tools.torchao import torchao as torchao
from mpsearch.export.verification import Reader
from mpsearch.export.verification import Verification as Verification
from mpsearch.quantizers.min_max import MinMax as MinMax
from mpsearch.targets.rules import TARGETS as TARGETS

#: Target -> what writes a plan for it: `EXPORTERS[target](plan, model=None, *, snap=False, path=None, **settings)`.
EXPORTERS: dict[str, Exporter] = {
    "torchao": TORCHAO,
    "compressed-tensors": COMPRESSED_TENSORS,
    "onnxruntime": ONNXRUNTIME,
    "onnxruntime-static": ONNXRUNTIME_STATIC,
    "gguf": GGUF,
    "llama-quantize": LLAMA_QUANTIZE,
    "hqq": HQQ,
    "mlx": MLX,
    "pt2e": PT2E,
    "executorch": EXECUTORCH,
    "brevitas": BREVITAS,
    "gptqmodel": GPTQMODEL,
    "auto-round": AUTO_ROUND,
    "exllamav3": EXLLAMAV3,
    "llm-compressor": LLM_COMPRESSOR,
    "aimet": AIMET,
    "mct": MCT,
    "modelopt": MODELOPT,
    "nncf": NNCF,
    "quanto": QUANTO,
    "bitsandbytes": BITSANDBYTES,
    "neutral": NEUTRAL,
}
#: Target -> its package, and what carries a plan out with it and reads it back.
READERS: dict[str, tuple[str, Reader]] = {
    name: (exporter.package, exporter.read) for name, exporter in EXPORTERS.items() if exporter.read is not None
}


def verify(plan: Plan, model: nn.Module, target: str, **options: Any) -> Verification:
    """Carry a plan out with the real tool on a copy of the model, read the result back, and compare layer by layer.

    Args:
        plan: as it goes to the exporter (snap it before).
        model: left as it is.
        target: a name in `READERS`.
        options: of the exporter.

    Returns:
        A check of each layer; all of it agrees with the plan.

    Raises:
        ExportError: for what the target cannot express.
        VerificationError: where anything differs: coverage, precision, code range, bytes, values.
        MissingPackage: without the tool.
    """
    if target not in READERS:
        raise ExportError(f"{target!r} cannot be verified here{nearest(target, READERS)}")
    return carried_out(EXPORTERS[target], plan, model, **options)
