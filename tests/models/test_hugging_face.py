"""`hf:DIR` and `text:FILE`, from a folder made here: the model, its windows of text, and the commands on them."""

import json

import pytest
import torch

import mpsearch as mps
from mpsearch.cli import main
from mpsearch.models.hugging_face import model_of, text_batches
from mpsearch.models.loading import UsageError

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

LETTERS = "abcdefghijklmnopqrstuvwxyz ."
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30}


@pytest.fixture
def folder(tmp_path):
    """A decoder that takes 8 tokens, a letter each."""
    words = tokenizers.Tokenizer(
        tokenizers.models.BPE({"?": 0} | {x: i for i, x in enumerate(LETTERS, 1)}, [], unk_token="?")
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        max_position_embeddings=8, bos_token_id=1, eos_token_id=2, initializer_range=0.3, **SIZES
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 3)
    return tmp_path


def test_the_model_as_it_was_saved(folder):
    model = model_of(str(folder / "model"))
    assert type(model) is transformers.LlamaForCausalLM
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_windows_spread_over_the_text(folder):
    model, text = model_of(str(folder / "model")), (folder / "text.txt").read_text()
    batches = text_batches(str(folder / "text.txt"), model)
    rows = torch.cat([batch["input_ids"] for batch in batches]).tolist()
    found = ["".join(LETTERS[token - 1] for token in row) for row in rows]
    assert len(found) == len(text) // 8
    assert all(len(window) == 8 and window in text for window in found)
    assert (found[0], found[-1]) == (text[:8], text[-8:])
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 4, 4]
    assert all(torch.equal(batch["labels"], batch["input_ids"]) for batch in batches)


def test_an_encoder_is_given_no_labels(folder):
    config = transformers.BertConfig(max_position_embeddings=8, **SIZES)
    transformers.BertForSequenceClassification(config).save_pretrained(folder / "model")
    batches = text_batches(str(folder / "text.txt"), model_of(str(folder / "model")))
    assert set(batches[0]) == {"input_ids"}


def test_the_commands_take_them(folder, capsys):
    model, data = f"hf:{folder / 'model'}", f"text:{folder / 'text.txt'}"
    table, plan = str(folder / "table.csv"), str(folder / "plan.json")
    resources = ["--resources", "memory_bytes,kv_cache_bytes"]
    profile = [
        "profile",
        model,
        "--data",
        data,
        "--estimator",
        "fisher",
        "--precisions",
        "w4 w8",
        "--kv-cache",
        *resources,
    ]
    assert main([*profile, "-o", table]) == 0
    assert main(["solve", table, "--budget", "memory_bytes=60%", "--budget", "kv_cache_bytes=45%", "-o", plan]) == 0
    assert main(["evaluate", model, "--data", data, "--plan", plan]) == 0
    capsys.readouterr()
    assert main(["show", model, "--data", data, "--kv-cache", "--json", *resources]) == 0
    shown = capsys.readouterr()
    assert [x["name"] for x in json.loads(shown.out)["layers"] if x["kind"] == "kv_cache"] == [
        f"model.layers.0.self_attn.{x}_cache" for x in "kv"
    ]
    assert "Loading" not in shown.err
    assert "model.layers.0.self_attn.k_cache" in mps.Plan.load(plan)


def test_refusals_in_one_line(folder):
    model = model_of(str(folder / "model"))
    with pytest.raises(
        UsageError, match=r"model hf:nowhere: no nowhere/config.json; expected a folder of save_pretrained"
    ):
        model_of("nowhere")
    with pytest.raises(UsageError, match="data text:nothing: FileNotFoundError"):
        text_batches("nothing", model)
    (folder / "short.txt").write_text("abc")
    with pytest.raises(UsageError, match="3 tokens, expected at least one window of 8"):
        text_batches(str(folder / "short.txt"), model)
    with pytest.raises(UsageError, match="needs a model hf:DIR, whose tokenizer reads it; got a Linear"):
        text_batches(str(folder / "text.txt"), torch.nn.Linear(1, 1))
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    with pytest.raises(UsageError, match="has no NoSuchModel"):
        model_of(str(folder / "model"))


def test_doors_take_names(folder):
    names = f"hf:{folder / 'model'}", f"text:{folder / 'text.txt'}"
    model = model_of(str(folder / "model"))
    batches = text_batches(str(folder / "text.txt"), model)
    estimator, options = mps.sensitivity.KLDivergence(), mps.precisions("w2 w4")
    table = mps.profile(*names, estimator, options, progress=False)
    expected = mps.profile(model, batches, estimator, options, progress=False)
    assert (table.sensitivity == expected.sensitivity).all()
    plan = mps.solve(table, mps.Budget(average_bits=3)).plan
    assert mps.evaluate(*names, plan, progress=False).kl == mps.evaluate(model, batches, plan, progress=False).kl
    with pytest.raises(mps.EstimatorError, match="or a name such as"):
        mps.profile(3, batches, estimator, options)
