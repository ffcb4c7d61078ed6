"""`kart export`: the model of a run as one file."""

import argparse

from kart import export, operators, runs
from kart.commands.command import Command, file, integer
from kart.commands.config import check_code


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="directory of one run, as `kart train` wrote it")
    parser.add_argument("--out", type=file, required=True, metavar="FILE", help="the file to write")
    parser.add_argument(
        "--format",
        default="safetensors",
        choices=["safetensors", "timm", "torch", "onnx"],
        help="safetensors (default): for kart.checkpoint.load; timm: its names of the weights, "
        "with a ViT's operators where kart.bridges.timm has them; "
        "torch: a graph of torch.export, which runs without kart; onnx",
    )
    parser.add_argument("--checkpoint", default="last", choices=["last", "best"])
    parser.add_argument(
        "--seed", type=integer(0), metavar="INT", help="the member, where a run has several"
    )


def _run(args: argparse.Namespace) -> int:
    check_code(args.code, args.run)
    one = runs.only(args.run, args.checkpoint, args.seed)
    about = {
        "run": one.identity.id,
        "operator": operators.shown(one.config.operator),
        "seed": one.config.seed,
        "checkpoint": args.checkpoint,
        "classes": one.identity.data["classes"],
        "image": one.identity.data["image"],
        "image_size": one.model.config.image_size,
        "eval_crop": one.config.eval_crop,
        "precision": one.config.precision,
        "mean": one.identity.data["mean"],
        "std": one.identity.data["std"],
    }
    export.write(args.out, one.model, one.params, about, args.format)
    print(f"{operators.shown(one.config.operator)} seed {one.config.seed} written to {args.out}")
    return 0


COMMAND = Command(
    "export",
    "write the model of a run to one file, for kart, timm, torch.export or ONNX",
    _flags,
    _run,
    reads=True,
    description="Writes the weights of one finished run. The file maps standardised images to "
    "logits. The JSON file beside it has the classes, mean and deviation, and how images come to "
    "the model's size: cut to `image` (channels, height, width), scaled to `image_size` over "
    "`eval_crop`, of which the centre is left. Weights are "
    "float32, those of bfloat16 runs too; so are the logits of a file for torch or onnx.",
)
