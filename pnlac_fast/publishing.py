"""Results on the Hugging Face hub: neurons, neuron slices and reports, each with a card that says what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of httpx, or of what follows it

import pnlac_fast
from pnlac_fast.errors import UserError, first_line
from pnlac_fast.neurons import NEURONS_FILE, NeuronSet, load_sets

LIBRARY = "pnlac-fast"
CARD = "README.md"
OF_REPORT = ("index.html", "model_card.md", "tables/*.csv", "figures/*.png", "figures/narrow/*.png")
FOUND = (
    "A set of neurons is a finding about one model and one set of questions. Whether it carries a change of stance is "
    "a question for activation patching, with random neurons beside it. The method is that of arXiv 2508.02360."
)


def publish(path: str | Path, repo: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Put neurons, neuron slices or a report into a repository on the hub, which is made where it does not exist.

    They are ``neurons.json``, ``neuron_slices.safetensors``, or the files of the report as they are; one commit, and a
    card. A card that someone else has written stays as it is.

    Parameters
    ----------
    path
        A file of :func:`pnlac_fast.locate`, the slices of :func:`pnlac_fast.finetune`, or a folder of
        :func:`pnlac_fast.report`.
    repo
        USER/NAME of a model repository.
    private
        Whether a new repository is; default: what the hub does.
    token
        Default: ``HF_TOKEN``, or that of ``hf auth login``. It goes to the hub and nowhere else.

    Returns
    -------
    str
        Where it is. ``hf://USER/NAME`` is its address for :func:`pnlac_fast.neurons.load_sets` and
        :func:`pnlac_fast.merge_slices`.

    Raises
    ------
    UserError
        The path is nothing of these; the hub refuses or is not reached.
    """
    files, card = _content(Path(path), repo)
    hub = HfApi(token=token, library_name=LIBRARY, library_version=pnlac_fast.__version__)
    try:
        where = str(hub.create_repo(repo, private=private, exist_ok=True))
        if _is_ours(hub, repo, token):
            files = {**files, CARD: str(card).encode()}
        added = [CommitOperationAdd(name, source) for name, source in files.items()]
        hub.create_commit(repo, added, commit_message=f"{', '.join(list(files)[:1])} by {LIBRARY}")
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(
            f"'{repo}' cannot be written on the hub ({first_line(error)}): check the name and the connection, and log "
            f"in with hf auth login or HF_TOKEN."
        ) from error
    return where


def _content(path: Path, repo: str) -> tuple[dict[str, Any], ModelCard]:
    """What to upload, by its name in the repository, and its card."""
    if path.is_dir():
        found = [file for pattern in OF_REPORT for file in sorted(path.glob(pattern))]
        if path / OF_REPORT[0] not in found or not any(file.suffix == ".csv" for file in found):
            raise UserError(f"'{path}' is no report: make one with pnlac-fast report STORE -o {path}.")
        return {file.relative_to(path).as_posix(): file for file in found}, _card_of_report(path, found, repo)
    if path.suffix == ".safetensors":
        from pnlac_fast.loading import SLICES_FILE
        from pnlac_fast.slice_file import load_slices

        neurons = load_slices(path).neurons
        use = f'from pnlac_fast import merge_slices\n\nmerge_slices(model, "hf://{repo}")'
        what = "Trained weights of a few neurons; any copy of the base takes them."
        return {SLICES_FILE: path}, _card_of_sets([neurons], repo, what, use)
    sets = load_sets(path)
    use = f'from pnlac_fast.neurons import load_sets\n\nsets = load_sets("hf://{repo}")'
    return {NEURONS_FILE: path}, _card_of_sets(list(sets.values()), repo, "Sets of neurons.", use)


def _card_of_sets(sets: Sequence[NeuronSet], repo: str, what: str, use: str) -> ModelCard:
    base: Mapping[str, Any] = sets[0].base if sets else {}
    rows = [
        f"| {_cell(s.name)} | {s.kind} | {s.site} | {len(s)} | {s.share:.2%} | {_cell(_how(s.found))} |" for s in sets
    ]
    source = _hub_name(base)
    text = [
        *(what, f"Base model: {source or 'see the file'}, weights sha256 `{base.get('sha256') or 'unknown'}`."),
        "| set | kind | site | neurons | share of the site | found by |\n| --- | --- | --- | --- | --- | --- |\n"
        + "\n".join(rows),
        f"```python\n{use}\n```",
        FOUND,
    ]
    return _card(repo, text, source)


def _card_of_report(folder: Path, files: Sequence[Path], repo: str) -> ModelCard:
    card = folder / "model_card.md"
    tables = "\n".join(f"- `{file.relative_to(folder).as_posix()}`" for file in files if file.suffix == ".csv")
    text = ["`index.html` is the report; it needs no network. Its tables:", tables]
    if card in files:
        text.append(card.read_text(encoding="utf-8").strip())
    return _card(repo, text, None)


def _card(repo: str, text: Sequence[str], base: str | None) -> ModelCard:
    data = ModelCardData(library_name=LIBRARY, tags=[LIBRARY, "interpretability"], base_model=base)
    title = f"# {repo.rpartition('/')[2]}"
    made = f"Made with pnlac-fast {pnlac_fast.__version__}."
    return ModelCard("\n\n".join([f"---\n{data.to_yaml()}\n---", title, *text, made]) + "\n")


def _is_ours(hub: HfApi, repo: str, token: str | None) -> bool:
    """Whether the card of a repository may be written: there is none, or only the one that was written before."""
    if not hub.file_exists(repo, CARD):
        return True
    text = Path(hf_hub_download(repo, CARD, token=token, force_download=True)).read_text(encoding="utf-8")
    return ModelCard(text, ignore_metadata_errors=True).data.to_dict().get("library_name") == LIBRARY


def _hub_name(base: Mapping[str, Any]) -> str | None:
    """The base model's name on the hub; None for a directory."""
    source = str(base.get("source") or "")
    return source if source.count("/") == 1 and source[0] not in "./~" and not Path(source).exists() else None


def _how(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {found[name]}" for name in ("score", "top", "tokens") if found.get(name) is not None)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
