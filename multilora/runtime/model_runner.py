"""Computes steps: builds batches, runs the model, samples. `submit` starts, `collect` waits."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import islice, pairwise

import torch
from torch import Tensor

import multilora_kernels as mk

from ..adapters.store import AdapterStore
from ..config.engine import EngineConfig
from ..config.lora_sites import Site
from ..device.cpu import Device
from ..device.input_buffer import InputBuffer
from ..model.forward_batch import ForwardBatch, NormRows, SiteLora
from ..model.kv_cache import KVCache
from ..model.llama import Llama
from ..sampling.device import DeviceSampler
from ..sampling.host import HostSampler
from ..sampling.logprobs import LogprobsHandle, collect_logprobs, launch_logprobs
from ..sampling.sampler import SampledToken, SampleHandle, Sampler
from ..scheduling.scheduler_output import ChunkResult, SchedulerOutput, StepResult
from .graph_runner import MAX_ON_DEMAND_TOKENS, GraphRunner, Work, batch_shapes, empty_block_table
from .request_slots import RequestSlots
from .step_inputs import ROWS, BatchShape, StepInputs, StepTensors, lay_out
from .warm_up import warm_up_shapes

NO_TOKEN = SampledToken(None, None, None)  # of a chunk that samples none


@dataclass(frozen=True, slots=True)
class StepHandle:
    """A step in flight."""

    scheduler_output: SchedulerOutput
    step: StepInputs
    sampled: SampleHandle | None  # by row of `step.rows`; None if there are none
    scored: LogprobsHandle | None  # of all prompt tokens that are scored


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
        count, size, vocab = config.max_num_seqs, config.block_size, model.config.vocab_size
        self._slots = RequestSlots(count, max_model_len, size, vocab, device.torch)
        self._input_buffer = InputBuffer(device, _input_buffer_bytes(config, max_model_len))
        self._sampler: Sampler = (
            DeviceSampler(device, count, vocab)
            if config.is_async(device.is_cuda)
            else HostSampler(device)
        )
        self._side = device.side() if config.overlaps(device.is_cuda) else None
        self.graphs: GraphRunner | None = None

    # A step -----------------------------------------------------------------------------------

    @torch.inference_mode()
    def submit(self, output: SchedulerOutput) -> StepHandle:
        """Starts a step. Chunks are laid out by slot, so that a slot's tokens lie together."""
        self._device.activate()
        with self._device.watch_compiler(serving=True):
            return self._submit(output)

    def _submit(self, output: SchedulerOutput) -> StepHandle:
        self._slots.take(output)
        multiple = 1 if self.model.rows_are_independent else ROWS
        step = lay_out(output.chunks, self._slots, self.store, multiple)
        shape = self.graphs.shape_for(step) if self.graphs is not None else None
        sampling = self._sampler.prepare(step.rows)
        sent = self._input_buffer.send(step.padded(shape or step.shape, sampling))
        if shape is None or self.graphs is None:
            logits = self._forward(sent, step.shape, step.sites, sent.block_table, pages=step.pages)
        else:
            logits = self.graphs.run(shape, sent, self._work(sent, shape))
        sampled = self._launch_sampler(step, logits, sent)
        return StepHandle(output, step, sampled, self._launch_scores(step, logits, sent))

    def _launch_sampler(
        self, step: StepInputs, logits: Tensor, sent: StepTensors
    ) -> SampleHandle | None:
        if not len(step.rows):
            return None
        own = slice(len(step.rows)) if sent.sampled_rows is None else sent.sampled_rows
        return self._sampler.launch(logits[own], step.rows, sent.sampling)

    def _launch_scores(
        self, step: StepInputs, logits: Tensor, sent: StepTensors
    ) -> LogprobsHandle | None:
        """Log probabilities of the prompt tokens that were asked for."""
        if sent.scored_rows is None or sent.scored_ids is None:
            return None
        tops = [
            top
            for top, count in zip(step.prompt_logprobs, step.num_scored, strict=True)
            if top is not None
            for _ in range(count)
        ]
        return launch_logprobs(self._device, logits[sent.scored_rows], sent.scored_ids, tops)

    def collect(self, handle: StepHandle) -> StepResult:
        """Waits for a step; its results, in the order of its chunks."""
        step = handle.step
        tokens = [] if handle.sampled is None else self._sampler.collect(handle.sampled)
        scores = [] if handle.scored is None else collect_logprobs(handle.scored)
        self._slots.append(step.rows, tokens)
        sampled, scored = iter(tokens), iter(scores)
        results = {}
        for chunk, count, top in zip(
            step.chunks, step.num_scored, step.prompt_logprobs, strict=True
        ):
            prompt_logprobs = None if top is None else list(islice(scored, count))
            found = next(sampled) if chunk.samples else NO_TOKEN
            results[chunk.request_slot] = ChunkResult(
                chunk.request_slot, found.token, found.logprobs, prompt_logprobs, found.error
            )
        asked = handle.scheduler_output.chunks
        return StepResult(tuple(results[chunk.request_slot] for chunk in asked))

    def reset(self) -> None:
        """Forgets every request slot and all that is in flight, and waits for the device.

        For after an exception, whatever `submit` or `collect` had done by then: handles from before
        are void, and the next step brings its sequences as new ones. The KV cache stays, as do the
        adapters and the graphs captured whole. Raises what the device raises; may be
        called again.
        """
        self._device.activate()
        self._device.end_captures()
        self._slots.reset()
        self._device.synchronize()
        self._input_buffer.reset()  # nothing reads a host buffer any more

    @torch.inference_mode()
    def check_health(self) -> None:
        """Computes a step of padding without adapters and waits; raises what the device raises.

        It stores nothing, and leaves steps in flight and request slots as they are.
        """
        self._device.activate()
        shape = BatchShape(ROWS, ROWS, ROWS, 0, 0, 1, 1)
        sent = self._input_buffer.send(StepInputs.empty(shape).padded(shape))
        self._forward(sent, shape, frozenset(), empty_block_table(ROWS, 1, self._device))
        self._device.synchronize()

    def check_integrity(self, request_slots: Collection[int]) -> None:
        """Asserts that it knows the sequences in these slots; others may be about to leave."""
        assert self._slots.known >= set(request_slots), "the runner lacks a running sequence"

    def _forward(
        self,
        sent: StepTensors,
        shape: BatchShape,
        sites: frozenset[str],
        block_table: Tensor,  # int32 [seqs, blocks]
        *,
        gives_all_logits: bool = False,
        pages: int | None = None,  # most rank pages of a slot at one site; None = as many as may be
    ) -> Tensor:
        """Logits [rows, vocab]. Tokens that only the device knows are the sampler's."""
        batch = ForwardBatch(
            ids=self._sampler.token_ids(sent.token_ids, sent.token_request_slots),
            positions=sent.positions,
            kv_slots=sent.kv_slots,
            query_starts=sent.query_starts,
            seq_lens=sent.seq_lens,
            block_table=block_table,
            max_query_len=shape.max_query_len,
            max_seq_len=shape.max_seq_len,
            logits_rows=None if gives_all_logits else sent.logits_tokens,
            lora={name: self._site_lora(name, sent, pages) for name in sites},
            token_slots=sent.token_slots,
            norms=self._norm_rows(sent.token_slots),
            batch_invariant=self._config.batch_invariant,
            side=self._side,
        )
        with self._device.scratch():
            logits: Tensor = self.model(batch, self.cache)
        return logits

    def _site_lora(self, name: str, sent: StepTensors, pages: int | None) -> SiteLora:
        tiles = sent.head_tiles if name == "lm_head" else sent.tiles
        assert tiles is not None, f"a step that adapts {name} has no tiles for it"
        starts = self._sites[name].slice_starts
        table, scales = self.store.table.site(name, pages), self.store.table.scales[name]
        rows = self.store.table.rows.get(name)
        rows = rows if rows is not None and rows.is_allocated else None
        return SiteLora(self.store.pool(name), table, scales, tiles, starts, rows)

    def _norm_rows(self, token_slots: Tensor | None) -> NormRows | None:
        norms = self.store.table.norms
        if token_slots is None or not norms.is_allocated:
            return None
        return NormRows(norms, norms.rows_of(token_slots))

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
            self.store.pool,
            self.store.table,
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
        return self._work(self._input_buffer.send(self._empty(shape)), shape)

    def _empty(self, shape: BatchShape) -> StepTensors:
        """A step of nothing, with what the adapters there are ask for."""
        has_slots = shape.tiles > 0 and self.store.needs_token_slots
        return StepInputs.empty(shape, has_token_slots=has_slots).padded(shape)

    def _work(self, sent: StepTensors, shape: BatchShape) -> Work:
        """What is captured."""
        return lambda sites, table: self._forward(sent, shape, sites, table, gives_all_logits=True)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Has every variant of a kernel compiled that a step can need, by steps of nothing."""
        config, device = self._config, self._device
        bounds = device.row_bounds(), mk.cuda.launch_plans.seq_bounds(config.max_num_seqs)
        with self.store.stand_ins():
            for shape in warm_up_shapes(config, *bounds):
                sent = self._input_buffer.send(self._empty(shape))
                table = empty_block_table(shape.seqs, 1, device)
                self._forward(sent, shape, frozenset(self._sites), table)
            # Norms of adapters are another variant than those of the base alone.
            self.check_health()

    @torch.inference_mode()
    def profile_run(self) -> None:
        """Runs the largest step, on nothing: what it needs beside weights, pages and blocks.

        It has prompts of full length, as many as the tokens are enough for, rows for all other
        sequences, and LoRA at every site in layers with room for the largest rank. An adapted head
        needs less than the sampling that follows it.
        """
        config, length = self._config, self._max_len
        tokens = min(config.max_num_batched_tokens, config.max_num_seqs * length)
        starts = [*range(0, tokens, length), tokens]
        padded, seqs = -(-tokens // ROWS) * ROWS, -(-config.max_num_seqs // ROWS) * ROWS
        tiles = mk.tile_capacity(padded, min(tokens, config.max_loras), mk.PREFILL_TILE)
        shape = BatchShape(padded, config.max_num_seqs, seqs, tiles, 0, min(tokens, length), length)
        tensors = self._empty(shape)
        tensors.query_starts[: len(starts)] = torch.tensor(starts)
        tensors.query_starts[len(starts) :] = tokens
        for i, (first, last) in enumerate(pairwise(starts)):
            tensors.seq_lens[i] = last - first
        sent = self._input_buffer.send(tensors)
        blocks = -(-length // config.block_size)
        table = empty_block_table(config.max_num_seqs, blocks, self._device)
        sites = frozenset(name for name, site in self._sites.items() if site.in_layers)
        logits = self._forward(sent, shape, sites, table)
        self._sampler.profile(logits)


def _input_buffer_bytes(config: EngineConfig, max_model_len: int) -> int:
    """Enough for any step: per token, per sequence, and the block table."""
    tokens = config.max_num_batched_tokens + 4 * config.max_num_seqs + 8 * ROWS
    blocks = config.max_num_seqs * -(-max_model_len // config.block_size)
    return 84 * tokens + 128 * config.max_num_seqs + 4 * blocks + 8192
