"""`kart info`: what a configuration costs, before it is trained."""

import argparse
import json

from kart import kernels, models, train
from kart.commands.command import Command, integer
from kart.commands.config import OPERATORS_HELP, add_config_flags, config_of


def _flags(parser: argparse.ArgumentParser) -> None:
    count = integer(1, most=10**6)
    parser.add_argument("--operator", default="softmax", metavar="SPEC", help="see below")
    parser.add_argument("--num-classes", type=count, default=10, metavar="INT", help="(default 10)")
    parser.add_argument("--in-channels", type=count, default=3, metavar="INT", help="(default 3)")
    parser.add_argument(
        "--paper", action="store_true", help="the paper's nine models beside kart's"
    )
    parser.add_argument(
        "--roofline",
        nargs="?",
        const="h100",
        choices=["h100", "cpu"],
        help="least time of the paper's models on an H100, at --batch-size images and up to 16,384 "
        "tokens; cpu: the same counts beside this machine's clock",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_config_flags(parser, ("model", "optimisation", "execution"))
    parser.set_defaults(image_size=224, model="vit_tiny")


def _run(args: argparse.Namespace) -> int:
    from kart.analysis import cost

    if args.paper:
        print(cost.paper_table())
        return 0
    config = config_of(args, operator=args.operator)
    if args.roofline:
        from kart.analysis import roofline

        print(roofline.measured() if args.roofline == "cpu" else roofline.paper(config.batch_size))
        return 0
    given = {name: getattr(config, name) for name in train.MODEL_FIELDS}
    given = {name: value for name, value in given.items() if value is not None}
    given.setdefault("patch_size", train.default_patch_size(args.image_size))
    model = models.create(
        config.model,
        operator=args.operator,
        image_size=args.image_size,
        in_channels=args.in_channels,
        num_classes=args.num_classes,
        **given,
    )
    counted, operations = cost.parameters(model), cost.flops(model)
    batch = config.batch_size
    width = 2 if config.precision == "bfloat16" else 4
    kept = cost.activation_memory(model, batch, bytes_each=width)
    naive = cost.activation_memory(model, batch, "naive", bytes_each=width)
    found = {
        "model": config.model,
        "operator": model.config.operator,
        "sharing": model.config.sharing,
        "tokens": model.config.tokens,
        "parameters": counted.total,
        "operator_parameters": counted.operator,
        "gflops": operations.total / 1e9,
        "activation_gflops": operations.activation / 1e9,
        "batch": batch,
        "kept_for_backward_mib": kept / 2**20,
        "kept_by_the_naive_form_mib": naive / 2**20,
        # float32 weights, gradients and two moments, and what the backward needs
        "training_memory_mib": (16 * counted.total + kept) / 2**20,
        "engines": kernels.engines(),
    }
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    rows = [
        ("model", f"{config.model}, {args.operator}, {model.config.sharing}"),
        ("tokens", f"{model.config.tokens}"),
        ("parameters", f"{counted.total:,}, {counted.operator:,} of them in the operators"),
        ("GFLOPs an image", f"{found['gflops']:.3f}, {found['activation_gflops']:.3f} of them in "
         "the activation (the paper's count: multiply-accumulates)"),
        (f"kept for backward, batch {batch}", f"{kept / 2**20:.0f} MiB "
         f"(materialised as in the paper: {naive / 2**20:.0f} MiB)"),
        ("training memory, AdamW", f"{found['training_memory_mib']:.0f} MiB"),
        *((f"engine {name}", state) for name, state in found["engines"].items()),
    ]  # fmt: skip
    print("\n".join(f"{name:32} {value}" for name, value in rows))
    return 0


COMMAND = Command(
    "info",
    "parameters, FLOPs and memory of a configuration, before training it",
    _flags,
    _run,
    epilog=OPERATORS_HELP,
)
