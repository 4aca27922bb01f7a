"""`--log`: the lines of metrics.jsonl also to TensorBoard, Weights & Biases or MLflow, by their own
libraries. A run does not fail for want of them: metrics.jsonl holds everything."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from moekernels.errors import UsageError, one_line
from moekernels.run.sections import FLAG_SECTIONS, RunConfig

PROJECT = "moekernels"  # the project of W&B and the experiment of MLflow that runs appear in


class Logger(Protocol):
    """Where a run's numbers go."""

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """Event files in `<run>/tensorboard`."""

    def __init__(self, folder: Path, identity: str, config: dict[str, Any], first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an earlier attempt wrote behind the step that the run goes on from is hidden.
        purge = first + 1 if first else None
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
        text = "\n".join(f"    {name} = {value!r}" for name, value in config.items())
        self._writer.add_text("configuration", text, first)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """A run of W&B, whose id is the run's identity: a resumed run goes on in it."""

    def __init__(self, folder: Path, identity: str, config: dict[str, Any], first: int) -> None:
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(
            project=PROJECT,
            name=folder.absolute().name,
            id=identity,
            resume="allow",
            dir=str(folder),
            config=config,
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """A run of MLflow, found again by its tag: a resumed run goes on in it."""

    def __init__(self, folder: Path, identity: str, config: dict[str, Any], first: int) -> None:
        self._mlflow = mlflow = importlib.import_module("mlflow")
        mlflow.set_experiment(PROJECT)
        tag = "moekernels.run"
        found = mlflow.search_runs(
            experiment_names=[PROJECT],
            filter_string=f"tags.`{tag}` = '{identity}'",
            output_format="list",
        )
        if found:
            mlflow.start_run(run_id=found[0].info.run_id)
        else:
            mlflow.start_run(run_name=folder.absolute().name, tags={tag: identity})
            mlflow.log_params(config)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._mlflow.log_metrics(values, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


# name -> (what makes it, the module that it needs, the package that has it)
LOGGERS: dict[str, tuple[Callable[..., Logger], str, str]] = {
    "tensorboard": (_TensorBoard, "torch.utils.tensorboard", "tensorboard"),
    "wandb": (_WandB, "wandb", "wandb"),
    "mlflow": (_MLflow, "mlflow", "mlflow-skinny"),
}


def check(name: str) -> None:
    """UsageError where the library of a logger is missing: before anything is computed."""
    if name == "none":
        return
    _, module, package = LOGGERS[name]
    try:
        importlib.import_module(module)
    except ImportError:
        raise UsageError(
            f"--log {name} needs a package that is not here: pip install {package}"
        ) from None


class Log:
    """The logger of a run, if it has one. What it raises is told once, and the run goes on."""

    def __init__(
        self,
        name: str,
        folder: Path,
        identity: str,
        config: RunConfig,
        first: int,
        tell: Callable[[str], None],
    ) -> None:
        self._name, self._tell = name, tell
        self._logger: Logger | None = None
        if name != "none":
            flat = {
                f"{section}.{key}": value
                for section in FLAG_SECTIONS
                for key, value in asdict(getattr(config, section)).items()
            }
            self._try(lambda: self._begin(LOGGERS[name][0], folder, identity, flat, first))

    def _begin(self, make: Callable[..., Logger], *arguments: Any) -> None:
        self._logger = make(*arguments)

    def write(self, line: dict[str, Any]) -> None:
        """The numbers of a line of metrics; those that are not finite are left out there too."""
        logger = self._logger
        if logger is not None:
            values = {
                name: float(value)
                for name, value in line.items()
                if name != "step" and isinstance(value, (int, float))
            }
            self._try(lambda: logger.write(line["step"], values))

    def close(self) -> None:
        if self._logger is not None:
            self._try(self._logger.close)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001, of libraries that talk to servers
            self._logger = None
            why = one_line(f"{type(error).__name__}: {error}")
            self._tell(f"log      {self._name} failed, metrics.jsonl has what follows: {why}")
