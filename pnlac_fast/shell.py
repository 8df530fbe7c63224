"""What a shell offers behind an option: the words that the option takes, else files."""

from __future__ import annotations

from click.shell_completion import BashComplete, CompletionItem, FishComplete, ZshComplete, add_completion_class

SCORES = ("rms", "std_rms", "mean_diff", "cohens_d", "welch_t", "paired_t", "part", "attribution")

# By the option's parameter. That these are the library's words is tested; asking it would take seconds.
WORDS: dict[str, tuple[str, ...]] = {
    "clock": ("wall", "cpu"),
    "contrast": ("tuned", "sides"),
    "device": ("auto", "cpu", "cuda"),
    "device_map": ("auto", "balanced", "sequential"),
    "direction": ("tuned_into_base", "base_into_tuned"),
    "dtype": ("auto", "float32", "bfloat16", "float16", "float64"),
    "engine": ("auto", "torch", "cpp", "triton", "cuda"),
    "inhibit_mode": ("freeze", "specific", "nullspace", "anchor", "kl"),
    "keep_scores": SCORES,
    "kind": ("tuned", "mean", "shift", "zero", "scale"),
    "other_texts": ("answers", "prompts"),
    "normalise": ("token", "sum"),
    "only": (
        *("localise", "overhead", "contrast_kernel", "masked_step", "training_step"),
        *("mixture_step", "memory", "store", "queries", "stall"),
    ),
    "raw": ("none", "last", "pooled", "selected", "full"),
    "raw_dtype": ("auto", "float32", "float16", "bfloat16"),
    "rival": ("mlp", "rate", "caft", "steer", "inoculate"),
    "score": SCORES,
    "scorer": ("logprob", "classifier", "hf:", "nli:", "openai:", "csv:"),
    "set": ("general", "specific", "top", "mean", "off_minus_on", "on_minus_off", "random", "random_top"),
    "shape": ("tiny", "small", "hidden-1024", "hidden-2048", "llama-3.1-8b"),
    "side": ("right", "left", "both"),
    "site": ("mlp_mid", "mlp_out", "resid"),
    "specific": ("strict", "paper"),
    "tokens": ("last", "prompt", "completion", "all"),
    "without": ("share", "pack", "fuse", "stop", "base", "overlap"),
}
NO_FILES = ("columns", "judge_labels", "judge_url", "last_projection", "revision", "title", "topic", "topics")


def offered(name: str, incomplete: str) -> list[CompletionItem]:
    """What may follow an option or argument of text, by the name of its parameter.

    Of words separated by commas it is the last that is completed.
    """
    if name in WORDS:
        before, comma, last = incomplete.rpartition(",")
        return [CompletionItem(f"{before}{comma}{word}") for word in WORDS[name] if word.startswith(last)]
    return [] if name in NO_FILES else [CompletionItem(incomplete, type="file")]


class Bash(BashComplete):
    """bash, which hands "name=value" over as three words."""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Words before the one to complete, and that, as they were typed."""
        args, incomplete = super().get_completion_args()
        words: list[str] = []
        for word in [*args, incomplete]:
            if words and (word == "=" or words[-1].endswith("=")):
                words[-1] += word
            else:
                words.append(word)
        return words[:-1], words[-1]


class Zsh(ZshComplete):
    """zsh, which replaces a whole word, and would lose the "--option=" that stands in front of a value."""

    source_template = ZshComplete.source_template.replace(
        "_path_files -f", "_path_files -f || { compset -P 1 '*=' && _path_files -f }"
    )

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem]:
        """What may stand in the place of the word to complete; of a file, which zsh completes by itself, the value."""
        option, sign, _ = incomplete.partition("=")
        front = option + sign if sign and option.startswith("--") else ""
        return [
            item if item.type == "file" else CompletionItem(front + item.value, item.type, item.help)
            for item in super().get_completions(args, incomplete)
        ]


class Fish(FishComplete):
    """fish, with what click's own script takes away: all behind a comma, what follows "--option=", the order."""

    source_template = """\
function %(complete_func)s
    set -l front (string match --regex -- '^--[^=]+=' (commandline -ct); or echo '')
    for offer in (env %(complete_var)s=fish_complete COMP_WORDS=(commandline -cp | string collect) \
COMP_CWORD=(commandline -ct) %(prog_name)s)
        set -l parts (string split --max 1 ',' -- $offer)
        switch $parts[1]
            case file
                set -l typed (string replace -- $front '' (commandline -ct))
                printf '%%s\\n' $front(complete --do-complete "'' $typed")
            case plain
                printf '%%s\\n' $front$parts[2]
        end
    end
end

complete --no-files --keep-order --command %(prog_name)s --arguments '(%(complete_func)s)'
"""


for _shell in (Bash, Zsh, Fish):
    add_completion_class(_shell)
