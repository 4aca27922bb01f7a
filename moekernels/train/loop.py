"""A rank's training: set up, step, save; rank 0 also writes the run's folder and reports."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from moekernels import assembly
from moekernels.balance import dead_experts, max_over_mean, update_selection_biases
from moekernels.data.batch import MicroBatch
from moekernels.errors import RunError
from moekernels.model.tensors import SELECTION_BIAS
from moekernels.nn.transformer import StageModel
from moekernels.ops._experts_fp8 import weights_quantized_once
from moekernels.parallel import device_exchange, launch
from moekernels.parallel.measure import Measure
from moekernels.parallel.nodes import cores
from moekernels.parallel.shard import blank, shard
from moekernels.parallel.tensor import all_reduce
from moekernels.pipeline.runtime import StepResult
from moekernels.pipeline.trace import Event
from moekernels.plan import microbatches
from moekernels.plan.cost import forward_flops
from moekernels.run import files as cfg
from moekernels.train import checkpoint, resume, weights
from moekernels.train.evaluating import evaluate
from moekernels.train.finish import finish
from moekernels.train.loggers import Log
from moekernels.train.metrics import Progress, RunFolder
from moekernels.train.monitor import Monitor
from moekernels.train.moves import Moves
from moekernels.train.nonfinite import Guard
from moekernels.train.profiling import Profiler
from moekernels.train.replicas import HotExperts
from moekernels.train.report import layout_report, peak_flops
from moekernels.train.sums import StepSums, peak_memory

if TYPE_CHECKING:
    from moekernels.data.corpus import Corpus

HEAT_SHARE = 0.2  # of the steps, the last ones: what experts.png shows


@dataclass
class Job:
    """What every rank needs to know."""

    run: cfg.RunConfig
    folder: RunFolder
    corpus: Corpus
    found: resume.Found  # what the run goes on from, if anything
    identity: str  # of the run: its checkpoints carry it
    tune: bool = False  # the number of microbatches is still to be measured
    weights: weights.Weights | None = None  # that a run begins with which goes on from nothing

    @property
    def facts(self) -> dict:
        return self.found.facts


class Trainer:
    """One rank: its chunks of the model, its optimiser, its batches."""

    def __init__(self, env: launch.RankEnv, job: Job) -> None:
        self.env, self.job, self.run = env, job, job.run
        self.mesh = assembly.build_mesh(self.run, env.device)
        self.first_step = job.facts.get("step", 0)
        tuning = self._begin_tuning()
        given = job.found.path is not None or job.weights is not None
        with blank() if given else contextlib.nullcontext():
            self.chunks = assembly.build_chunks(self.run, self.mesh)
        self.rows = [self._rows_of(chunk) for chunk in self.chunks]
        self.runtime = assembly.build_runtime(self.run, self.mesh, self.chunks)
        self.loader = assembly.build_loader(self.run, job.corpus, self.mesh.dp_index)
        self.shards = assembly.shards_of(self.chunks)
        self.optimizer = assembly.build_optimizer(self.run, self.mesh, self.chunks)
        t, m = self.run.train, self.run.model
        bad_before = job.facts.get("skipped_in_a_row", 0)
        self.guard = Guard(self.shards, self.mesh, t.skip_bad_steps, bad_before)
        self.checkpoints = checkpoint.Checkpoints(
            job.folder.path / "checkpoints",
            self.mesh,
            t.keep,
            run=job.identity,
            trusted=job.found.trusted,
            local_ranks=len(self.mesh.nodes.mates(self.mesh.rank)),
        )
        moved = (self.chunks, self.rows, self.optimizer, self.shards)
        self.moves = Moves(self.run, self.mesh, *moved)
        self.hot = HotExperts(self.run, self.mesh, self.chunks, self.rows, self.moves)
        self._load()
        self.monitor = Monitor(self.mesh, self.chunks, self.rows, self.moves, t.steps)
        self.heat = torch.zeros(m.moe_layers, m.num_experts, dtype=torch.float64)
        self.peak = peak_flops(env.device)
        stamps = device_exchange.stamps_of(self.mesh.exchange)
        self.exchanges = Measure(self.mesh.exchange, self.mesh.inside, stamps)
        self.origin = 0.0  # of the times of the last step's events
        self.held_out: list[list[MicroBatch]] | None = None
        self.stopping = False  # a signal reached some rank: this step is the last
        self._announce(tuning)
        self.progress = Progress(self.first_step, t.steps, quiet=not env.leader)
        self.profiler = Profiler(t.profile, job.folder.path, self.mesh)
        self.log = Log(
            t.log if env.leader else "none",
            job.folder.path,
            job.identity,
            self.run,
            self.first_step,
            self.progress.say,
        )

    def _begin_tuning(self) -> str:
        """Settle how many microbatches the run begins with; what to say of it."""
        run, job = self.run, self.job
        count = run.batch.microbatches * run.batch.accumulation
        self.chosen = count if job.facts.get("microbatches") == count else None
        self.tuner: microbatches.Tuner | None = None
        if not job.tune:
            return ""
        began = microbatches.begin(run, job.corpus, self.mesh, self.first_step)
        self.tuner, count, text = began
        self.chosen = None if self.tuner else count
        self.run = microbatches.with_count(run, count)
        return text

    def _load(self) -> None:
        """Fill the model and the optimiser from what the run goes on from, or begins with."""
        job = self.job
        path, manifest = job.found.path, job.found.manifest
        if path is not None and manifest is not None:
            self.moves.restore(job.facts, manifest.layout, str(path))
            averaged = any(name.startswith(weights.AVERAGE) for name in manifest.tensors)
            state = (x for x in self.state() if averaged or not x[0].startswith(weights.AVERAGE))
            checkpoint.load(path, manifest.tensors, state)
            done = job.facts.get("updates", self.first_step)
            self.optimizer.loaded(done, averaged=averaged)
            self.hot.restore(job.facts, manifest.layout, str(path))
        elif job.weights is not None:
            weights.load(job.weights, self.state())
            self.optimizer.loaded(0, averaged=False)

    def _announce(self, tuning: str) -> None:
        """What the user reads before the first step; and the run's folder begins."""
        report = layout_report(self.run, self.mesh, self.chunks, self.optimizer, self.loader)
        if not self.env.leader:
            return
        begins = f", from step {self.first_step}" if self.first_step else ""
        print(f"run      {self.job.folder.path}{begins}\n{report}", flush=True)
        for note in (*self.moves.notes(), *([tuning] if tuning else ())):
            print(note, flush=True)
        auto = self.tuner is not None
        known = microbatches.with_count(self.run, cfg.AUTO) if auto else self.run
        self.job.folder.begin(known, self.first_step)
        resume.write_identity(self.checkpoints.folder, self.job.identity)

    def _rows_of(self, chunk: StageModel) -> slice:
        """A chunk's layers among all layers with experts."""
        numbers = sorted(map(int, chunk.layers))
        before = 1 + self.run.model.dense_layers
        return slice(max(0, numbers[0] - before), max(0, numbers[-1] + 1 - before))

    def state(self):
        """Everything that a checkpoint keeps."""
        yield from self.optimizer.state()
        for chunk in self.chunks:
            for name, bias in chunk.named_buffers():
                if name.endswith(SELECTION_BIAS):
                    yield name, bias, shard(bias.shape, copies="stage")

    def run_steps(self) -> int:
        """All steps, or those until a signal; the exit code."""
        started = time.perf_counter()
        with self.env.stop.listening():
            try:
                step, events = self._steps()
            except RunError:
                self.checkpoints.wait()  # what was saved before it is to be whole
                raise
            self.progress.close()
            self.checkpoints.wait()
            finish(self, events, step, time.perf_counter() - started)
        if step == self.run.train.steps:
            return 0
        if self.env.leader:
            left = self._left()
            print(
                f"moekernels: stopped behind step {step} of {self.run.train.steps}: {left}",
                file=sys.stderr,
            )
        return 128 + (self.env.stop.signal or signal.SIGTERM)

    def _steps(self) -> tuple[int, list[Event]]:
        """Step until the end or a signal; the last step and what ran when in it."""
        t, due = self.run.train, False
        for step in range(self.first_step + 1, t.steps + 1):
            if self.tuner is not None:
                self.set_microbatches(self.tuner.count(step))
            self.profiler.begin(step)
            line, events = self.step(step)
            if self.tuner is not None:
                self.tune(self.tuner, step, events)
            last = step == t.steps or self.stopping
            if written := self.profiler.end(step, last):
                self.progress.say(f"profile  {written}")
            line.update(self.moves.look(step, last) | self.hot.look(step, last, self.progress.say))
            if step == t.steps or (t.eval_every and step % t.eval_every == 0):
                line["eval_loss"] = evaluate(self)
            if self.env.leader:
                self.job.folder.write(line)
                self.log.write(line)
                self.progress.show(line)
            said = self.guard.stop_or_say(line)
            if said and self.env.leader:
                self.progress.say(said)
            self.checkpoints.poll()
            due |= t.save_every != 0 if last else t.save_every > 0 and step % t.save_every == 0
            # No checkpoint without the choice: it could not be made again in the same way.
            if due and self.tuner is None:
                self.save(step)
                due = False
            if last:
                return step, events
        raise AssertionError("a run has a last step")

    def _left(self) -> str:
        """What a run that was stopped left."""
        if self.run.train.save_every == 0:
            return "nothing is saved under --save-every 0"
        if self.tuner is not None:
            return "nothing is saved before the number of microbatches is chosen"
        return f"saved in {self.checkpoints.folder}, --resume goes on"

    def step(self, step: int) -> tuple[dict, list[Event]]:
        """One optimiser step; its line of metrics (on every rank), and this rank's events."""
        start = time.perf_counter()
        batches = [b.to(self.env.device) for b in self.loader.batch(step)]
        assembly.begin_bound(self.run, self.mesh, batches)
        attempts, fits = 0, False
        while not fits:  # rows that do not fit make a step that never was
            attempts, began = attempts + 1, time.perf_counter()
            self.optimizer.zero_grad()
            self.exchanges.read()  # not those of an evaluation
            self.exchanges.take()
            origin = self.shared_clock() if step == self.run.train.steps else None
            flush, worked = time.perf_counter(), time.process_time()
            self.origin = flush if origin is None else origin
            self.monitor.begin(step)
            # Copies of experts bring their gradients home behind all chunks.
            begin = None if self.run.train.replicas else self.optimizer.sums.begin
            with weights_quantized_once():
                result = self.runtime.step(batches, origin=origin, finished=begin)
            flush, worked = time.perf_counter() - flush, time.process_time() - worked
            self.exchanges.read()
            self.hot.bring_home()
            self.optimizer.reduce()
            norm = self.optimizer.grad_norm()
            line, loads, fits = self.collect(step, result, flush, worked)
        if attempts > 1 and self.env.leader and (bound := self.mesh.exchange.bound):
            self.progress.say(f"step {step}: rows did not fit; bounded:{bound.factor:.3g} from now")
        line.update(grad_norm=norm.item(), lr=self.optimizer.lr, attempts=attempts)
        line.update(self.monitor.end(self.shown(step)) | self.hot.line())
        if self.guard.passes(line, self.optimizer.largest_norm, self.run.train.clip):
            self.optimizer.step(norm)
            self.hot.updated(loads)
            self.count_loads(step, loads)
        seconds = time.perf_counter() - start
        if not line["skipped"]:
            self.moves.saw(loads, time.perf_counter() - began)
        tokens = self.loader.global_tokens(step)
        line.update(seconds=seconds, tokens=tokens, tokens_per_s=tokens / seconds)
        if self.peak:
            line["mfu"] = (
                self.flops_per_token(batches) * tokens / seconds / (self.peak * self.env.world)
            )
        return line, result.events

    def set_microbatches(self, count: int) -> None:
        """As many in every flush from now on; the global batches stay what they are."""
        if count != self.runtime.schedule.microbatches:
            self.run = microbatches.with_count(self.run, count)
            self.loader = assembly.build_loader(self.run, self.job.corpus, self.mesh.dp_index)
            self.runtime.schedule = assembly.build_schedule(self.run)
            self.held_out = None

    def tune(self, tuner: microbatches.Tuner, step: int, events: list[Event]) -> None:
        """Note how long the busiest stage took; behind the last measured step, choose."""
        each = torch.zeros(self.env.world, dtype=torch.float64, device=self.env.device)
        each[self.env.rank] = sum(e.end - e.start for e in events if e.kind.computes)
        busiest = all_reduce(each, self.mesh.world).max().item()
        if not tuner.saw(step, busiest, self.loader.global_tokens(step)):
            return
        count, text = tuner.decide()
        self.chosen = microbatches.agree(count, self.mesh)
        self.tuner = None
        self.set_microbatches(self.chosen)
        if self.env.leader:
            self.progress.say(text)
            self.job.folder.configure(self.run)

    def collect(
        self, step: int, result: StepResult, flush: float, worked: float
    ) -> tuple[dict, torch.Tensor, bool]:
        """The step's line of metrics but for its times, the loads [layers, experts], and whether
        the step stands: sums over the ranks of what this one did in `flush` seconds, of which
        `worked` on a core."""
        m, mesh, zeros = self.run.model, self.mesh, partial(torch.zeros, dtype=torch.float64)
        loads = zeros(m.moe_layers, m.num_experts, device=self.env.device)
        loss, router = zeros((), device=loads.device), zeros(2, device=loads.device)
        for chunk, layers in zip(self.chunks, self.rows):
            counts, losses = chunk.take_statistics()
            loads[layers] = counts.double()
            router += losses
        if result.losses:
            loss = torch.stack(result.losses).double().sum()
        if mesh.tp.rank > 0:  # the first speaks for all that see the same tokens
            loss, router = torch.zeros_like(loss), torch.zeros_like(router)
        busy = sum(e.end - e.start for e in result.events if e.kind.computes)
        balance, z = router
        times = self.exchanges.take()
        mine = StepSums(
            loss=loss,
            balance=balance,
            z=z,
            idle=(1 - busy / flush) / self.env.world,
            stop=float(bool(self.env.stop.signal)),
            cores=worked / (flush * cores() * mesh.nodes.count),
            border=self.exchanges.sent,
            **{name: t / flush / self.env.world for name, t in times._asdict().items()},
        )
        bound = mesh.exchange.bound
        largest = [peak_memory(self.env.device), bound.needed() if bound else 0.0]
        sums, loads, (peak, needed) = mine.over_ranks(loads, mesh, largest)
        self.stopping = sums.stop > 0
        rows = self.loader.global_tokens(step) * m.top_k * m.moe_layers
        line = {
            "step": step,
            "loss": sums.loss,
            "aux": sums.balance / m.moe_layers,
            "z": sums.z / m.moe_layers,
            "load_max_over_mean": max_over_mean(loads).max().item(),
            "rank_load_max_over_mean": self.moves.uneven(loads),
            "dead_experts": int(dead_experts(loads).sum()),
            "microbatches": self.runtime.schedule.microbatches,
            "dropped": rows - int(loads.sum()),
            "bubble": sums.idle,
            **sums.exchange(several=mesh.nodes.count > 1),
            "cores": sums.cores,
            "memory_gb": peak / 1e9,
        }
        return line, loads, bound is None or bound.fits(needed)

    def count_loads(self, step: int, loads: torch.Tensor) -> None:
        """What an applied step's loads [layers, experts] change: selection biases, and what
        experts.png shows."""
        if self.shown(step):
            self.heat += loads
        if rate := self.run.model.bias_update_rate:
            for chunk, layers in zip(self.chunks, self.rows):
                own = loads[layers].to(self.env.device)
                update_selection_biases(chunk.selection_biases, own, rate)

    def shown(self, step: int) -> bool:
        """Whether experts.png and experts.safetensors are of it, among others."""
        steps = self.run.train.steps
        return step > steps * (1 - HEAT_SHARE) or step == steps

    def flops_per_token(self, batches) -> float:
        """Of a forward and backward pass, recomputation not counted."""
        lengths = [b - a for x in batches for a, b in zip(x.cu_seqlens, x.cu_seqlens[1:])]
        tokens, squares = max(1, sum(lengths)), sum(n * n for n in lengths)
        return 3 * forward_flops(self.run.model, tokens, squares) / tokens

    def save(self, step: int) -> None:
        if self.env.leader:
            self.job.folder.sync()
        self.guard.check_state(step, self.state())
        facts = {
            "run": cfg.facts(self.run),
            "data": self.loader.state_dict(),
            "updates": self.optimizer.steps_done,
            "skipped_in_a_row": self.guard.in_a_row,
            **(self.moves.facts() | self.hot.facts()),
        }
        if self.chosen is not None:
            facts["microbatches"] = self.chosen
        self.checkpoints.save(step, self.state(), facts)

    def shared_clock(self) -> float | None:
        """A moment that all ranks of one machine agree on; None where they are on several."""
        if self.env.world == 1 or self.mesh.nodes.count > 1:
            return None
        moment = torch.tensor([time.perf_counter()], dtype=torch.float64, device=self.env.device)
        dist.broadcast(moment, 0)
        return moment.item()
