"""What NCCL is told of each group: the table, what a run changes, what a version does not know."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch.distributed as dist

from moekernels.errors import UsageError
from moekernels.model.layout import Layout
from moekernels.parallel import nccl
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.nodes import Nodes
from moekernels.run import files as cfg


class Options:
    """As torch 2.13 has them: a configuration with some of NCCL's fields."""

    def __init__(self) -> None:
        self.is_high_priority_stream = False
        names = ("blocking", "cga_cluster_size", "min_ctas", "max_ctas")
        self.config = SimpleNamespace(**dict.fromkeys(names))


STAND_IN = SimpleNamespace(Options=Options)


def test_a_row_becomes_options_and_says_what_is_not_known() -> None:
    made, missing = nccl.options(nccl.TABLE["exchange"], STAND_IN)
    assert made.is_high_priority_stream and made.config.max_ctas == 16 and not missing
    assert made.config.min_ctas is None
    made, missing = nccl.options(nccl.TABLE["dp"], STAND_IN)
    assert not made.is_high_priority_stream and missing == ["cta_policy"]
    newer = Options()
    newer.config.cta_policy = None
    made, missing = nccl.options(nccl.TABLE["dp"], SimpleNamespace(Options=lambda: newer))
    assert newer.config.cta_policy == 1 and not missing


def test_a_run_changes_a_row() -> None:
    text = "max_ctas=8, high_priority=no,cta_policy=zero"
    run = cfg.resolve("tiny", None, {("nccl", "exchange"): text})
    row = nccl.rows_of(run.nccl)["exchange"]
    assert row.describe() == "normal priority, max_ctas 8, cta_policy zero"
    assert nccl.rows_of(run.nccl)["pp"] == nccl.TABLE["pp"]
    assert f'exchange = "{text}"' in cfg.to_toml(run)  # recorded with the run


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "ctas=8",
            "--nccl-pp 'ctas=8': no such option; use one of high_priority, min_ctas, max_ctas",
        ),
        ("max_ctas=many", "--nccl-pp 'max_ctas=many' must be a whole number"),
        ("high_priority=1", "--nccl-pp 'high_priority=1' must be yes or no"),
        ("cta_policy=fast", "--nccl-pp 'cta_policy=fast' must be one of default, efficiency, zero"),
        ("min_ctas=5", "--nccl-pp: min_ctas 5 is more than max_ctas 4"),
    ],
)
def test_what_cannot_be_is_one_line(text: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        nccl.changed("pp", text)
    assert said in str(error.value)


def test_one_queue_is_refused_and_what_is_set_is_recorded() -> None:
    nccl.check_environment({})
    nccl.check_environment({"CUDA_DEVICE_MAX_CONNECTIONS": "32"})
    with pytest.raises(UsageError, match="CUDA_DEVICE_MAX_CONNECTIONS is 1, which puts"):
        nccl.check_environment({"CUDA_DEVICE_MAX_CONNECTIONS": "1"})
    found = nccl.environment_of({"NCCL_IB_HCA": "mlx5", "HOME": "/", "NCCL_ALGO": "Ring"})
    assert found == {"NCCL_ALGO": "Ring", "NCCL_IB_HCA": "mlx5"}


def test_every_group_of_the_table_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tp and the exchange are the same ranks, they are two communicators under NCCL."""
    told = []
    monkeypatch.setattr(nccl, "api", lambda: STAND_IN)
    monkeypatch.setattr(dist, "new_group", lambda ranks, **k: told.append((ranks, k)) or "group")
    mesh = Mesh.__new__(Mesh)
    mesh.layout, mesh.rank, mesh.order = Layout(tp=2, pp=2, ep=2), 0, (0, 1, 2, 3)
    mesh._made, mesh._rows, mesh.nodes = {}, nccl.TABLE, Nodes((0,) * 4)
    mesh._place(ends=False)
    priorities = {
        (tuple(ranks), k["pg_options"].is_high_priority_stream, k["pg_options"].config.max_ctas)
        for ranks, k in told
        if "pg_options" in k
    }
    assert ((0, 1), True, None) in priorities and ((0, 1), True, 16) in priorities
    assert ((0, 2), True, 4) in priorities
    assert mesh.pp.options.config.max_ctas == 4  # for the second direction's group
    assert mesh.tp.process_group == "group" and mesh.world.options is None
    told.clear()
    mesh._place(ends=True)
    options = [(ranks, k["pg_options"].config.max_ctas) for ranks, k in told if "pg_options" in k]
    assert options == [([0, 2], 8), ([1, 3], 8)]


def test_info_shows_the_table() -> None:
    rows = dict(nccl.described())
    assert list(rows) == [f"nccl {name}" for name in ("exchange", "pp", "tp", "dp", "edp", "ends")]
    assert rows["nccl exchange"].startswith("high priority, max_ctas 16")
