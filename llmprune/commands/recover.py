"""``llmprune recover``: train a pruned model folder a little."""

from __future__ import annotations

import argparse
from typing import Any

from llmprune.commands.common import (
    check_run,
    command,
    load,
    names_argument,
    note_run,
    path_argument,
    print_json,
    run_argument,
)


def register(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    parser = command(
        commands, "recover", _run, "bring back quality by LoRA or other training, and save the result"
    )
    parser.add_argument(
        "--data",
        required=True,
        type=path_argument,
        metavar="FILE",
        help="Alpaca's .json (instruction, input, output), .jsonl, .txt, or a saved dataset's folder",
    )
    parser.add_argument(
        "--output", required=True, type=path_argument, metavar="DIR", help="folder for the recovered model"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it exists")
    parser.add_argument(
        "--form", default="auto", help="of the checkpoint: auto, stock or universal (%(default)s)"
    )
    parser.add_argument(
        "--keep-adapter", action="store_true", help="write the adapter alone, do not merge it"
    )
    parser.add_argument("--method", default="lora", help="lora, dora or full (%(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (%(default)s)")
    parser.add_argument("--alpha", type=int, default=16, help="their scale is alpha / rank (%(default)s)")
    parser.add_argument("--dropout", type=float, default=0.05, help="on their input (%(default)s)")
    parser.add_argument(
        "--targets",
        type=names_argument,
        metavar="A,B",
        help="paths of modules to adapt (every linear map of attention and feed-forwards, found on the graph)",
    )
    parser.add_argument("--learning-rate", type=float, help="its peak (1e-4; 2e-5 for full)")
    parser.add_argument("--epochs", type=float, default=2.0, help="passes over the data (%(default)s)")
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of epochs")
    parser.add_argument("--batch-size", type=int, default=64, help="examples per step (%(default)s)")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="examples at once (%(default)s)")
    parser.add_argument(
        "--warmup", type=int, metavar="STEPS", help="steps to the peak (100, a tenth at most)"
    )
    parser.add_argument(
        "--scheduler",
        default="cosine",
        help="cosine, linear, constant, constant_with_warmup (%(default)s)",
    )
    parser.add_argument(
        "--optimizer", default="adamw", help="adamw, or lamb of pytorch_optimizer (%(default)s)"
    )
    parser.add_argument("--weight-decay", type=float, default=0.0, help="of the optimizer (%(default)s)")
    parser.add_argument("--cutoff", type=int, help="tokens per example (256, or the model's positions)")
    parser.add_argument("--loss-on", default="answer", help="answer, or all for the prompt too (%(default)s)")
    parser.add_argument("--eos", action="store_true", help="end records with the end-of-sequence token")
    parser.add_argument("--rows", type=int, help="use only so many rows of the data, drawn by the seed")
    parser.add_argument(
        "--validation",
        type=_amount,
        metavar="N",
        help="examples to choose the best checkpoint by, a number or a share (2000, a tenth at most; 0: none)",
    )
    parser.add_argument(
        "--validate-every",
        type=int,
        metavar="STEPS",
        help="steps between validations (100, at least ten in all)",
    )
    parser.add_argument(
        "--patience", type=int, metavar="N", help="stop after N validations without improvement"
    )
    parser.add_argument(
        "--distill", action="store_true", help="learn from the unpruned model's predictions too"
    )
    parser.add_argument(
        "--teacher", type=path_argument, metavar="DIR", help="the unpruned model, for --distill"
    )
    parser.add_argument(
        "--distill-weight", type=float, default=0.5, help="share of the teacher in the loss (%(default)s)"
    )
    parser.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help="keep K of the teacher's logits a token on the disk, not the teacher",
    )
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations")
    parser.add_argument(
        "--fsdp",
        action="store_true",
        default=None,
        help="each process keeps a share of the frozen weights (or by accelerate's config)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of split, order, adapters, dropout (%(default)s)"
    )
    run_argument(parser)
    parser.add_argument("--work", type=path_argument, metavar="DIR", help="for checkpoints (OUTPUT.training)")
    parser.add_argument(
        "--restart", action="store_true", help="begin anew where the work folder holds another run"
    )


def _amount(text: str) -> int | float:
    try:
        return int(text) if text.lstrip("-").isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a share") from None


def _run(options: argparse.Namespace) -> None:
    from llmprune.pipeline.prune import announcer, check_options
    from llmprune.pipeline.stages import Stages
    from llmprune.recovery.recover import recover

    check_options(output=options.output, overwrite=options.overwrite, form=options.form)
    check_run(options)
    clock = Stages(announcer(bool(options.quiet)))
    model, tokenizer = load(options.model, clock, options.trust_remote_code)
    result = recover(
        model,
        tokenizer,
        options.data,
        output=options.output,
        overwrite=options.overwrite,
        merge=not options.keep_adapter,
        form=options.form,
        base=options.model,
        method=options.method,
        rank=options.rank,
        alpha=options.alpha,
        dropout=options.dropout,
        targets=options.targets,
        learning_rate=options.learning_rate,
        epochs=options.epochs,
        steps=options.steps,
        batch_size=options.batch_size,
        micro_batch_size=options.micro_batch_size,
        warmup=options.warmup,
        scheduler=options.scheduler,
        optimizer=options.optimizer,
        weight_decay=options.weight_decay,
        cutoff=options.cutoff,
        loss_on=options.loss_on,
        eos=options.eos,
        rows=options.rows,
        validation=options.validation,
        validate_every=options.validate_every,
        patience=options.patience,
        distill=options.distill,
        teacher=options.teacher,
        distill_weight=options.distill_weight,
        top_k=options.top_k,
        gradient_checkpointing=options.gradient_checkpointing,
        fsdp=options.fsdp,
        seed=options.seed,
        work=options.work,
        restart=options.restart,
        quiet=options.quiet or None,
        stages=clock,
    )
    if not result.main_process:
        return
    note_run(options, {"directory": str(options.output), **result.to_json()}, [options.data])
    if options.json:
        print_json(result.to_json())
    else:
        print(result)
