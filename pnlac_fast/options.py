"""What the commands share: types of parameters, groups of options, and where their values may come from."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from pnlac_fast.shell import offered

Decorator = Callable[..., Any]


class Names(click.ParamType):
    """Names separated by commas; the option may also be repeated."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return value if isinstance(value, tuple) else tuple(part.strip() for part in value.split(",") if part.strip())


class Numbers(click.ParamType):
    """Whole numbers separated by commas, and ranges that include their end: "0,4-7"."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        numbers: list[int] = []
        for part in str(value).split(","):
            first, dash, last = part.strip().partition("-")
            if not (first.isdecimal() and (last.isdecimal() if dash else True)):
                self.fail(f"'{value}' is no list of numbers: write 0,4-7", param, ctx)
            numbers += range(int(first), int(last or first) + 1)
        return tuple(numbers)


class Share(click.ParamType):
    """A share, "5%" or 0.05."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            text = str(value).strip()
            return float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            self.fail(f"'{value}' is not a share: write 5% or 0.05", param, ctx)


class Shares(click.ParamType):
    """Shares separated by commas; the option may also be repeated."""

    name = "shares"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        parts = value if isinstance(value, tuple) else Names().convert(value, param, ctx)
        return tuple(Share().convert(part, param, ctx) for part in parts)


class Option(click.Option):
    """An option whose environment variable is called like its flag, which may need another option, and which shells
    complete.

    Parameters
    ----------
    needs
        (name, values) of the option without which this one has no effect; no values: it must be given. A value that
        ends in a colon stands for all that begin with it.
    """

    def __init__(self, *args: Any, needs: tuple[str, tuple[str, ...]] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.needs = needs
        self.flag = max((flag for flag in self.opts if flag.startswith("--")), key=len)

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """The value of ``PNLAC_<COMMAND>_<FLAG>``."""
        name = f"{ctx.auto_envvar_prefix}_{self.flag.removeprefix('--')}"
        return os.environ.get(name.replace("-", "_").upper()) or super().resolve_envvar_value(ctx)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """What a shell offers: of text, see :func:`pnlac_fast.shell.offered`."""
        text = isinstance(self.type, click.types.StringParamType | Names)
        return offered(self.name or "", incomplete) if text else super().shell_complete(ctx, incomplete)


class Command(click.Command):
    """A command that refuses options without effect."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run it, unless an option was typed that needs another."""
        given = {o.name: o for o in self.params if isinstance(o, Option)}
        for option in given.values():
            typed = ctx.get_parameter_source(option.name or "") is click.core.ParameterSource.COMMANDLINE
            if not typed or option.needs is None:
                continue
            name, values = option.needs
            value = ctx.params[name]
            chosen = [value] if isinstance(value, str) else value
            if not (any(_chooses(values, each) for each in chosen) if values else value):
                wanted = " ".join([given[name].flag, " or ".join(values)]).rstrip()
                raise click.UsageError(f"{option.flag} has no effect without {wanted}.", ctx)
        return super().invoke(ctx)


def _chooses(values: Sequence[str], given: str) -> bool:
    return any(given.startswith(value) if value.endswith(":") else given == value for value in values)


def command(*, epilog: str) -> Decorator:
    """As ``click.command``, made a :class:`Command`."""
    return click.command(cls=Command, epilog=epilog)


def argument(name: str) -> Decorator:
    """As ``click.argument``, completed by shells."""
    return click.argument(name, shell_complete=lambda ctx, param, incomplete: offered(name, incomplete))


def option(*flags: str, **settings: Any) -> Decorator:
    """As ``click.option``, made an :class:`Option`."""
    return click.option(*flags, cls=Option, **settings)


def names(flag: str, default: str | None, text: str, **settings: Any) -> Decorator:
    """An option for several :class:`Names`, or another type of several values; its value is a tuple."""
    values = [default] if default else []
    settings = (
        {"type": Names()}
        | settings
        | {"multiple": True, "callback": _flat, "default": values, "show_default": bool(values)}
    )
    return option(flag, help=text, **settings)


def together(*options: Decorator) -> Decorator:
    """Several options as one decorator, in the order given."""

    def decorate(function: Decorator) -> Decorator:
        for each in reversed(options):
            function = each(function)
        return function

    return decorate


def named(_: click.Context, param: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    """NAME=PATH, or a path whose last part is the name; of a file, its folder's."""
    pairs: dict[str, str] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or Path(value).exists():
            place = Path(value).resolve()
            name, path = place.parent.name if place.suffix == ".safetensors" else place.name, value
        if name in pairs:
            raise click.BadParameter(f"two values are called '{name}': write NAME=PATH", param=param)
        pairs[name] = path
    return pairs


def meanings(_: click.Context, param: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    """LABEL=MEANING; labels may hold an equals sign, meanings do not."""
    pairs = dict(value.rpartition("=")[::2] for value in values)
    if not all(pairs) or not all(pairs.values()):
        raise click.BadParameter("write each as LABEL=MEANING, such as LABEL_0=left", param=param)
    return pairs


def roles(_: click.Context, param: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    """ROLE=NAME of columns."""
    pairs = dict(value.partition("=")[::2] for value in values)
    if not all(pairs.values()) or len(pairs) < len(values):
        raise click.BadParameter("write each as ROLE=NAME, such as instruction=question, and each role once")
    return pairs


def config(ctx: click.Context, param: click.Parameter, path: str | None) -> None:
    """Defaults from a TOML file: a table per command. Environment variables and flags win over them."""
    if not path:
        return
    try:
        tables = tomllib.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"cannot read '{path}': {error}", param=param) from error
    group = ctx.command
    assert isinstance(group, click.Group)
    for command, table in tables.items():
        if command not in group.commands:
            raise click.BadParameter(f"'{path}' has a table [{command}], but there is no such command", param=param)
        if not isinstance(table, Mapping):
            raise click.BadParameter(f"'{path}' sets {command} outside of a table: write [{command}]", param=param)
    ctx.default_map = {name: _defaults(group.commands[name], table, path) for name, table in tables.items()}


def _defaults(command: click.Command, table: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The table of one command, by the names of its parameters."""
    known = {p.flag.removeprefix("--"): p for p in command.params if isinstance(p, Option)}
    defaults: dict[str, Any] = {}
    for key, value in table.items():
        if (flag := key.replace("_", "-")) not in known:
            raise click.BadParameter(
                f"'{path}' sets {key} of {command.name}, which has no such option: {', '.join(known)}",
                param_hint="--config",
            )
        if known[flag].multiple:
            pairs = [f"{k}={v}" for k, v in value.items()] if isinstance(value, Mapping) else value
            value = [pairs] if isinstance(pairs, str) else list(pairs)
        defaults[known[flag].name or flag] = value
    return defaults


def _flat(_: click.Context, __: click.Parameter, values: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    return tuple(name for group in values for name in group)


as_json = option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")


def model_choice(**model: Any) -> Decorator:
    """Which model, and how it is loaded."""
    how: dict[str, Any] = {"needs": None if model.get("required") else ("model", ())}
    return together(
        option("--model", **model),
        option("--revision", help="Revision of a hub model.", **how),
        option(
            "--dtype", default="auto", show_default=True, help="auto, float32, bfloat16, float16 or float64.", **how
        ),
        option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.", **how),
        option("--device-map", help="Spread the model over devices: auto, balanced or sequential.", **how),
        option("--trust-remote-code", is_flag=True, help="Let code from the model repository run.", **how),
        option(
            "--last-projection",
            help="Path of the MLP's last projection in a block, where it is not found by itself.",
            **how,
        ),
    )


def data_choice(**data: Any) -> Decorator:
    """Which questions, and how they are read."""
    return together(
        option("--data", **data),
        option("--limit", type=int, help="At most so many questions of each topic."),
        option(
            "--column",
            "columns",
            multiple=True,
            callback=roles,
            metavar="ROLE=NAME",
            help="Column that holds topic, instruction, right or left, in every data file of the command.",
        ),
        option("--template", help="File with {instruction} and, where wanted, {topic}."),
        option(
            "--chat-template", is_flag=True, help="Put that into the tokenizer's chat template, as the user's turn."
        ),
    )


model_options = model_choice(required=True, help="Base model: hub id or directory.")
_tuned: dict[str, Any] = {"multiple": True, "callback": named, "metavar": "[NAME=]PATH"}
tuned_option = option(
    "--tuned",
    required=True,
    help="Tuned model: adapter, full checkpoint, or slices, A.safetensors+B.safetensors. May be repeated.",
    **_tuned,
)
tuned_too_option = option("--tuned", help="Tuned model that answers too. May be repeated.", **_tuned)
patches_option = option(
    "--patch", "patches", help="File of pnlac-fast patch --save: the model it was made for answers so too.", **_tuned
)
questions_options = data_choice(
    required=True,
    help="Folder in IdeoINST layout or of a saved data set; .jsonl, .csv, .parquet or .json file; or hf://datasets/...",
)
topics_option = names("--topics", None, "Only these topics, separated by commas.")
data_options = together(questions_options, topics_option)
batch_option = option(
    "--batch-tokens", default=4096, show_default=True, help="Padded tokens of one forward pass; less needs less memory."
)
reading_options = together(
    model_choice(help="Base model, where attribution or the contrast of sides is to be computed."),
    option("--tuned", needs=("model", ()), help="Tuned model to attribute. May be repeated.", **_tuned),
    data_choice(needs=("model", ()), help="Questions to compute it from, as for cache."),
    topics_option,
    batch_option,
)
