// What index arrays may name. Each function reads its arrays once and nothing that they point at.

#pragma once

#include "abi.h"

namespace {

bool within(int64_t value, int64_t least, int64_t end) { return value >= least && value < end; }

template <typename Args>
bool has_good_tiles(const Args& g) {
    if (!within(*g.num_tiles, 0, g.tiles + 1)) return false;
    int64_t end = 0;  // of the tile before: two threads must not have one row
    for (int64_t tile = 0; tile < *g.num_tiles; ++tile) {
        const int64_t start = g.tile_starts[tile], rows = g.tile_lens[tile];
        if (!within(g.tile_slots[tile], 0, g.slots) || start < end || rows < 0 ||
            start + rows > g.tokens)
            return false;
        end = start + rows;
    }
    return true;
}

int32_t check(const LoraArgs& g) {
    if (!has_good_tiles(g)) return MULTILORA_BAD_TILES;
    for (int64_t tile = 0; tile < *g.num_tiles; ++tile) {
        const int64_t slot = g.tile_slots[tile], start = g.tile_starts[tile];
        const int64_t rows = g.tile_lens[tile];
        if (!within(g.num_pages[slot], 0, g.max_pages + 1)) return MULTILORA_BAD_PAGES;
        for (int64_t page = 0; page < g.num_pages[slot]; ++page) {
            if (!within(g.page_ids[slot * g.table_stride + page], 0, g.pages))
                return MULTILORA_BAD_PAGES;
        }
        if (g.scale_row != nullptr && !within(g.scale_row[slot], -1, g.scale_rows))
            return MULTILORA_BAD_PAGES;
        for (int64_t row = start; g.ids != nullptr && row < start + rows; ++row) {
            if (!within(g.ids[row], 0, g.in_)) return MULTILORA_BAD_IDS;
        }
    }
    return MULTILORA_OK;
}

int32_t check(const ColumnsArgs& g) {
    if (!has_good_tiles(g)) return MULTILORA_BAD_TILES;
    for (int64_t tile = 0; tile < *g.num_tiles; ++tile) {
        const int64_t slot = g.tile_slots[tile];
        if (!within(g.num_columns[slot], 0, g.max_columns + 1)) return MULTILORA_BAD_PAGES;
        for (int64_t column = 0; column < g.num_columns[slot]; ++column) {
            if (!within(g.column_ids[slot * g.max_columns + column], 0, g.out))
                return MULTILORA_BAD_IDS;
        }
    }
    return MULTILORA_OK;
}

int32_t check(const NormArgs& g) {
    for (int64_t token = 0; g.change_row != nullptr && token < g.tokens; ++token) {
        if (!within(g.change_row[token], -1, g.change_rows)) return MULTILORA_BAD_PAGES;
    }
    return MULTILORA_OK;
}

int32_t check(const AttentionArgs& g) {
    if (!within(g.query_starts[0], 0, g.tokens + 1)) return MULTILORA_BAD_QUERIES;
    for (int64_t seq = 0; seq < g.seqs; ++seq) {
        const int64_t first = g.query_starts[seq], end = g.query_starts[seq + 1];
        const int64_t length = g.seq_lens[seq];
        if (first < 0 || end < first || end > g.tokens) return MULTILORA_BAD_QUERIES;
        if (length < end - first || length > g.max_blocks * g.block_size)
            return MULTILORA_BAD_LENGTHS;
        const int32_t* table = g.block_table + seq * g.max_blocks;
        for (int64_t block = 0; block * g.block_size < length && end > first; ++block) {
            if (!within(table[block], 0, g.blocks)) return MULTILORA_BAD_BLOCKS;
        }
    }
    return MULTILORA_OK;
}

int32_t check(const RopeArgs& g) {
    for (int64_t token = 0; token < g.tokens; ++token) {
        if (!within(g.positions[token], 0, g.max_position)) return MULTILORA_BAD_POSITIONS;
        if (!within(g.kv_slots[token], -1, g.blocks * g.block_size)) return MULTILORA_BAD_SLOTS;
    }
    return MULTILORA_OK;
}

int32_t check(const TopArgs& g) {
    for (int64_t row = 0; row < g.rows; ++row) {
        if (!within(g.targets[row], 0, g.vocab)) return MULTILORA_BAD_IDS;
    }
    return MULTILORA_OK;
}

// The others have no index arrays.
template <typename Args>
int32_t check(const Args&) {
    return MULTILORA_OK;
}

// Multiply-adds of a call, about, of arguments that are checked.
int64_t work_of(const LoraArgs& g) {
    int64_t rows = 0;
    for (int64_t tile = 0; tile < *g.num_tiles; ++tile)
        rows += 8 * g.tile_lens[tile] * g.num_pages[g.tile_slots[tile]];
    return rows * ((g.ids == nullptr ? g.slices * g.in_ : 0) + g.out);
}

int64_t work_of(const ColumnsArgs& g) {
    int64_t columns = 0;
    for (int64_t tile = 0; tile < *g.num_tiles; ++tile)
        columns += g.tile_lens[tile] * g.num_columns[g.tile_slots[tile]];
    return columns * g.in_;
}

int64_t work_of(const AttentionArgs& g) {
    int64_t pairs = 0;
    for (int64_t seq = 0; seq < g.seqs; ++seq)
        pairs += (g.query_starts[seq + 1] - g.query_starts[seq]) * g.seq_lens[seq];
    return 2 * pairs * g.heads * g.head_dim;
}

int64_t work_of(const RopeArgs& g) { return 2 * g.tokens * (g.heads + g.kv_heads) * g.head_dim; }

int64_t work_of(const SiluArgs& g) { return 8 * g.tokens * g.inter; }

int64_t work_of(const NormArgs& g) { return 4 * g.tokens * g.hidden; }

int64_t work_of(const LinearArgs& g) { return g.rows * g.in_ * g.out; }

int64_t work_of(const MaskArgs& g) { return 2 * g.rows * g.vocab; }

int64_t work_of(const TopArgs& g) { return 8 * g.rows * g.vocab; }

int64_t work_of(const DrawArgs& g) { return 32 * g.rows * g.vocab; }

}  // namespace
