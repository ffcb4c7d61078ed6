"""The spec language: strings such as `G3B:rank=24` or `2*softmax+G3B`, read into operators.

It knows no operator and no family by name: what may be written is read off the signatures of the
factories that it is given. A factory whose first parameter is `basis` is an order, which meets a
family (`polynomial-1B:order=full_rank`); any other stands by its own name (`softmax`). A basis or
an operator of the user's own stands behind the module or file that holds it: `my_module:sinc-B`,
`file.py:hats-8U:rank=4`; numbers are the first arguments of its factory.
"""

import inspect
import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from kart import bases, code, schema
from kart.operators.contract import Operator
from kart.operators.mixtures import hybrid

Factory = Callable[..., Operator]

SHARING = {"B": "blockwise", "U": "universal", None: None}
WORDS = {"none": None, "None": None, "true": True, "True": True, "false": False, "False": False}
# more digits name nothing that could be computed with, and are caught before anything is allocated
DIGITS = 6
DOTS = "..."
HEAD = re.compile(
    r"(?:(?P<name>[a-z][a-z_]*)(?:-|$))?(?P<numbers>G?[0-9]+(?:/[0-9]+)*)?(?P<sharing>[BU])?"
)
# a module or file, a name in it, and the numbers and letter as above
OWN = re.compile(
    r"(?P<source>[^:]+):(?P<name>[A-Za-z_]\w*)"
    r"(?:-(?=[0-9BU])(?P<numbers>[0-9]+(?:/[0-9]+)*)?(?P<sharing>[BU])?)?(?::(?P<options>.*))?",
    re.ASCII,
)
WHOLE = re.compile(r"[+-]?[0-9]+")
REAL = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


class Spec(NamedTuple):
    """What a spec string says: the operator, "blockwise" or "universal" or None where silent."""

    operator: Operator
    sharing: str | None


class Head(NamedTuple):
    """One kind of head, read but not yet made: its factory, family, numbers and options."""

    text: str
    factory: Factory
    family: str | None
    units: Callable[..., bases.Basis] | None  # the factory of the family
    numbers: Mapping[str, int]
    options: Mapping[str, Any]
    sharing: str | None
    order: str | None = None  # where the spec names it
    source: str | None = None  # the user's module or file


def parameters(factory: Callable[..., Any]) -> dict[str, Any]:
    """The options of a factory and their defaults."""
    found = inspect.signature(factory).parameters
    varied = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {
        name: None if p.default is p.empty else p.default
        for name, p in found.items()
        if name != "basis" and p.kind not in varied
    }


def takes_basis(factory: Factory) -> bool:
    """Whether the factory is an order, of units of a basis."""
    return "basis" in inspect.signature(factory).parameters


def options_of(head: Head) -> dict[str, Any]:
    """Every option that a head may be given, and its default; those of the units come last."""
    own = parameters(head.factory)
    if head.units is None:
        return own
    units = parameters(head.units)
    named = {"unit_base" if name == "base" else name: value for name, value in units.items()}
    return {**own, **{name: value for name, value in named.items() if name not in own}}


def examples(factories: Sequence[Factory]) -> list[str]:
    """Specs of every operator and family, with their defaults."""
    orders = [factory for factory in factories if takes_basis(factory)]
    names = [f.__name__ for f in factories if f not in orders]
    for family, factory in bases.FAMILIES.items():
        defaults = parameters(factory)
        numbers = "/".join(str(defaults[name]) for name in bases.NUMBERS.get(family, ()))
        first = family == next(iter(bases.FAMILIES))  # which is named by its numbers alone
        names += [f"G{numbers}B", f"G{numbers}U"] if first else [f"{family}-{numbers}B"]
    names += [f"G3B:order={order.__name__}" for order in orders]
    return names


def refusal(spec: str, why: str, near: Sequence[str] = ()) -> ValueError:
    """The error of a spec, with what it may have meant."""
    advice = f" Near matches: {', '.join(near)}." if near else ""
    file = spec.rpartition(".py:")[0] + ".py"
    if re.search(r"[+*|:]|[^\x00-\x7f]", file) and os.path.isfile(file):
        advice = (
            " A path in a spec is of ASCII letters, and has none of + * | : in it, which the spec "
            f"has a use for: name {os.path.basename(file)} from within its folder, or rename it."
        )
    return ValueError(
        f"`operator` needs a spec such as G3B, softmax or bspline-G8U:rank=24, got {spec!r}: "
        f"{why}.{advice}"
    )


def each_block(text: str, blocks: int) -> str | tuple[str, ...]:
    """The specs of all blocks, "softmax|...|G3B", where ... stands for as many more of what is
    before it as make up `blocks`; without | the text itself, one spec for all.

    Raises:
        ValueError: names what is empty, twice or too much.
    """
    if "|" not in text:
        return text
    parts = [part.strip() for part in text.split("|")]
    if not all(parts):
        raise refusal(text, "a block between two | has none")
    if DOTS in parts:
        at = parts.index(DOTS)
        if parts.count(DOTS) > 1 or at == 0:
            raise refusal(text, f"{DOTS} stands once, and behind what it repeats")
        parts[at : at + 1] = [parts[at - 1]] * max(0, blocks - len(parts) + 1)
    if len(parts) != blocks:
        raise refusal(text, f"it names {len(parts)} blocks, and the model has {blocks}")
    return tuple(parts)


def shown(operator: Any) -> str:
    """One spec, also where all blocks have it, or those of the blocks as `each_block` reads them,
    the longest repeat shortened.
    """
    if not isinstance(operator, list | tuple) or not all(isinstance(x, str) for x in operator):
        return str(operator)
    runs = [(spec, len(list(same))) for spec, same in itertools.groupby(operator)]
    if len(runs) == 1:
        return operator[0]
    longest = max(range(len(runs)), key=lambda i: runs[i][1])
    parts: list[str] = []
    for i, (spec, count) in enumerate(runs):
        parts += [spec, DOTS] if i == longest and count > 2 else [spec] * count
    return "|".join(parts)


def read_value(spec: str, text: str) -> Any:
    """None, a truth value, a number, an interval `low..high` or a word."""
    if text in WORDS:
        return WORDS[text]
    if WHOLE.fullmatch(text):
        return read_whole(spec, text)
    if REAL.fullmatch(text):
        return float(text)
    ends = text.split("..")
    if len(ends) == 2 and all(REAL.fullmatch(end) for end in ends):
        return float(ends[0]), float(ends[1])
    return text


def read_whole(spec: str, text: str) -> int:
    """A whole number that something can be computed with."""
    if len(text.lstrip("+-0")) > DIGITS:
        raise refusal(spec, f"{text[:12]}... has more than {DIGITS} digits")
    return int(text)


def read_options(spec: str, text: str) -> dict[str, Any]:
    """The options of `name=value,name=value`."""
    options: dict[str, Any] = {}
    for item in text.split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not name or not value:
            raise refusal(spec, f"option {item!r} is not of the form name=value")
        if name in options:
            raise refusal(spec, f"option {name!r} is given twice")
        options[name] = read_value(spec, value)
    return options


def read_head(spec: str, text: str, factories: Sequence[Factory], order: str | None) -> Head:
    """One kind of head, of `order` where it names none; nothing is made yet."""
    orders = {f.__name__: f for f in factories if takes_basis(f)}
    own = read_own(spec, text, orders, order)
    if own is not None:
        return own
    alone = {f.__name__: f for f in factories if not takes_basis(f)}
    written, colon, tail = text.partition(":")
    if written.endswith(".py"):
        raise refusal(
            spec, f"what is in a file is named {written}:NAME-NUMBERS, B or U behind them"
        )
    options = read_options(spec, tail) if colon else {}
    match = HEAD.fullmatch(written)
    name = match["name"] if match else None
    known = (name in alone or name in bases.FAMILIES) if name else bool(match and match["numbers"])
    if match is None or not known:
        names = [*examples(factories), *bases.FAMILIES]
        near = schema.near(written, names) or names[:6]
        raise refusal(spec, f"there is no operator {written!r}", near)
    sharing = SHARING[match["sharing"]]
    if name in alone:
        if match["numbers"]:
            raise refusal(spec, f"{name} takes no numbers, got {match['numbers']}")
        return Head(spec, alone[name], None, None, {}, options, sharing)
    # numbers alone are those of the first family
    family = name or next(iter(bases.FAMILIES))
    fields = bases.NUMBERS.get(family, ())
    digits = (match["numbers"] or "").lstrip("G")
    values = [read_whole(spec, number) for number in digits.split("/") if number]
    defaults = parameters(bases.FAMILIES[family])
    missing = not values and family == next(iter(bases.FAMILIES))
    if len(values) not in (0, len(fields)) or missing:
        wanted = "/".join(f"{field} ({defaults[field]})" for field in fields) or "no numbers"
        raise refusal(spec, f"{family} needs {wanted} before B or U")
    named = options.pop("order", None)
    make = pick_order(spec, named or order, orders)
    numbers = numbered(spec, fields, values, options)
    return Head(spec, make, family, bases.FAMILIES[family], numbers, options, sharing, named)


def pick_order(spec: str, name: str | None, orders: Mapping[str, Factory]) -> Factory:
    """The order of that name; the first for None."""
    if name is None:
        return next(iter(orders.values()))
    if name not in orders:
        why = f"order must be one of {', '.join(orders)}, got {name!r}"
        raise refusal(spec, why, schema.near(name, orders))
    return orders[name]


def numbered(
    spec: str, fields: Sequence[str], values: Sequence[int], options: Mapping[str, Any]
) -> dict[str, int]:
    """The numbers of a spec by the names of what they set, which no option may set again."""
    numbers = dict(zip(fields, values, strict=False))
    for field in numbers:
        if field in options:
            raise refusal(spec, f"{field} is given twice, as {numbers[field]} and by an option")
    return numbers


def own_match(text: str) -> re.Match[str] | None:
    """The parts of a head of the user's own, as `OWN` has them; None where it is none."""
    match = OWN.fullmatch(text)
    source = match["source"] if match else ""
    plain = HEAD.fullmatch(source)
    known = plain and (plain["numbers"] or plain["name"] in bases.FAMILIES)
    return None if known or not code.is_name(source) else match


def sources(operator: str | Sequence[str]) -> set[str]:
    """The modules and files of the user's own that a spec, or a block's, names; nothing is run."""
    specs = [operator] if isinstance(operator, str) else operator
    heads = [part.partition("*")[2] or part for spec in specs for part in str(spec).split("+")]
    return {match["source"] for match in map(own_match, heads) if match is not None}


def read_own(spec: str, text: str, orders: Mapping[str, Factory], order: str | None) -> Head | None:
    """One kind of head of the user's own, None where `text` names none. This may run its code."""
    match = own_match(text)
    if match is None:
        return None
    source, name = match["source"], match["name"]
    found = code.find(spec, source, name)
    factory: Callable[..., Any] = found if callable(found) else lambda: found
    options = read_options(spec, match["options"]) if match["options"] is not None else {}
    if takes_basis(factory):
        raise refusal(spec, f"{name} of {source} takes a basis: give a factory that makes its own")
    fields = parameters(factory)
    values = [read_whole(spec, number) for number in (match["numbers"] or "").split("/") if number]
    if len(values) > len(fields):
        raise refusal(spec, f"{name} of {source} takes {len(fields)} numbers, got {len(values)}")
    named = options.pop("order", None)
    numbers = numbered(spec, list(fields), values, options)
    own = {field: value for field, value in options.items() if field in fields}
    made = call_own(spec, source, factory, {**numbers, **own})
    sharing = SHARING[match["sharing"]]
    if isinstance(made, Operator):
        if named:
            raise refusal(spec, f"order={named!r} has no effect on {name} of {source}")
        return Head(spec, factory, None, None, numbers, options, sharing, None, source)
    if not isinstance(made, bases.Basis):
        raise refusal(
            spec,
            f"{name} of {source} must be a basis or an operator, or make one, got "
            f"{type(made).__name__}",
        )
    make = pick_order(spec, named or order, orders)
    for field in sorted(own.keys() & parameters(make).keys() - {"base"}):
        raise refusal(
            spec,
            f"{field} is an option of {make.__name__} and of {name}: rename that of {name}, or "
            "give it as a number",
        )
    return Head(spec, make, name, factory, numbers, options, sharing, named, source)


def call_own(spec: str, source: str, factory: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """What a factory of the user's own makes; its errors in one line, with file and line."""
    try:
        return factory(**given)
    except Exception as error:
        why = code.where(error, source).rstrip(".")
        raise refusal(spec, f"its factory raised {why}") from error


def fits(value: Any, default: Any) -> bool:
    """Whether a value is of the kind of a default: a truth value, a number, an interval, a word."""
    if value is None or default is None:
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, int | float):
        return isinstance(value, int | (float if isinstance(default, float) else int))
    return isinstance(value, Sequence) and isinstance(value, str) == isinstance(default, str)


def checked(head: Head, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options given to a head, under the names of `options_of`, or ValueError."""
    known = options_of(head)
    options: dict[str, Any] = {}
    for name, value in given.items():
        # `base` names what is added to rows (softmax) or to units (eq. 5): no value is both
        if name == "base" and head.units is not None:
            words = ["softmax", *bases.BASES]
            if value is not None and value not in words:
                why = f"`base` must be one of {', '.join(words)}, got {value!r}"
                raise refusal(head.text, why, schema.near(value, words))
            name = "unit_base" if value in bases.BASES else "base"
        if name not in known:
            what = head.family or (head.text if head.source else head.factory.__name__)
            takes = f"it takes {', '.join(known)}" if known else "it takes no options"
            raise refusal(
                head.text, f"{name!r} has no effect on {what}: {takes}", schema.near(name, known)
            )
        if name in options:
            raise refusal(head.text, f"option {name!r} is given twice")
        if not fits(value, known[name]):
            raise refusal(
                head.text, f"{name!r} must be like {known[name]!r}, its default, got {value!r}"
            )
        options[name] = value
    return options


def make(head: Head, options: Mapping[str, Any]) -> Operator:
    """The operator of a head with its checked options."""

    def made(factory: Callable[..., Any], given: Mapping[str, Any]) -> Any:
        if head.source is not None:
            return call_own(head.text, head.source, factory, given)
        return factory(**given)

    if head.units is None:
        return made(head.factory, {**head.numbers, **options})
    own = parameters(head.factory)
    outer = {name: value for name, value in options.items() if name in own}
    inner = {name: value for name, value in options.items() if name not in own}
    if "unit_base" in inner:
        inner["base"] = inner.pop("unit_base")
    return head.factory(made(head.units, {**head.numbers, **inner}), **outer)


def split(
    spec: str, factories: Sequence[Factory], order: str | None = None
) -> list[tuple[str, Head, int]]:
    """The kinds of heads that a spec joins: how each is written, what it is, and its number."""
    if not isinstance(spec, str) or not spec or not spec.isascii():
        raise refusal(str(spec), "it must be a word of ASCII letters", examples(factories)[:6])
    parts = []
    for part in str(spec).split("+"):
        count, star, rest = part.partition("*")
        if star and not WHOLE.fullmatch(count):
            raise refusal(spec, f"{count!r} before * is not a number of heads")
        number = read_whole(spec, count) if star else 1
        if number < 1:
            raise refusal(spec, f"{count} before * is not a number of heads of at least 1")
        text = rest if star else part
        # the names of its operators are stored as it is
        named = code.Stored(text) if isinstance(spec, code.Stored) else text
        parts.append((named, read_head(spec, text, factories, order), number))
    return parts


def open_options(spec: str, factories: Sequence[Factory]) -> set[str]:
    """The options that some head of the spec takes and does not name itself."""
    found: set[str] = set()
    for _, head, _ in split(spec, factories):
        found |= set(options_of(head)) - set(checked(head, head.options)) - set(head.numbers)
        found |= {"order"} if head.units is not None and head.order is None else set()
    return found


def read(spec: str, factories: Sequence[Factory], overrides: Mapping[str, Any]) -> Spec:
    """The operator that a spec names among those of `factories`; see `kart.operators.parse`."""
    asked = {name: value for name, value in overrides.items() if value is not None}
    order = asked.pop("order", None)
    texts, heads, counts = zip(*split(spec, factories, order), strict=True)
    orders = [head.factory.__name__ for head in heads if head.units is not None]
    if order is not None and order not in orders:
        raise refusal(spec, f"order={order!r}, given beside it, has no effect")
    given = [checked(head, head.options) for head in heads]
    for name, value in asked.items():
        place(spec, name, value, heads, given)
    made = [
        make(head, options)._replace(name=text)
        for text, head, options in zip(texts, heads, given, strict=True)
    ]
    for head, op in zip(heads, made, strict=True):
        if head.sharing and not op.traits.get("learned", True):
            what = head.text if head.source else head.factory.__name__
            raise refusal(spec, f"{what} has no parameters to share")
    modes = {head.sharing for head in heads} - {None}
    if len(modes) > 1:
        raise refusal(spec, "the heads of a block are all blockwise or all universal")
    sharing = modes.pop() if modes else None
    if counts == (1,):
        return Spec(made[0]._replace(name=spec), sharing)
    each = [op for op, count in zip(made, counts, strict=True) for _ in range(count)]
    return Spec(hybrid(each)._replace(name=spec), sharing)


def place(
    spec: str, name: str, value: Any, heads: Sequence[Head], given: Sequence[dict[str, Any]]
) -> None:
    """Puts an override among the options of every head that takes it and does not name it."""
    effect, names, refused = False, set[str](), []
    for head, options in zip(heads, given, strict=True):
        names |= set(options_of(head))
        try:
            fitting = checked(head, {name: value})
        except ValueError as error:
            refused.append(error)
            continue
        key, fitted = next(iter(fitting.items()))
        if key in head.numbers or key in options:
            effect = effect or head.numbers.get(key, options.get(key)) == fitted
        else:
            options[key] = fitted
            effect = True
    if not effect and len(refused) == len(heads) == 1:
        raise refused[0]
    if not effect:
        known = ", ".join(sorted(names)) or "no options"
        raise refusal(
            spec,
            f"{name}={value!r}, given beside it, has no effect: the spec takes {known}, and what "
            "it says itself holds",
            schema.near(name, sorted(names)),
        )
