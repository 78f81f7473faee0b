// Token masks of constrained decoding: one bit for each token, -inf where it is 0.

#include "cpu_ops.h"

namespace {

constexpr int64_t kBits = 32;  // tokens in a word of the mask

// Writes bit patterns, not numbers, so that 16-bit floats need no conversion.
template <typename Bits>
void mask_row(Bits* logits,             // [vocab]
              const uint32_t* bitmask,  // [ceil(vocab / 32)]
              int64_t vocab, Bits minus_inf) {
    for (int64_t begin = 0; begin < vocab; begin += kBits) {
        const uint32_t word = bitmask[begin / kBits];
        if (word == UINT32_MAX) continue;  // all allowed
        const int64_t count = vocab - begin < kBits ? vocab - begin : kBits;
        for (int64_t bit = 0; bit < count; ++bit) {
            if (!(word >> bit & 1u)) logits[begin + bit] = minus_inf;
        }
    }
}

template <typename Bits>
void mask_rows(Bits* logits, int64_t logits_stride, const uint32_t* bitmask, int64_t bitmask_stride,
               int64_t rows, int64_t vocab, int32_t num_threads, Bits minus_inf) {
#pragma omp parallel for num_threads(num_threads) schedule(static) if (rows > 1)
    for (int64_t row = 0; row < rows; ++row) {
        mask_row(logits + row * logits_stride, bitmask + row * bitmask_stride, vocab, minus_inf);
    }
}

}  // namespace

void apply_token_mask(void* logits, int64_t logits_stride, int32_t dtype, const int32_t* bitmask,
                      int64_t bitmask_stride, int64_t rows, int64_t vocab, int32_t num_threads) {
    const uint32_t* mask = reinterpret_cast<const uint32_t*>(bitmask);
    switch (dtype) {
        case MULTILORA_F32:
            mask_rows<uint32_t>(static_cast<uint32_t*>(logits), logits_stride, mask, bitmask_stride,
                                rows, vocab, num_threads, 0xFF800000u);
            break;
        case MULTILORA_BF16:
            mask_rows<uint16_t>(static_cast<uint16_t*>(logits), logits_stride, mask, bitmask_stride,
                                rows, vocab, num_threads, 0xFF80u);
            break;
        case MULTILORA_F16:
            mask_rows<uint16_t>(static_cast<uint16_t*>(logits), logits_stride, mask, bitmask_stride,
                                rows, vocab, num_threads, 0xFC00u);
            break;
    }
}
