"""A small language model, trained, searched, carried out by four quantizers: each one's held-out loss is what `evaluate` said."""

import copy
import inspect

import pytest
import torch
from torch.nn import functional

import mpsearch as mps
from mpsearch import export
from mpsearch.quantizers.rounding import RoundToNearest

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


def loss(model, tokens):
    logits = model(tokens)
    logits = getattr(logits, "logits", logits)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@pytest.fixture(scope="module")
def trained():
    """Llama with 2 blocks on the text of a module of the standard library, by characters, and two held-out batches."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = torch.tensor(list(inspect.getsource(inspect).encode("ascii", "replace")))
        data = text[: len(text) // 65 * 65].reshape(-1, 65)[torch.randperm(len(text) // 65)]
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=128, **sizes))
        optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
        for _ in range(100):
            batch = data[64:][torch.randint(len(data) - 64, (16,))]
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
    return model.eval(), [data[:32], data[32:64]], data[64:96]


def searched(trained, target, precisions, quantizer, average_bits=3):
    """What `mpsearch search --target` finds, as its file keeps it."""
    model, _, calibration = trained
    layers = mps.layers(model, calibration[:2], exclude=["lm_head", "model.embed_tokens"], target=target)
    result = mps.search(
        model,
        [calibration],
        mps.Budget(average_bits=average_bits),
        mps.precisions(precisions),
        effort="fast",
        layers=layers,
        quantizer=quantizer,
        progress=False,
    )
    assert len({str(precision) for precision in result.plan.values()}) > 1
    assert all(export.TARGETS[target].refusal(layer, result.plan[layer.name]) is None for layer in layers)
    return result.plan


def carried_out(measure, trained, plan, quantizer):
    """Held-out loss under the real quantizer, against the prediction: equal to 2 % of what quantization costs."""
    model, held_out, _ = trained
    predicted = mps.evaluate(model, held_out, plan, loss=loss, quantizer=quantizer, progress=False)
    with torch.no_grad():
        real = sum(float(measure(batch)) for batch in held_out) / len(held_out)
    assert predicted.kl > 1e-5
    assert abs(real - predicted.loss) < 0.02 * abs(predicted.loss - predicted.reference.loss) + 1e-5
    assert predicted.reference.loss < 3.0  # it has learned something: a uniform guess is 4.9


def test_torchao(trained):
    pytest.importorskip("torchao")
    from torchao.quantization import quantize_

    plan = searched(trained, "torchao", "w2g32 w4g32 w8", export.MinMax())
    real = copy.deepcopy(trained[0])
    quantize_(real, export.torchao(plan, real), filter_fn=None)
    carried_out(lambda batch: loss(real, batch), trained, plan, export.MinMax())


def test_compressed_tensors(trained, tmp_path):
    pytest.importorskip("compressed_tensors")
    plan = searched(trained, "compressed-tensors", "w2g32 w4g32 w8", RoundToNearest())
    export.compressed_tensors(plan, trained[0], path=tmp_path)
    real = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    carried_out(lambda batch: loss(real, batch), trained, plan, RoundToNearest())


def test_onnxruntime(trained, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.lm_head = model.model, model.lm_head

        def forward(self, tokens):
            return self.lm_head(self.model(tokens, use_cache=False).last_hidden_state)

    plan = searched(trained, "onnxruntime", "w2g32 w3g32 w4g32 w8g64", RoundToNearest())
    assert "w3g32" not in {str(precision) for precision in plan.values()}
    export.onnxruntime(plan, Logits(trained[0]), example=trained[1][0], path=tmp_path / "m.onnx")
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    carried_out(
        lambda batch: loss(lambda tokens: torch.from_numpy(session.run(None, {name: tokens.numpy()})[0]), batch),
        trained,
        plan,
        RoundToNearest(),
    )


def test_gguf(trained, tmp_path, llama_cpp):
    pytest.importorskip("gguf")
    plan = searched(trained, "gguf", "wq4_0 wq5_0 wq8_0 wq4_k", RoundToNearest(), average_bits=5.5)
    assert "wq4_k" not in {str(precision) for precision in plan.values()}  # no width here is a multiple of 256
    model, held_out, _ = trained
    export.gguf(plan, model, path=tmp_path / "m.gguf")
    real = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    carried_out(lambda batch: loss(real, batch), trained, plan, RoundToNearest())
    kernels = llama_cpp.LlamaCpp(tmp_path / "m.gguf", model.config.vocab_size)  # which round inputs to 8 bits
    with torch.no_grad():
        assert loss(kernels, held_out[0]) == pytest.approx(float(loss(real, held_out[0])), abs=2e-3)
        assert abs(loss(kernels, held_out[0]) - loss(real, held_out[0])) < abs(
            loss(kernels, held_out[0]) - loss(model, held_out[0])
        )
    kernels.close()
