"""The Hugging Face hub: data sets and neurons from it, and results to it.

An address is ``hf://USER/NAME/PATH`` in a model repository and ``hf://datasets/USER/NAME/PATH`` in one of data, each
with ``@REVISION`` behind NAME where wanted. Only this file talks to the hub, beside transformers' loading of models.
Code from repositories never runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from pnlac_fast.errors import UserError, first_line

SCHEME = "hf://"
SAVED = ("dataset_dict.json", "state.json")  # one of them is in each folder that datasets has saved


class Address(NamedTuple):
    """Where something is on the hub; ``path`` is "" for a repository as a whole."""

    kind: str
    repository: str
    revision: str | None
    path: str


def parse(text: str) -> Address:
    """Take an address apart.

    Raises
    ------
    UserError
        It has no user or no name.

    Examples
    --------
    >>> parse("hf://user/name@v1/neurons.json")
    Address(kind='model', repository='user/name', revision='v1', path='neurons.json')
    >>> parse("hf://datasets/user/name")
    Address(kind='dataset', repository='user/name', revision=None, path='')
    """
    parts = text.removeprefix(SCHEME).split("/")
    kind = "dataset" if parts[0] == "datasets" else "model"
    user, name, *path = [*parts[kind == "dataset" :], "", ""][: max(2, len(parts))]
    name, _, revision = name.partition("@")
    if not user or not name:
        raise UserError(f"'{text}' is no address on the hub: write hf://USER/NAME/PATH, or hf://datasets/USER/NAME.")
    return Address(kind, f"{user}/{name}", revision or None, "/".join(p for p in path if p))


def local(path: str | Path, default: str) -> Path:
    """A file on this machine: ``path`` itself, or a copy in the hub's cache of what an address names.

    Parameters
    ----------
    default
        The file of a repository that an address without path means.

    Raises
    ------
    UserError
        The hub has no such file, or cannot be reached.
    """
    if not str(path).startswith(SCHEME):
        return Path(path)
    from huggingface_hub import hf_hub_download

    kind, repository, revision, name = parse(str(path))
    try:
        return Path(hf_hub_download(repository, name or default, repo_type=kind, revision=revision))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be fetched: {first_line(error)}") from error


def data_set(address: str) -> Any:
    """A data set of the hub, ``hf://datasets/USER/NAME/SPLIT``; a mapping of splits where none is named.

    Raises
    ------
    UserError
        The hub has no such data set or split, it cannot be reached, or the package ``datasets`` is missing.
    """
    datasets = _datasets(address)
    _, repository, revision, split = parse(address)
    try:
        return datasets.load_dataset(repository, split=split or None, revision=revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"'{address}' cannot be read: {first_line(error)}") from error


def saved_data_set(folder: Path) -> Any:
    """What the ``save_to_disk`` of a ``Dataset`` or ``DatasetDict`` has written.

    Raises
    ------
    UserError
        It is damaged, or the package ``datasets`` is missing.
    """
    datasets = _datasets(str(folder))
    try:
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"'{folder}' is a data set that cannot be read ({first_line(error)}): save it again."
        ) from error


def _datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"'{what}' is a data set of Hugging Face's: pip install 'pnlac-fast[datasets]'.") from error
    return datasets
