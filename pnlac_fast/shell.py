"""What a shell offers behind an option: the words that the option takes, else files."""

from __future__ import annotations

from click.shell_completion import CompletionItem

SCORES = ("rms", "std_rms", "mean_diff", "cohens_d", "welch_t", "paired_t", "attribution")

# By the option's parameter. That these are the library's words is tested; asking it would take seconds.
WORDS: dict[str, tuple[str, ...]] = {
    "clock": ("wall", "cpu"),
    "contrast": ("tuned", "sides"),
    "device": ("auto", "cpu", "cuda"),
    "device_map": ("auto", "balanced", "sequential"),
    "direction": ("tuned_into_base", "base_into_tuned"),
    "dtype": ("auto", "float32", "bfloat16", "float16", "float64"),
    "engine": ("auto", "torch", "cpp", "triton", "cuda"),
    "inhibit_mode": ("freeze", "specific", "anchor", "kl"),
    "keep_scores": SCORES,
    "kind": ("tuned", "mean", "shift", "zero", "scale"),
    "kl_on": ("answers", "prompts"),
    "normalise": ("token", "sum"),
    "only": (
        *("localise", "overhead", "contrast_kernel", "masked_step", "training_step"),
        *("memory", "store", "queries", "stall"),
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
