"""`moekernels plan`: from flags to a report."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

from moekernels import files, jsonio
from moekernels.errors import UsageError
from moekernels.plan import problem as asked
from moekernels.run import files as cfg


def check_claims(where: str, claims) -> None:
    """Claims whose size gives away that they are in another unit, or that are no range."""

    def wrong(name: str, text: str) -> UsageError:
        return UsageError(f"{where}: claims.{name} = {getattr(claims, name)!r} {text}")

    if 0 < claims.parameters < 1e5:
        raise wrong(
            "parameters", f"is a number of parameters; {claims.parameters:g}e9 would be billions"
        )
    if claims.memory_gb > 1e5:
        raise wrong("memory_gb", f"is in GB; {claims.memory_gb / 1e9:g} would be that many bytes")
    for name in ("layer_ms", "sequences_per_second", "mfu"):
        value = getattr(claims, name)
        if value and (len(value) != 2 or not 0 < value[0] <= value[1]):
            raise wrong(name, "must be [from, to], both above 0; a single number would be twice it")
    if claims.mfu and claims.mfu[1] > 1:
        low, high = claims.mfu
        raise wrong("mfu", f"is a part of 1; [{low / 100:g}, {high / 100:g}] would be per cent")
    if claims.checkpoint_layers:
        run = cfg.RunConfig()
        run.model = replace(run.model, num_layers=10**6)
        run.layout.checkpoint_layers = claims.checkpoint_layers
        from moekernels import assembly

        try:
            assembly.checkpointed(run)
        except UsageError:
            raise wrong("checkpoint_layers", "must be as in 2-15 or 1,3-5") from None


def plan(
    preset: str | None,
    file: Path | None,
    flags: dict,
    *,
    told: dict[tuple[str, str], object] | None = None,
    lengths_from: Path | None = None,
    as_json: bool = False,
    html: Path | None = None,
    trace: Path | None = None,
    everything: bool = False,
    here: int | None = None,
) -> int:
    """Plan and print; the exit code. `told`: {(section, key): value} of [hardware] and the like;
    `here`: for so many ranks of this machine, as calibrated."""
    given_layout = {k: v for k, v in flags.items() if k[0] == "layout"}
    own_flags = {k: v for k, v in flags.items() if k[0] != "layout"}
    run = cfg.resolve(preset, file, own_flags, default="spec-30b")
    for (section, key), value in (told or {}).items():
        flag = "--objective" if key == "best" else "--" + key.replace("_", "-")
        value = cfg.check_value(flag, cfg.SECTIONS[section], key, value)
        setattr(getattr(run, section), key, value)
    if run.model.fp8_experts:
        raise UsageError(
            "plan: it has no measured rate of products in FP8, and would take them for those of "
            "--dtype; plan without fp8_experts"
        )
    name = file.stem if file else preset or "spec-30b"
    check_claims(str(file or f"preset {name}"), run.claims)
    lengths = asked.read_lengths(lengths_from) if lengths_from else None
    problem = asked.problem_of(run, lengths)
    if here is not None:
        if here < 1:
            raise UsageError(f"--here must be at least 1, got {here}")
        from moekernels.plan import calibrate

        machine = calibrate.here(calibrate.stored(), here)
        machine = replace(machine, loads=problem.cluster.loads)
        problem = replace(problem, cluster=asked.with_link(machine, run))

    source = [f"--config {shlex.quote(str(file))}"] if file else []
    if preset or not file:
        source.insert(0, f"--preset {preset or 'spec-30b'}")
    for (section, key), value in own_flags.items():
        if section == "model":
            source.append(f"--{cfg.flag_of(cfg.SECTIONS[section], key)} {value}")

    from moekernels.audit import report as reports

    report = reports.make(run, problem, asked.space_of({**own_flags, **given_layout}), source, name)
    _write(html, trace, report)
    if as_json:
        print(jsonio.dumps(reports.as_dict(report), indent=2))
        return 0
    from moekernels.audit.screen import show

    show(report, everything=everything)
    return 0


def _write(html: Path | None, trace: Path | None, report) -> None:
    try:
        if html is not None:
            from moekernels.audit.page import page

            files.write(html, page(report))
        if trace is not None:
            from moekernels.audit.report import trace as entries
            from moekernels.pipeline.trace import write_trace

            write_trace(trace, entries(report))
    except OSError as error:
        said = files.no_room(Path(error.filename), error, remedy="give another file")
        raise UsageError(said) from None


SHOWN = (
    ("dense products", "dense", "GFLOP/s"),
    ("attention", "attention", "GFLOP/s"),
    ("experts' products", "grouped", "GFLOP/s"),
    ("between the products", "bytes", "GB/s"),
    ("collectives", "link", "GB/s"),
    ("a collective's hop", "latency", "us"),
    ("a layer, forward", "layers", "us"),
    ("a layer, backward", "backward_layers", "us"),
    ("an action", "actions", "us"),
    ("optimizer", "update", "GB/s"),
    ("a step", "steps", "us"),
)


def calibrate() -> int:
    """Measure this machine and say what came out."""
    from moekernels.plan import calibrate as measured

    found = measured.calibrate()
    columns = sorted(found["ranks"], key=int)
    names = [f"{n} rank{'s' * (n != '1')} of {found['cores']} cores" for n in columns]
    print(" " * 24 + "".join(f"{name:>20}" for name in names))
    for label, constant, unit in SHOWN:
        values = [found["ranks"][n][constant] for n in columns]
        if unit == "us":
            cells = [f"{1e6 * v:.0f} us" if v else "-" for v in values]
        else:
            cells = [f"{1e-9 / v:.4g} {unit}" if v else "-" for v in values]
        print(f"{label:<24}" + "".join(f"{cell:>20}" for cell in cells))
    print(
        f"median error {100 * found['median_error']:.0f} %, 90 % within "
        f"{100 * found['error_band']:.0f} % ({found['measurements']} measurements)"
    )
    print(f"stored in {measured.store()}; moekernels plan --here RANKS uses it")
    return 0


def against(folder: Path, *, as_json: bool) -> int:
    """A run's measured times beside the prediction."""
    from moekernels.plan import calibrate as measured

    found = measured.against(folder, measured.stored())
    if as_json:
        print(jsonio.dumps(found, indent=2))
        return 0
    step = found["step"]
    print(found["calibrated"])
    print(f"{'':<16}{'predicted':>12}{'measured':>12}{'ratio':>8}")
    rows = [("step", step["predicted"], step["measured"])]
    for a in found["actions"]:
        rows.append((f"stage {a['stage']} {a['action']}", a["predicted"], a["measured"]))
    for name, predicted, took in rows:
        print(f"{name:<16}{predicted:>10.4f} s{took:>10.4f} s{predicted / took:>8.2f}")
    return 0
