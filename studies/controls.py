"""What part of KArAt's gain is the learned function of the scores, and what part learned mixing?

    kart study run controls --data uoft-cs/cifar10 --out runs/controls
    python -m studies.controls --data uoft-cs/cifar10 --out runs/controls-all   # all settings

A unit of degree 0 is a constant: `polynomial-0` ignores the scores altogether, and every query gets
the same row of weights, learned for each position. Degree 1 is affine in the scores, G1 and G3 are
Fourier units. All have the same number of parameters (by their rank), and `softmax, wider MLP`
spends as many on its MLPs. Each also stands beside softmax, added to its rows. Every arm chooses
its learning rate out of three on one seed; the winners are trained again with five fresh seeds.

Expected in the setting of studies/README.md (n = 3, some forty minutes on one core): 0.83
[0.64, 1.01] of the gain of G3 over softmax is left when the scores are ignored.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from kart import cli, models, search, statistics
from kart.commands.command import choice, standalone
from kart.search import Confirmed
from kart.train import Config

# spec and rank; (K + 1) r is 84 for all, K parameters a unit and one of the mix
OPERATORS = {
    "polynomial-0": ("polynomial-0B", 42),
    "polynomial-1": ("polynomial-1B", 28),
    "G1": ("G1B", 28),
    "G3": ("G3B", 12),
}

# flags of `kart study run`, for `python -m studies.controls`
SETTINGS: dict[str, list[str]] = {
    "standard": [],
    "16 px": ["--set", "image_size=16"],
    "64 px": ["--set", "image_size=64"],
    "2000 images": ["--train-limit", "2000"],
    "32000 images": ["--train-limit", "32000"],
    "width 32": ["--set", "embed_dim=32"],
    "width 128": ["--set", "embed_dim=128"],
}


def wider_mlp(config: Config) -> float:
    """The MLP ratio that spends the parameters of the operators on the MLPs."""
    shape = models.MODELS[config.model]
    width = config.embed_dim or shape["embed_dim"]
    heads = config.num_heads or shape["num_heads"]
    assert config.image_size and config.patch_size  # given by CONFIG
    tokens = (config.image_size // config.patch_size) ** 2 + 1
    hidden = 4 * width + round(84 * tokens * heads / (2 * width + 1))
    return (hidden + 0.5) / width  # the model rounds down


def arm(
    operator: str, rank: int | None = None, base: str | None = None, wide: bool = False
) -> search.Arm:
    """The space of one operator."""
    given = {"operator": operator, "rank": rank, "base": base}
    return search.rate_only(
        lambda config: {**given, "mlp_ratio": wider_mlp(config) if wide else None}
    )


ARMS = {"softmax": arm("softmax"), "softmax, wider MLP": arm("softmax", wide=True)}
ARMS |= {name: arm(*given) for name, given in OPERATORS.items()}
ARMS |= {f"{name} + softmax": arm(*given, base="softmax") for name, given in OPERATORS.items()}


def answer(found: Mapping[str, Confirmed]) -> str:
    """Gains over softmax on the test split, and the share of G3's that is left without scores."""
    if "softmax" not in found:
        return "softmax has no result."
    lines = []
    base = found["softmax"].test
    for name, one in found.items():
        gain = statistics.pairs(one.test, base)
        if name != "softmax" and len(gain) > 1:
            shown = statistics.interval(gain, low=-1.0, high=1.0).text(sign="+")
            mean, _, bounds = shown.partition(" ")
            lines.append(f"{name}: {mean} points over softmax {bounds}, n = {len(gain)}")
    for beside in ("", " + softmax"):
        names = [f"{name}{beside}" for name in ("polynomial-0", "G3")]
        if all(name in found for name in names):
            tests = [found[name].test for name in names]
            seeds = sorted(set(base).intersection(*tests))
            part, whole = ([one[seed] - base[seed] for seed in seeds] for one in tests)
            if len(seeds) > 1:
                lines.append(
                    f"share of the gain of {names[1]} left in {names[0]}: {share(part, whole)}"
                )
    return "\n".join(lines)


def share(part: Sequence[float], whole: Sequence[float]) -> str:
    """`mean(part) / mean(whole)` with Fieller's 95 % interval, for pairs."""
    return f"{statistics.ratio(part, whole).text(scale=1.0)}, n = {len(part)}"


STUDY = search.compare(ARMS, tiny={"confirm": 2}, answer=answer)


def main(argv: Sequence[str] | None = None) -> int:
    """One study a setting, each in its own directory below `--out`."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="further flags go to `kart study run`, such as --data, --threads 1",
    )
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument(
        "--settings", default=",".join(SETTINGS), help=f"comma-separated, of {', '.join(SETTINGS)}"
    )
    args, flags = parser.parse_known_args(argv)
    names = [
        choice("--settings", name.strip(), list(SETTINGS)) for name in args.settings.split(",")
    ]
    for name in names:
        print(f"== {name}")
        directory = Path(args.out) / name.replace(" ", "-")
        given = ["run", __file__, "--out", str(directory), *SETTINGS[name], *flags]
        status = cli.main(["study", *given])
        if status:
            return status
    return 0


if __name__ == "__main__":
    standalone(main)
