"""Carries out plans: builds batches, runs the model, samples. `submit` starts, `collect` waits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

import multilora_kernels as mk

from ..adapters.store import AdapterStore
from ..config.engine import EngineConfig
from ..config.lora_sites import Site
from ..device.cpu import Device
from ..device.input_buffer import InputBuffer, InputField
from ..model.forward_batch import ForwardBatch, SiteLora
from ..model.kv_cache import KVCache
from ..model.llama import Llama
from ..outputs import TokenLogprobs
from ..sampling.device import Adjuster, Choice, choose, draw_fields
from ..sampling.host import Sampled, as_logprobs, rank, sample
from ..scheduling.scheduler_output import ChunkResult, SchedulerOutput, StepResult
from .graph_runner import MAX_ON_DEMAND_TOKENS, GraphRunner, Work, batch_shapes, empty_block_table
from .request_slots import RequestSlots
from .step_inputs import ROWS, BatchShape, StepInputs, lay_out
from .warm_up import warm_up_shapes

NO_TOKEN = (
    "no token can be chosen: the model's logits are not finite, or allowed_token_ids, logit_bias "
    "and min_tokens leave none"
)


@dataclass(frozen=True, slots=True)
class StepHandle:
    """A step on its way. What it draws and scores waits for the device when it is called."""

    scheduler_output: SchedulerOutput
    step: StepInputs
    drawn: Callable[[], list[Sampled]]  # for each chunk that samples
    scored: Callable[[], list[TokenLogprobs]]  # for each prompt position that is scored


class ModelRunner:
    """The compute side of the engine: one model, one KV cache, the adapters' device pages."""

    def __init__(
        self,
        config: EngineConfig,
        device: Device,
        model: Llama,
        cache: KVCache,
        store: AdapterStore,
        sites: Mapping[str, Site],
        max_model_len: int,
    ) -> None:
        self.model, self.cache, self.store = model, cache, store
        self._config, self._device, self._sites = config, device, sites
        self._max_len = max_model_len
        max_blocks = -(-max_model_len // config.block_size)
        self._rows = RequestSlots(config.max_num_seqs, max_blocks, device)
        self._input_buffer = InputBuffer(device, _input_buffer_bytes(config, max_blocks))
        self._batched = config.is_async(device.is_cuda)
        self._side = device.side() if config.overlaps(device.is_cuda) else None
        self.graphs: GraphRunner | None = None

    # A step -----------------------------------------------------------------------------------

    @torch.inference_mode()
    def submit(self, plan: SchedulerOutput) -> StepHandle:
        """Starts a step. Chunks are laid out by slot, so that a slot's tokens lie together."""
        self._device.activate()
        with self._device.watch_compiler(serving=True):
            return self._submit(plan)

    def _submit(self, plan: SchedulerOutput) -> StepHandle:
        self._rows.take(plan)
        multiple = 1 if self.model.rows_are_independent else ROWS
        step = lay_out(plan.chunks, self._rows, self.store, self._config.block_size, multiple)
        shape = self.graphs.shape_for(step) if self.graphs is not None else None
        choices = self._choices(step)
        sent = self._send(step, shape or step.shape, choices)
        if shape is None or self.graphs is None:
            logits = self._forward(
                sent, step.shape, step.sites, sent["block_table"], pages=step.pages
            )
        else:
            logits = self.graphs.run(shape, sent, self._work(sent, shape))
        drawn = self._start_drawing(step, logits, choices, sent)
        return StepHandle(plan, step, drawn, self._start_scoring(step, logits))

    def collect(self, ticket: StepHandle) -> StepResult:
        """Waits for a step; what came of it."""
        drawn, scored = iter(ticket.drawn()), iter(ticket.scored())
        results = {}
        for chunk, wanted in zip(ticket.step.order, ticket.step.wanted, strict=True):
            sampling, prompt_logprobs = wanted.row.sampling, None
            if sampling.params.prompt_logprobs is not None:
                prompt_logprobs = [next(scored) for _ in wanted.targets]
            result = ChunkResult(chunk.row, None, None, prompt_logprobs)
            if wanted.sample_row is not None:
                found = next(drawn)
                sampling.output_ids.append(found.token)
                error = NO_TOKEN if found.failed else None
                result = ChunkResult(chunk.row, found.token, found.logprobs, prompt_logprobs, error)
            results[chunk.row] = result
        return StepResult(tuple(results[chunk.row] for chunk in ticket.scheduler_output.chunks))

    def reset(self) -> None:
        """Forgets all sequences and steps, and waits for the device. Idempotent."""
        self._device.activate()
        self._device.synchronize()
        self._rows.clear()

    @torch.inference_mode()
    def check_health(self) -> None:
        """Computes a step of one token that is stored nowhere; raises what the device raises."""
        shape = BatchShape(ROWS, 1, ROWS, 0, 0, 1, 1)
        sent = self._input_buffer.send(StepInputs.empty(shape).fields(shape))
        self._forward(sent, shape, frozenset(), empty_block_table(1, 1, self._device))
        self._device.synchronize()

    def check_integrity(self, rows: Collection[int]) -> None:
        """Asserts that it knows the sequences in these rows, and others only that are to leave."""
        assert self._rows.known >= set(rows), "a running sequence is unknown to the runner"

    def _send(
        self, step: StepInputs, shape: BatchShape, choices: list[Choice]
    ) -> dict[str, Tensor]:
        fields = step.fields(shape)
        rows = [w.sample_row for w in step.wanted if w.sample_row is not None]
        # The CPU's sampler takes rows padded like all others.
        count = len(rows) if self._batched else -(-len(rows) // ROWS) * ROWS
        fields["sample.logits"] = InputField(rows, torch.int64, (count,))
        if self._batched:
            owners = [c.row for c, w in zip(step.order, step.wanted, strict=True) if w.samples]
            fields["sample.rows"] = InputField(owners, torch.int64, (len(rows),))
            fields |= draw_fields(choices, self.model.config.vocab_size)
        # Last, since its width changes from step to step.
        fields["block_table"] = InputField(step.block_table, torch.int32, step.block_table.shape)
        return self._input_buffer.send(fields)

    def _forward(
        self,
        sent: Mapping[str, Tensor],
        shape: BatchShape,
        sites: frozenset[str],
        block_table: Tensor,  # int32 [seqs, blocks]
        *,
        gives_all_logits: bool = False,
        pages: int | None = None,  # most rank pages of a slot at one site; None = as many as may be
    ) -> Tensor:
        """Logits [rows, vocab]. Tokens that only the device knows come from `last_tokens`."""
        rows, ids = sent["token_rows"], sent["ids"]
        if self._batched:
            ids = torch.where(rows >= 0, self._rows.last_tokens[rows.clamp(min=0)], ids)
        batch = ForwardBatch(
            ids=ids,
            positions=sent["positions"],
            kv_slots=sent["kv_slots"],
            query_starts=sent["query_starts"],
            seq_lens=sent["seq_lens"],
            block_table=block_table,
            max_query_len=shape.max_query_len,
            max_seq_len=shape.max_seq_len,
            logits_rows=None if gives_all_logits else sent["logits_rows"],
            lora={name: self._site_lora(name, sent, pages) for name in sites},
            batch_invariant=self._config.batch_invariant,
            side=self._side,
        )
        with self._device.scratch():
            logits: Tensor = self.model(batch, self.cache)
        return logits

    def _site_lora(self, name: str, sent: Mapping[str, Tensor], pages: int | None) -> SiteLora:
        kind = "head" if name == "lm_head" else "tiles"
        tiles = mk.Tiles(*(sent[f"{kind}.{part}"] for part in mk.Tiles._fields))
        starts = self._sites[name].slice_starts
        return SiteLora(self.store.pool(name), self.store.table.site(name, pages), tiles, starts)

    # Sampling ---------------------------------------------------------------------------------

    def _choices(self, step: StepInputs) -> list[Choice]:
        """What the tokens of a step depend on beside its logits; counts them as sampled."""
        found = []
        for wanted in step.wanted:
            row = wanted.row
            if not wanted.samples:
                continue
            if self._batched and row.adjuster is None and row.num_choices == 0:
                vocab = self.model.config.vocab_size
                row.adjuster = Adjuster.of(row.sampling, vocab, self._device.torch)
            found.append(Choice(row.sampling, row.adjuster, row.num_sampled))
            row.num_sampled += 1
            row.num_choices += 1
        return found

    def _start_drawing(
        self,
        step: StepInputs,
        logits: Tensor,
        choices: list[Choice],
        sent: Mapping[str, Tensor],
    ) -> Callable[[], list[Sampled]]:
        if not choices:
            return list
        logits = logits[sent["sample.logits"]]
        if not self._batched:
            found = sample(logits, [choice.row for choice in choices])
            return lambda: found
        tokens, failed = choose(logits, choices, sent)
        self._rows.last_tokens.index_copy_(0, sent["sample.rows"], tokens)
        ranked = [
            part
            for i, choice in enumerate(choices)
            if choice.row.params.logprobs is not None
            for part in rank(logits[i], tokens[i : i + 1], choice.row.params.logprobs)
        ]
        on_its_way = self._device.fetch([tokens, failed, *ranked])
        return lambda: _sampled(choices, on_its_way.wait())

    def _start_scoring(self, step: StepInputs, logits: Tensor) -> Callable[[], list[TokenLogprobs]]:
        """Log probabilities of the prompt tokens that were asked for."""
        ranked: list[Tensor] = []
        for wanted in step.wanted:
            top = wanted.row.sampling.params.prompt_logprobs
            if top is None or not wanted.targets:
                continue
            targets = torch.tensor(wanted.targets, device=logits.device)
            for i, row in enumerate(wanted.prompt_rows):
                ranked += rank(logits[row], targets[i : i + 1], top)
        if not ranked:
            return list
        on_its_way = self._device.fetch(ranked)
        return lambda: _logprobs(on_its_way.wait())

    # Graphs -----------------------------------------------------------------------------------

    @torch.inference_mode()
    def capture(self, expected_bytes: int = 0) -> None:
        """From now on decode steps are captured ones; on a GPU those of every size are made.

        `expected_bytes` is what they were reckoned to keep, to be said beside what they do.
        """
        config, on_demand = self._config, self._device.captures_on_demand
        if on_demand and not self.model.rows_are_independent:
            return  # rows are padded, torch computes: there is little to win
        sizes = (
            [] if on_demand else batch_shapes(config.max_num_seqs, config.max_loras, self._max_len)
        )
        seqs = sizes[0].seqs if sizes else min(config.max_num_seqs, MAX_ON_DEMAND_TOKENS)
        self.model.rope.tables(self._max_len)  # they move when they grow
        self.graphs = GraphRunner(
            self._device,
            (name for name, site in self._sites.items() if site.in_layers),
            lambda name: self.store.pool(name).is_allocated,
            empty_block_table(seqs, -(-self._max_len // config.block_size), self._device),
            self._max_len,
            self._logits_of(sizes[0]) if sizes else None,
        )
        if sizes:
            self.graphs.capture(sizes, self._empty_step, expected_bytes)

    def _logits_of(self, largest: BatchShape) -> Tensor:
        """Where all graphs put their logits."""
        shape = (largest.logits, self.model.config.vocab_size)
        return torch.empty(shape, dtype=self.model.dtype, device=self._device.torch)

    def _empty_step(self, shape: BatchShape) -> Work:
        sent = self._input_buffer.send(StepInputs.empty(shape).fields(shape))
        return self._work(sent, shape)

    def _work(self, sent: Mapping[str, Tensor], shape: BatchShape) -> Work:
        """What is captured."""
        return lambda sites, table: self._forward(sent, shape, sites, table, gives_all_logits=True)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Has every variant of a kernel compiled that a step can need, by steps of nothing."""
        config, device = self._config, self._device
        bounds = device.row_bounds(), mk.cuda.launch_plans.seq_bounds(config.max_num_seqs)
        with self.store.stand_ins():
            for shape in warm_up_shapes(config, *bounds):
                sent = self._input_buffer.send(StepInputs.empty(shape).fields(shape))
                table = empty_block_table(shape.seqs, 1, device)
                self._forward(sent, shape, frozenset(self._sites), table)

    @torch.inference_mode()
    def profile_run(self) -> None:
        """Runs the largest step, on nothing: what it needs beside weights, pages and blocks.

        It has prompts of full length, as many as the tokens are enough for, rows for all other
        sequences, and LoRA at every site in layers with room for the largest rank. An adapted head
        needs less than the draw that follows it.
        """
        config, length = self._config, self._max_len
        tokens = min(config.max_num_batched_tokens, config.max_num_seqs * length)
        starts = [*range(0, tokens, length), tokens]
        padded, seqs = -(-tokens // ROWS) * ROWS, -(-config.max_num_seqs // ROWS) * ROWS
        tiles = mk.tile_capacity(padded, min(tokens, config.max_loras), mk.PREFILL_TILE)
        shape = BatchShape(padded, config.max_num_seqs, seqs, tiles, 0, min(tokens, length), length)
        step = StepInputs.empty(shape)
        step.query_starts = starts
        step.seq_lens = [last - first for first, last in pairwise(starts)]
        sent = self._input_buffer.send(step.fields(shape))
        blocks = -(-length // config.block_size)
        table = empty_block_table(config.max_num_seqs, blocks, self._device)
        sites = frozenset(name for name, site in self._sites.items() if site.in_layers)
        logits = self._forward(sent, shape, sites, table)
        if self._batched:
            logits.float().sort(-1)[0].double().softmax(-1)  # about what `choose` needs


def _sampled(choices: list[Choice], found: list[Tensor]) -> list[Sampled]:
    """`Sampled` of each row from tokens, failures, and the logprobs of rows that want them."""
    tokens, failed = found[0].tolist(), found[1].tolist()
    ranked = iter(_logprobs(found[2:]))
    answers = []
    for choice, token, lost in zip(choices, tokens, failed, strict=True):
        logprobs = next(ranked) if choice.row.params.logprobs is not None else None
        answers.append(Sampled(token, None if lost else logprobs, lost))
    return answers


def _logprobs(ranked: list[Tensor]) -> list[TokenLogprobs]:
    return [as_logprobs(*ranked[i : i + 3]) for i in range(0, len(ranked), 3)]


def _input_buffer_bytes(config: EngineConfig, max_blocks: int) -> int:
    """Enough for any step: per token, per sequence, and the block table."""
    tokens = config.max_num_batched_tokens + 4 * config.max_num_seqs + 8 * ROWS
    return 64 * tokens + 128 * config.max_num_seqs + 4 * config.max_num_seqs * max_blocks + 8192
