"""Plans in the hands of other quantizers: `export.<target>(plan, model)`, and `verify`, which reads back what they did."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from mpsearch.core.plan import Plan
from mpsearch.errors import ExportError, nearest
from mpsearch.export.fitting import Snapped as Snapped
from mpsearch.export.fitting import fitted as _fitted
from mpsearch.export.fitting import snapped as snapped
from mpsearch.export.package import version as _version
from mpsearch.export.tools.aimet import aimet as aimet
from mpsearch.export.tools.aimet import read_aimet as _read_aimet
from mpsearch.export.tools.auto_round import auto_round as auto_round
from mpsearch.export.tools.auto_round import read_auto_round as _read_auto_round
from mpsearch.export.tools.bitsandbytes import bitsandbytes as bitsandbytes
from mpsearch.export.tools.bitsandbytes import read_bitsandbytes as _read_bitsandbytes
from mpsearch.export.tools.brevitas import brevitas as brevitas
from mpsearch.export.tools.brevitas import read_brevitas as _read_brevitas
from mpsearch.export.tools.compressed_tensors import compressed_tensors as compressed_tensors
from mpsearch.export.tools.compressed_tensors import read_compressed_tensors as _read_compressed_tensors
from mpsearch.export.tools.executorch import executorch as executorch
from mpsearch.export.tools.executorch import read_executorch as _read_executorch
from mpsearch.export.tools.exllamav3 import exllamav3 as exllamav3
from mpsearch.export.tools.gguf import gguf as gguf
from mpsearch.export.tools.gguf import read_gguf as _read_gguf
from mpsearch.export.tools.gptqmodel import gptqmodel as gptqmodel
from mpsearch.export.tools.gptqmodel import read_gptqmodel as _read_gptqmodel
from mpsearch.export.tools.hqq import hqq as hqq
from mpsearch.export.tools.hqq import read_hqq as _read_hqq
from mpsearch.export.tools.llama_quantize import llama_quantize as llama_quantize
from mpsearch.export.tools.llm_compressor import llm_compressor as llm_compressor
from mpsearch.export.tools.llm_compressor import read_llm_compressor as _read_llm_compressor
from mpsearch.export.tools.mct import mct as mct
from mpsearch.export.tools.mlx import mlx as mlx
from mpsearch.export.tools.mlx import read_mlx as _read_mlx
from mpsearch.export.tools.modelopt import modelopt as modelopt
from mpsearch.export.tools.modelopt import read_modelopt as _read_modelopt
from mpsearch.export.tools.neutral import neutral as neutral
from mpsearch.export.tools.nncf import nncf as nncf
from mpsearch.export.tools.nncf import read_nncf as _read_nncf
from mpsearch.export.tools.onnxruntime import onnxruntime as onnxruntime
from mpsearch.export.tools.onnxruntime import read_onnxruntime as _read_onnxruntime
from mpsearch.export.tools.onnxruntime_static import onnxruntime_static as onnxruntime_static
from mpsearch.export.tools.onnxruntime_static import read_onnxruntime_static as _read_onnxruntime_static
from mpsearch.export.tools.pt2e import pt2e as pt2e
from mpsearch.export.tools.pt2e import read_pt2e as _read_pt2e
from mpsearch.export.tools.quanto import quanto as quanto
from mpsearch.export.tools.quanto import read_quanto as _read_quanto
from mpsearch.export.tools.torchao import read_torchao as _read_torchao
from mpsearch.export.tools.torchao import torchao as torchao
from mpsearch.export.verification import Reader as _Reader
from mpsearch.export.verification import Verification as Verification
from mpsearch.export.verification import verified as _verified
from mpsearch.models.unwrapping import unwrapped as _unwrapped
from mpsearch.quantizers.min_max import MinMax as MinMax
from mpsearch.quantizers.packing import is_symmetric as _is_symmetric
from mpsearch.targets.rules import TARGETS as TARGETS

#: Target -> `export(plan, model=None, *, snap=False, path=None, **options)`.
EXPORTERS: dict[str, Callable[..., Any]] = {
    "torchao": torchao,
    "compressed-tensors": compressed_tensors,
    "onnxruntime": onnxruntime,
    "onnxruntime-static": onnxruntime_static,
    "gguf": gguf,
    "llama-quantize": llama_quantize,
    "hqq": hqq,
    "mlx": mlx,
    "pt2e": pt2e,
    "executorch": executorch,
    "brevitas": brevitas,
    "gptqmodel": gptqmodel,
    "auto-round": auto_round,
    "exllamav3": exllamav3,
    "llm-compressor": llm_compressor,
    "aimet": aimet,
    "mct": mct,
    "modelopt": modelopt,
    "nncf": nncf,
    "quanto": quanto,
    "bitsandbytes": bitsandbytes,
    "neutral": neutral,
}
#: Target -> its package, and what carries a plan out with it and reads it back.
READERS: dict[str, tuple[str, _Reader]] = {
    "torchao": ("torchao", _read_torchao),
    "compressed-tensors": ("compressed-tensors", _read_compressed_tensors),
    "onnxruntime": ("onnxruntime", _read_onnxruntime),
    "onnxruntime-static": ("onnxruntime", _read_onnxruntime_static),
    "gguf": ("gguf", _read_gguf),
    "hqq": ("hqq", _read_hqq),
    "mlx": ("mlx", _read_mlx),
    "pt2e": ("torchao", _read_pt2e),
    "executorch": ("executorch", _read_executorch),
    "brevitas": ("brevitas", _read_brevitas),
    "aimet": ("aimet-torch", _read_aimet),
    "llm-compressor": ("llmcompressor", _read_llm_compressor),
    "gptqmodel": ("gptqmodel", _read_gptqmodel),
    "modelopt": ("nvidia-modelopt", _read_modelopt),
    "nncf": ("nncf", _read_nncf),
    "quanto": ("optimum-quanto", _read_quanto),
    "bitsandbytes": ("bitsandbytes", _read_bitsandbytes),
    "auto-round": ("auto-round", _read_auto_round),
}


def verify(plan: Plan, model: nn.Module, target: str, **options: Any) -> Verification:
    """Carry a plan out with the real tool on a copy of the model, read the result back, and compare layer by layer.

    Args:
        plan: as it goes to the exporter (snap it before).
        model: left as it is.
        target: a name in `READERS`.
        options: of the exporter.

    Returns:
        What was found of each layer; all of it agrees with the plan.

    Raises:
        ExportError: for what the target cannot express.
        VerificationError: where anything differs: coverage, precision, code range, bytes, values.
        MissingPackage: without the tool.
    """
    if target not in READERS:
        raise ExportError(f"{target!r} cannot be verified here{nearest(target, READERS)}")
    model = _unwrapped(model)
    distribution, read = READERS[target]
    symmetric = _is_symmetric(options.get("quantizer"))
    fitting = _fitted(replace(plan, usage={}), model, target, vllm=False, symmetric=symmetric)
    told = replace(fitting, usage=plan.usage)
    return _verified(TARGETS[target], _version(distribution), read, told, model, **options)
