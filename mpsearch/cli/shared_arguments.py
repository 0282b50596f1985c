"""Arguments that several commands take, and what they name."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mpsearch as mps
from mpsearch.core import amounts
from mpsearch.files.writing import check_folder, check_writable
from mpsearch.models.loading import UsageError, load, part

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from mpsearch.cli.command import Answer
    from mpsearch.quantizers.quantizer import Quantizer


def add_model_and_data(parser: argparse.ArgumentParser) -> None:
    """MODEL and --data, both needed."""
    parser.add_argument("model", help="file.py:function or package.module:function returning a module, or hf:DIR")
    parser.add_argument(
        "--data",
        required=True,
        help="file.py:function or package.module:function returning batches, or text:FILE for hf:DIR",
    )


def add_budget(parser: argparse.ArgumentParser, *, required: bool, about: str) -> None:
    """--budget, any number of times."""
    parser.add_argument(
        "--budget", action="append", required=required, default=[], metavar="RESOURCE=VALUE", help=about
    )


def add_solver(parser: argparse.ArgumentParser, about: str) -> None:
    """--solver and its settings."""
    parser.add_argument("--solver", help=about)
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="setting of --solver; may be repeated"
    )


def add_quantizer(parser: argparse.ArgumentParser) -> None:
    """--quantizer and its settings."""
    parser.add_argument(
        "--quantizer",
        default="rtn",
        metavar="NAME",
        help="what rounds weights and inputs, such as gptq (docs/names.md), or module:Class (default: %(default)s)",
    )
    parser.add_argument(
        "--quantizer-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="setting of --quantizer, such as symmetric=false; may be repeated",
    )


def add_layers(parser: argparse.ArgumentParser) -> None:
    """Which layers are decided on, and how they are grouped."""
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="layers to leave alone, by name or 'encoder.*'; may be repeated",
    )
    parser.add_argument(
        "--cut",
        action="append",
        default=[],
        metavar="PATTERN",
        help="layers to take out of their groups; may be repeated",
    )
    parser.add_argument(
        "--groups",
        default="auto",
        choices=["auto", "fused"],
        help="what shares a precision: shared weights and what --target needs (default), or what many engines compute as one matrix too",
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="PATTERN=PRECISIONS",
        help="options of single layers, such as 'lm_head=w8' or '*.mlp.*=w2 w3'; may be repeated, the last one that matches counts",
    )
    parser.add_argument("--fixed", metavar="FILE", help="plan of layers that are decided already")
    parser.add_argument("--target", help="tool that will carry the plan out: groups and options that it has")
    parser.add_argument(
        "--experts",
        default="each",
        choices=["each", "block"],
        help="decide on each expert (default), or on a block of them at once",
    )
    parser.add_argument("--kv-cache", action="store_true", help="decide on keys and values of attention too")


def add_resources(parser: argparse.ArgumentParser, about: str) -> None:
    """--resources, by name, each with its settings."""
    parser.add_argument(
        "--resources",
        default="memory_bytes,bitops",
        metavar="LIST",
        help=f"{about}, such as kv_cache_bytes:context=8192, latency_s=roofline:device=t4, latency_s=latency-table:path=t4.csv, "
        "coins=costs.py:coins (default: %(default)s)",
    )


def add_memory(parser: argparse.ArgumentParser) -> None:
    """--memory, read as a budget is."""
    parser.add_argument(
        "--memory",
        type=_memory,
        metavar="AMOUNT",
        help="most that may be held, weights included, such as 8GB or 50%% (default: all that is free); what needs more is read block by "
        "block from hf:DIR, else refused",
    )


def _memory(text: str) -> str:
    try:
        amounts.parse("memory_bytes", text, 1.0)
    except mps.BudgetError:
        raise argparse.ArgumentTypeError(
            f"{text!r}, expected an amount such as 8GB or 512MiB, or a percentage"
        ) from None
    return text


def add_plot(parser: argparse.ArgumentParser, about: str) -> None:
    """--plot, whose ending is checked before any work."""
    parser.add_argument("--plot", metavar="FILE", type=_picture, help=f"picture of {about}, .png, .svg or .pdf")


def _picture(path: str) -> str:
    from mpsearch.display.figures import check_ending

    check_ending(path)
    return file(path)


def add_metric(parser: argparse.ArgumentParser, further: str = ", loss, accuracy, or file.py:function") -> None:
    """What is measured."""
    parser.add_argument(
        "--metric",
        help=f"kl, bernoulli-kl, mse, relative-error, psnr, cosine{further} (default: what fits the outputs and targets)",
    )


def metric(text: str | None) -> Any:
    """A name, or the function that it names."""
    return load(text, "metric") if text is not None and ":" in text else text


def seed(text: str) -> int:
    """A seed, from 0 to 2^63.

    Raises:
        ArgumentTypeError: for anything else.
    """
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of 0 or more")
    return int(text)


def file(path: str) -> str:
    """A file to write, which can be written before any work.

    Raises:
        OSError: with what is in its way.
    """
    check_writable(path)
    return path


def folder(path: str) -> str:
    """A folder to write to, which is there before any work, or can be made.

    Raises:
        OSError: with what is in its way.
    """
    check_folder(path)
    return path


def file_or_folder(path: str) -> str:
    """What an exporter writes: by its ending a file, or a folder, as the target has it.

    Raises:
        OSError: with what is in its way.
    """
    is_folder = os.path.isdir(path) or not (Path(path).suffix or os.path.exists(path))
    return folder(path) if is_folder else file(path)


def model(spec: str, *, memory_bytes: int | None = None) -> "nn.Module":
    """The module that a MODEL names.

    Args:
        spec: the MODEL.
        memory_bytes: weights of hf:DIR that do not fit stay in their files, and are read where they are used.

    Raises:
        UsageError: where there is no such function, it fails, or it returns something else.
    """
    from mpsearch.models.named import model_named

    return model_named(spec, memory_bytes=memory_bytes)


def on_model(spec: str, memory: str | None, work: "Callable[[nn.Module], Answer]") -> "Answer":
    """Open a MODEL and work on it; weights of hf:DIR are loaded where they and the work fit in memory, else read block by block.

    Args:
        spec: the MODEL.
        memory: of `--memory`.
        work: what to do with it.

    Raises:
        MemoryShortage: where the work does not fit.
        UsageError: as `model`.
    """
    if not spec.startswith("hf:"):
        return work(model(spec))
    from mpsearch.models.free_memory import room
    from mpsearch.models.named import is_too_large
    from mpsearch.models.streaming.opening import shard_bytes

    folder, there = spec.removeprefix("hf:"), room(memory)
    weights_bytes = shard_bytes(folder)
    if not weights_bytes or there is None:
        return work(model(spec))
    weights = f"mpsearch: {spec}: weights of {amounts.text('memory_bytes', weights_bytes)}"
    limit = f"{amounts.text('memory_bytes', there.bytes)} may be held ({there.by})"
    if is_too_large(folder, there.bytes):
        print(f"{weights} are read block by block: {limit}", file=sys.stderr)
    else:
        print(f"{weights} are loaded: {limit}", file=sys.stderr)
        try:
            return work(model(spec))
        except mps.errors.MemoryShortage as error:
            needed, _, _ = str(error).partition(": take")
            print(f"{weights} are read block by block: loaded, {needed}", file=sys.stderr)
    return work(model(spec, memory_bytes=0))


def model_and_example(spec: str, data_spec: str | None) -> "tuple[nn.Module, list[Any]]":
    """A model whose shapes suffice, and batches; of `hf:DIR` alone one window that its config tells, and no weight is read.

    Raises:
        UsageError: as `model` and `data`, or for another model without data.
    """
    from mpsearch.models.hugging_face import example_of
    from mpsearch.models.named import model_named

    if data_spec is not None:
        module = model(spec)
        return module, data(data_spec, module)
    if not spec.startswith("hf:"):
        raise UsageError("a model is shown by running it: give --data")
    module = model_named(spec, shapes_suffice=True)
    return module, [example_of(module)]


def data(spec: str, model: "nn.Module") -> list[Any]:
    """The batches that a DATA names; a text is read with the tokenizer of the model.

    Raises:
        UsageError: where there is no such function, or it fails.
    """
    from mpsearch.models.named import batches_named

    return batches_named(spec, model)


def layers(model: "nn.Module", batches: list[Any], arguments: argparse.Namespace) -> list[mps.Layer]:
    """The decisions that the arguments ask for."""
    from mpsearch.models.running import collect

    return mps.layers(
        model,
        collect(batches, model)[0],
        exclude=arguments.exclude,
        groups=arguments.groups,
        cut=arguments.cut,
        target=arguments.target,
        experts=arguments.experts,
        kv_cache=arguments.kv_cache,
        allow=_allowed(arguments.allow),
        fixed=arguments.fixed,
    )


def _allowed(texts: list[str]) -> dict[str, str]:
    allowed: dict[str, str] = {}
    for text in texts:
        pattern, equals, precisions = text.rpartition("=")
        if not equals or not pattern.strip() or not precisions.strip():
            raise UsageError(f"--allow {text!r}: expected PATTERN=PRECISIONS, such as 'lm_head=w8'")
        allowed.pop(pattern.strip(), None)  # the last one counts
        allowed[pattern.strip()] = precisions
    return allowed


def resources(
    arguments: argparse.Namespace, quantizer: "Quantizer | None" = None
) -> "Mapping[str, Callable[..., Any]]":
    """The functions that `--resources` names, which count with the quantizer of the run."""
    from mpsearch.cli.resource_text import resource_functions

    return resource_functions(arguments.resources, quantizer)


def quantizer(arguments: argparse.Namespace) -> "Quantizer":
    """The quantizer that is named, with its settings.

    Raises:
        UsageError: for an unknown quantizer or setting.
    """
    from mpsearch.quantizers.quantizer import checked_quantizer
    from mpsearch.quantizers.registry import QUANTIZERS

    return checked_quantizer(part(arguments.quantizer, QUANTIZERS, "quantizer", arguments.quantizer_option))


def solver(arguments: argparse.Namespace) -> mps.Solver | None:
    """The solver that is named, or None.

    Raises:
        UsageError: for an unknown solver or setting.
    """
    if arguments.solver is None:
        if arguments.option:
            raise UsageError("--option needs --solver")
        return None
    from mpsearch.solvers import SOLVERS

    return cast(mps.Solver, part(arguments.solver, SOLVERS, "solver", arguments.option))
