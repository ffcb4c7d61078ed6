"""`kart info`: what a configuration costs, before it is trained."""

import argparse
from collections.abc import Iterator
from typing import Any

from kart import kernels, models, operators, schema, train
from kart.analysis import cost, roofline
from kart.commands.command import Command, integer
from kart.commands.config import OPERATORS_HELP, add_config_flags, check_effects, config_of, flag
from kart.train import Config

# fields of Config that what is printed depends on
FIELDS = ("model", "image_size", *train.MODEL_FIELDS, "batch_size", "precision")
# all that describes the configuration, and what it is where it is not given
DEFAULTS = {"operator": "softmax", "num_classes": 10, "in_channels": 3} | {
    "model": "vit_tiny",
    "image_size": 224,
}


def _flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    count = integer(1, most=10**6)
    absent = argparse.SUPPRESS
    add("--operator", default=absent, metavar="SPEC", help="see below (default softmax)")
    for name in ("num_classes", "in_channels"):
        told = f"(default {DEFAULTS[name]})"
        add(flag(name), type=count, default=absent, metavar="INT", help=told)
    add("--paper", action="store_true", help="the paper's nine models beside kart's, alone")
    add(
        "--roofline",
        nargs="?",
        const="h100",
        choices=["h100", "cpu"],
        help="least time of the paper's models on an H100, at --batch-size images and up to 16,384 "
        "tokens; cpu: the same counts beside this machine's clock",
    )
    add("--json", action="store_true", help="print JSON")
    add_config_flags(parser, ("model", "optimisation", "execution"), FIELDS, DEFAULTS)


def _check_used(args: argparse.Namespace) -> None:
    """Raises ValueError where a table of fixed models is asked for with what it ignores."""
    given = [name for name in (*DEFAULTS, *FIELDS) if name in vars(args)]
    given += [name for name in ("paper", "roofline", "json") if getattr(args, name)]
    for table, used in (("paper", ()), ("roofline", ("batch_size",))):
        if not getattr(args, table):
            continue
        if args.roofline == "cpu":
            used = ()
        rest = [name for name in dict.fromkeys(given) if name not in (table, *used)]
        if rest:
            flags = ", ".join(map(flag, rest))
            raise ValueError(
                f"`--{table}` needs to stand without {flags}, got both: its models are the "
                "paper's. Leave one of them out."
            )


def _tokens(site: models.Site) -> str:
    """Over how many keys the rows of a block go, and in how many windows."""
    return f"{site.tokens}" + (f" in {site.windows} windows" if site.windows > 1 else "")


def _costs(config: Config, model: models.Model) -> dict[str, Any]:
    """What a model costs, in the order and by the names of `--json`."""
    counted, batch = cost.parameters(model), config.batch_size
    found: dict[str, Any] = {
        "model": config.model,
        "operator": model.config.operator,
        "sharing": model.config.sharing,
        "tokens": model.sites[0].tokens,
        "parameters": counted.total,
        "operator_parameters": counted.operator,
        "unused_parameters": cost.unused(model),
        "batch": batch,
    }
    if not cost.uncounted(model):
        operations = cost.flops(model)
        found["gflops"] = operations.total / 1e9
        found["activation_gflops"] = operations.activation / 1e9
    width = 2 if config.precision == "bfloat16" else 4
    kept = cost.activation_memory(model, batch, bytes_each=width)
    found["kept_for_backward_mib"] = kept / 2**20
    if cost.materialises(model):
        naive = cost.activation_memory(model, batch, "naive", bytes_each=width)
        found["kept_by_the_naive_form_mib"] = naive / 2**20
    # float32 weights, gradients and two moments, and what the backward needs
    found["training_memory_mib"] = (16 * counted.total + kept) / 2**20
    return {**found, "engines": kernels.engines()}


def _rows(found: dict[str, Any], model: models.Model) -> Iterator[tuple[str, str]]:
    """What `_costs` found, in words."""
    operator = operators.shown(model.config.operator)
    yield "model", f"{found['model']}, {operator}, {found['sharing']}"
    yield "tokens", ", ".join(dict.fromkeys(map(_tokens, model.sites)))
    learned = f"{found['operator_parameters']:,} of them in the operators"
    yield "parameters", f"{found['parameters']:,}, {learned}"
    if found["unused_parameters"]:
        yield "without effect", cost.told(found["unused_parameters"])
    operations = f"not counted: {cost.uncounted(model)}"
    if "gflops" in found:
        operations = (
            f"{found['gflops']:.3f}, {found['activation_gflops']:.3f} of them in the activation "
            "(the paper's count: multiply-accumulates)"
        )
    yield "GFLOPs an image", operations
    held = f"{found['kept_for_backward_mib']:.0f} MiB"
    if "kept_by_the_naive_form_mib" in found:
        naive = found["kept_by_the_naive_form_mib"]
        held += f" (materialised as in the paper: {naive:.0f} MiB)"
    yield f"kept for backward, batch {found['batch']}", held
    yield "training memory, AdamW", f"{found['training_memory_mib']:.0f} MiB"
    for name, state in found["engines"].items():
        yield f"engine {name}", state


def _run(args: argparse.Namespace) -> int:
    _check_used(args)
    given = set(vars(args))
    if args.paper:
        print(cost.paper_table())
        return 0
    args = argparse.Namespace(**{**DEFAULTS, **vars(args)})
    config = config_of(args)
    check_effects(given, [config])
    if args.roofline:
        print(roofline.measured() if args.roofline == "cpu" else roofline.paper(config.batch_size))
        return 0
    fields = {name: getattr(config, name) for name in train.MODEL_FIELDS}
    sizes = {name: value for name, value in fields.items() if value is not None}
    train.check_sizes(config.model, sizes)
    sizes.setdefault("patch_size", train.default_patch_size(args.image_size, config.model))
    # a backbone of detectors has no classes, and refuses those that it is given
    if "num_classes" in given or models.classifies(config.model):
        sizes["num_classes"] = args.num_classes
    model = models.create(
        config.model,
        operator=args.operator,
        image_size=args.image_size,
        in_channels=args.in_channels,
        **sizes,
    )
    found = _costs(config, model)
    if args.json:
        print(schema.dumps(found, indent=1))
    else:
        print("\n".join(f"{name:32} {value}" for name, value in _rows(found, model)))
    return 0


COMMAND = Command(
    "info",
    "parameters, FLOPs and memory of a configuration, before training it",
    _flags,
    _run,
    epilog=OPERATORS_HELP,
)
