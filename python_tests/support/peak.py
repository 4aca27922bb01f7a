"""How much memory a flush holds. torch's MemTracker follows one pass at a time and stops where a
backward begins before an older microbatch's; this one follows memory alone."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class Held(TorchDispatchMode):
    """Bytes of the tensors that operators within return, while anything holds them: `now`, and the
    most so far. `known` ones do not count. A thread of its own enters it, too; only one may run at
    a time."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = [x.untyped_storage() for x in known]
        self._seen = {storage._cdata for storage in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        tree_map_only(Tensor, self._see, result)
        return result

    def _see(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size
