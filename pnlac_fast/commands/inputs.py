"""What options name, loaded."""

from __future__ import annotations

from typing import Any


def loaded(given: dict[str, Any]) -> dict[str, Any]:
    """Replace the loading options among ``given`` by the model to load, questions and template."""
    from pnlac_fast.prompts import load_template

    given["template"] = load_template(given["template"], chat=given.pop("chat_template"))
    return with_model(given | read(given))


def with_model(given: dict[str, Any]) -> dict[str, Any]:
    """Replace the options about the model among ``given`` by the model to load, once all else has been looked at."""
    from pnlac_fast.loading import ModelSource

    loading = ("revision", "dtype", "device", "device_map", "trust_remote_code", "last_projection", "tp")
    options = {name: given.pop(name) for name in loading if name in given}
    if given["model"] is not None:
        given["model"] = ModelSource(given["model"], options)
    return given


def read(given: dict[str, Any]) -> dict[str, Any]:
    """Take the options about data out of ``given``; returns the questions, by parameter."""
    from pnlac_fast.datasets import load_questions

    topics, limit, columns = (given.pop(name) for name in ("topics", "limit", "columns"))
    found: dict[str, Any] = {}
    if given["data"] is not None:
        found["data"] = load_questions(given["data"], topics=topics, limit=limit, columns=columns)
    others = [name for name in ("probe", "training_data", "other_data") if given.get(name) is not None]
    return found | {name: load_questions(given[name], columns=columns) for name in others}
