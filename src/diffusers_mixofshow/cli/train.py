"""``mixofshow train``: tune an ED-LoRA on a folder of photos.

Almost every option is made from a field of `TrainingConfig`: its name, its default and its documentation. ``--help``
shows those that people use daily, ``--help-all`` shows all.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperCommand

from diffusers_mixofshow.atomic import portable_name
from diffusers_mixofshow.base_models import TOYLAND
from diffusers_mixofshow.cli.messages import show_warnings_as_sentences
from diffusers_mixofshow.cli.next_commands import describe_next, describe_resumption
from diffusers_mixofshow.cli.plans import DryRun, plan_replacing, plan_training, tell
from diffusers_mixofshow.errors import ConceptError, ConfigurationError, OverwriteError, TrainingDataError
from diffusers_mixofshow.training import TrainingConfig
from diffusers_mixofshow.training.config import CHOICES
from diffusers_mixofshow.training.config_files import read_settings
from diffusers_mixofshow.training.presets import PRESETS
from diffusers_mixofshow.training.renamed import RENAMED
from diffusers_mixofshow.training.settings import Setting, settings_of


SPELLINGS = {"token_normalize_func": lambda name: name.replace("_", "-")}
"""Context settings of the command: options may be written with underscores, as in diffusers' training scripts."""

_SETTINGS = settings_of(TrainingConfig)
_OFF = "no_"
_SHORT = {
    "pretrained_model_name_or_path": "--base",
    "output_dir": "--output",
    "max_train_steps": "--steps",
    "train_batch_size": "--batch-size",
}
_WHAT_TO_LEARN = "What to learn"
_PANELS = {
    "instance_data_dir": _WHAT_TO_LEARN,
    "resolution": "Pictures and captions",
    "train_batch_size": "Steps",
    "embedding_learning_rate": "Learning rates",
    "rank": "LoRA and loss",
    "method": "Method and optimiser",
    "attn_reg_weight": "Regularisers",
    "gradient_checkpointing": "Memory and speed",
    "checkpointing_steps": "Checkpoints",
    "report_to": "What is seen and kept",
}
"""First setting of every group in the help to the group's title; settings follow in the order of `TrainingConfig`."""
_USED_DAILY = (
    "resolution",
    "instance_prompt",
    "train_batch_size",
    "max_train_steps",
    "masked_loss",
    "mixed_precision",
    "gradient_checkpointing",
    "checkpointing_steps",
    "resume_from_checkpoint",
    "validation_prompt",
)
"""Settings that ``--help`` shows beside those of what to learn."""


class ShortHelpCommand(TyperCommand):
    """A command whose ``--help`` shows what people use daily; shell completion and ``--help-all`` offer everything."""

    def get_help(self, ctx: Any) -> str:
        """Format the help of the options that are used daily; rich prints it itself, and the text is then empty."""
        short = copy.copy(self)
        short.params = [
            each
            for each in self.params
            if each.name in _USED_DAILY or getattr(each, "rich_help_panel", None) in (None, _WHAT_TO_LEARN)
        ]
        return TyperCommand.get_help(short, ctx)


def _show_all_help(context: typer.Context, asked: bool) -> None:
    """Print the help of all options and end, if it was asked for."""
    if asked and not context.resilient_parsing:  # which shell completion sets
        typer.echo(TyperCommand.get_help(context.command, context))
        raise typer.Exit


def train(**given: Any) -> None:
    """Tune one concept on a handful of photos and write it as an ED-LoRA.

    Five to twenty photos in a folder are enough:
      mixofshow train photos/potter --concept potter --class-word man

    Without a model and a GPU, on the base that ships in the package:
      mixofshow train mixofshow-demo/photos/rex --concept rex \\
        --class-word dog --base toyland

    With captions, one of the presets, and settings from a file; options win
    over the file, the file over the preset, the preset over the defaults:
      mixofshow train --config potter.toml --preset character --seed 1

    Switches take no value and are turned off by --no-NAME, such as
    --no-masked-loss. Where a setting can be None, none is its text.

    Beside a photo NAME.jpg may stand its captions, NAME.txt (<TOK> is the
    concept), and its mask, masks/NAME.png (white is the concept), which
    `mixofshow masks` makes.
    """
    config: Path | None = given.pop("config")
    photos: str | None = given.pop("photos")
    dry_run, as_json = bool(given.pop("dry_run")), bool(given.pop("as_json"))
    options = _parse_options(_drop_overruled(given, given.pop("context")))
    if photos is not None and "instance_data_dir" in options:
        raise ConfigurationError("The photos are given twice: as PHOTOS and as --instance-data-dir.")
    if photos is not None:
        options["instance_data_dir"] = photos
    in_file = {} if config is None else read_settings(config, _SETTINGS)
    spelt = _list_spellings(in_file.keys() - options.keys(), config)
    with _reword_errors(spelt), show_warnings_as_sentences(lambda text: _use_option_names(text, spelt)):
        checked = make_config(in_file | options)
        if dry_run:
            from diffusers_mixofshow.training.checkpoints import list_replaced

            replaced = plan_replacing(*list_replaced(checked), overwrite=checked.overwrite)
            tell(plan_training(checked) | replaced, as_json=as_json)
            return

        checked = _run(checked)
    concept = checked.concept_to_learn
    if as_json:
        made = {"output": str(checked.output_dir), "concept": concept.placeholder, "class_word": concept.class_word}
        tell(made | {"settings": checked.as_record()}, as_json=True)
    elif checked.output_dir is None:
        typer.echo(f"Tuned {concept.placeholder}; without --output nothing was saved.")
    else:
        typer.echo(f"Wrote the ED-LoRA of {concept.placeholder} to {checked.output_dir}")
        typer.echo("\n".join(describe_next(checked)))


def _run(config: TrainingConfig) -> TrainingConfig:
    """Train; after Ctrl-C tell how to go on. Returns the settings, with the folder that the ED-LoRA was saved to."""
    from diffusers_mixofshow import EDLoRATrainer

    trainer = EDLoRATrainer(config)
    try:
        trainer.train()
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # of several processes one tells
            typer.echo("\n".join(describe_resumption(config, sys.argv[1:])), err=True)
        raise
    if trainer.saved_to in (None, Path(str(config.output_dir))):
        return config
    return replace(config, output_dir=trainer.saved_to)  # another result had come to output_dir meanwhile


def make_config(settings: Mapping[str, Any]) -> TrainingConfig:
    """Make the config; the output folder is named after the concept unless it is given."""
    settings = dict(settings)
    if "concept" in settings:
        settings.setdefault("output_dir", Path(portable_name(str(settings["concept"]).strip("<>"))))
    return TrainingConfig.from_mapping(settings)


def _drop_overruled(given: Mapping[str, Any], context: typer.Context) -> dict[str, Any]:
    """Drop switches of the file of `mixofshow --config` that the command line sets to the opposite."""

    def is_from_file(name: str) -> bool:
        source = context.get_parameter_source(name)
        return source is not None and source.name == "DEFAULT_MAP"

    overruled = set()
    for name in (name for name, value in given.items() if value and given.get(_OFF + name)):
        overruled |= {each for each in (name, _OFF + name) if is_from_file(each)}
    return {name: value for name, value in given.items() if name not in overruled}


def _parse_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Parse the options that were given, each text as its setting's type."""
    written = {name: value for name, value in given.items() if value not in (None, [], False)}
    switched_off = [name.removeprefix(_OFF) for name in written if name.startswith(_OFF)]
    both = [_SETTINGS[name].option for name in switched_off if name in written]
    if both:
        raise ConfigurationError(f"Both on and off: {', '.join(both)}.")
    values = {
        name: value if setting is None or value is True else setting.from_text(value)
        for name, value in written.items()
        for setting in [_SETTINGS.get(RENAMED.get(name, name))]
        if not name.startswith(_OFF)
    }
    return values | dict.fromkeys(switched_off, False)


def _list_parameters() -> Iterator[inspect.Parameter]:
    """The command's parameters, for typer."""
    yield inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    photos = typer.Argument(metavar="PHOTOS", help="Folder of photos; the same as --instance-data-dir.")
    yield _make_parameter("photos", Annotated[str | None, photos], positional=True)
    preset = typer.Option(
        help=f"Named settings, which all other options override: {', '.join(PRESETS)}.", metavar="<str>"
    )
    yield _make_parameter("preset", Annotated[str | None, preset])
    config = typer.Option(help="TOML or YAML file with settings, one a line: class_word = 'man'.", metavar="<path>")
    yield _make_parameter("config", Annotated[Path | None, config])
    yield _make_parameter("dry_run", DryRun)
    as_json = typer.Option(
        "--json", help="Print the folder, the concept and all settings as JSON; with --dry-run, the plan."
    )
    yield _make_parameter("as_json", Annotated[bool, as_json])
    help_all = typer.Option(
        "--help-all",
        help=f"Show all {len(_SETTINGS)} settings and exit.",
        callback=_show_all_help,
        is_eager=True,
        expose_value=False,
    )
    yield _make_parameter("help_all", Annotated[bool, help_all])
    for former, name in RENAMED.items():
        option = typer.Option(help=f"Former name of {_SETTINGS[name].option}.", hidden=True)
        yield _make_parameter(former, Annotated[str | None, option])
    panel = None
    for setting in _SETTINGS.values():
        panel = _PANELS.get(setting.name, panel)
        yield _make_parameter(setting.name, _annotate(setting, panel))
        if bool in setting.types:
            off = typer.Option(_spell_switch_off(setting), hidden=True)
            yield _make_parameter(_OFF + setting.name, Annotated[bool, off])


def _spell_switch_off(setting: Setting) -> str:
    """The option that switches a setting off; the help shows it only if the setting is on by default."""
    return f"--no-{setting.option.removeprefix('--')}"


def _annotate(setting: Setting, panel: str | None) -> Any:
    """The annotation from which typer makes a setting's option."""
    names = [*([_SHORT[setting.name]] if setting.name in _SHORT else []), setting.option]
    if bool in setting.types:
        option = typer.Option(setting.option, help=_format_help(setting), metavar=" ", rich_help_panel=panel)
        return Annotated[bool, option]
    metavar = "path" if Path in setting.types else setting.expected.removesuffix(" | None").replace(" ", "")
    if setting.is_list:
        metavar = "str"
    option = typer.Option(*names, help=_format_help(setting), metavar=f"<{metavar}>", rich_help_panel=panel)
    return Annotated[list[str] | None, option] if setting.is_list else Annotated[str | None, option]


def _make_parameter(name: str, annotation: Any, *, positional: bool = False) -> inspect.Parameter:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if positional else inspect.Parameter.KEYWORD_ONLY
    default = False if annotation.__origin__ is bool else None
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _format_help(setting: Setting) -> str:
    """The setting's documentation with its default, and with the default for the embedded base if it has another."""
    text = setting.documentation.replace("`", "") + (" Several: repeat the option." if setting.is_list else "")
    if not all(choice in text for choice in CHOICES.get(setting.name, ())):
        text += f" One of {', '.join(CHOICES[setting.name])}."
    if setting.is_required:
        return escape(f"{text} (required)")
    defaults = [] if setting.default in (None, ()) else [f"default: {_format_default(setting.default)}"]
    if setting.name in PRESETS[TOYLAND] and setting.name != "pretrained_model_name_or_path":
        defaults.append(f"toyland: {_format_default(PRESETS[TOYLAND][setting.name])}")
    if setting.default is True:
        defaults.append(f"off: {_spell_switch_off(setting)}")
    return escape(text + (f" ({'; '.join(defaults)})" if defaults else ""))


def _format_default(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(repr, value))
    return {"True": "yes", "False": "no"}.get(str(value), str(value))


def _list_spellings(in_file: Collection[str], file: Path | None) -> dict[str, str]:
    """Setting to its name in messages: that of its option, or the file's if only the file sets it."""
    spelt = {name: _SHORT.get(name, setting.option) for name, setting in _SETTINGS.items()} | {"preset": "--preset"}
    spelt |= {former: "--" + former.replace("_", "-") for former in RENAMED}
    return spelt if file is None else spelt | {name: f"{name} ({file.name})" for name in in_file}


@contextmanager
def _reword_errors(spelt: Mapping[str, str]) -> Iterator[None]:
    """Let errors from the block name options instead of settings."""
    try:
        yield
    except (ConfigurationError, ConceptError, OverwriteError, TrainingDataError) as error:
        raise type(error)(_use_option_names(str(error), spelt)) from error


def _use_option_names(message: str, spelt: Mapping[str, str]) -> str:
    """Replace names of settings by options; a name without '_' may be a plain word, so only at a sentence's start."""
    any_name, joined = "|".join(spelt), "|".join(name for name in spelt if "_" in name)
    at_start, inside = rf"(?:(?<=^)|(?<=; )|(?<=: ))'?({any_name})'?(?= is )", rf"(?<!['\w./-])({joined})(?!['\w])"
    return re.sub(f"{at_start}|{inside}", lambda found: spelt[found[1] or found[2]], message)


train.__signature__ = inspect.Signature(list(_list_parameters()))  # type: ignore[attr-defined]
