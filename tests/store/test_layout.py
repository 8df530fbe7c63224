"""Layouts go through JSON unchanged, and no two layouts pass for each other."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from pnlac_fast.store import NO_RAW, Layout, Raw, Unit
from pnlac_fast.store.layout import RAW
from pnlac_fast.store.shards import DTYPES

name = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=12)
names = st.lists(name, min_size=1, max_size=3, unique=True)
value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def raws(layers):
    kept = st.sets(st.integers(0, layers - 1), min_size=1).map(sorted)
    return st.builds(Raw, st.sampled_from(RAW[1:]), st.sampled_from(DTYPES), kept)


@st.composite
def layouts(draw):
    topics, sites = draw(names), draw(names)
    layers = draw(st.integers(1, 99))
    raw = draw(st.just(NO_RAW) | raws(layers))
    rows = st.just(0) if raw is NO_RAW else st.integers(0, 600)
    unit = st.builds(Unit, st.sampled_from(topics), st.integers(0, 99), st.integers(0, 99), rows)
    return Layout(
        topics=tuple(topics),
        models=tuple(draw(st.lists(name.filter(lambda text: text != "base"), max_size=3, unique=True))),
        sites=tuple(sites),
        tokens=tuple(draw(names)),
        layers=layers,
        widths={site: draw(st.integers(1, 20000)) for site in sites},
        units=tuple(draw(st.lists(unit, min_size=1, max_size=5))),
        raw=raw,
        settings=draw(st.dictionaries(st.text(max_size=5), value, max_size=3)),
    )


@settings(deadline=None, max_examples=60)
@given(layouts())
def test_layout_goes_through_json(layout):
    again = Layout.from_json(json.loads(json.dumps(layout.to_json())))
    assert again == layout
    assert again.fingerprint() == layout.fingerprint()
    assert layout.differences(again) == []


@settings(deadline=None, max_examples=60)
@given(layouts(), layouts())
def test_layouts_differ_exactly_where_their_differences_say(one, other):
    assert bool(one.differences(other)) == (one.fingerprint() != other.fingerprint())
    assert [difference[0] for difference in one.differences(other)].count("layers") == (one.layers != other.layers)
