"""Raw activations as xarray reads them: lazily, and as floating-point numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from xarray.backends import BackendArray
from xarray.core.indexing import ExplicitIndexer, IndexingSupport, explicit_indexing_adapter

from pnlac_fast.store.files import Files
from pnlac_fast.store.regions import read_region
from pnlac_fast.store.sharding import Sharding


@dataclass(frozen=True, eq=False)
class ShardedArray(BackendArray):
    """An array in shards for `xarray.core.indexing.LazilyIndexedArray`. It can be pickled and holds no open file.

    Attributes
    ----------
    files : Files
        Where its shards are.
    sharding : Sharding
        What its metadata says.
    name : str
        What to call it in errors.
    missing_as_fill : bool
        Take a shard that is not there for NaN; otherwise it is an error.
    """

    files: Files
    sharding: Sharding
    name: str
    missing_as_fill: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.sharding.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """float16 where that is stored, float32 otherwise."""
        return self.sharding.read_dtype

    def __getitem__(self, key: ExplicitIndexer) -> Any:
        """Read what xarray asks for."""
        return explicit_indexing_adapter(key, self.shape, IndexingSupport.OUTER, self._read)

    def _read(self, selection: tuple[Any, ...]) -> npt.NDArray[Any]:
        return read_region(self.files, self.sharding, selection, array=self.name, missing_as_fill=self.missing_as_fill)
