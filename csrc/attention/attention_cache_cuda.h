// SPDX-License-Identifier: Apache-2.0
// Decoding and appending on a CUDA device (attention.h has the mathematics). They put kernels on the
// stream and return; nothing is allocated, copied to the host or waited for. Scratch memory comes
// from the caller. attention_cache_nocuda.cc stands in where no CUDA compiler was.
//
// Where the keys lie is read on the device, so nobody can refuse what is out of range before it is
// used: a sequence whose length, row or padding is, or that sees a key in a page that does not
// exist, gets NaN in its results and lse; nothing of it is appended beyond its cache, and nothing
// outside of the arrays is read or written.
//
// Keys are split over blocks by the sequence's length and the numbers of sequences, heads and
// queries, so bits depend neither on the device nor on the cache's layout. p is rounded to the
// values' dtype before it meets them, for bf16 and f16; all sums are fp32.
#pragma once
#include <cstdint>

#include "attention/attention.h"
#include "common/cuda_stream.h"

namespace pentad::attention::cuda {

// int32 or int64 numbers in the device's memory; data null: not given.
struct Integers {
  const void* data = nullptr;
  bool wide = false;
  int64_t stride = 1;
};

// In place of the lists of a Problem, which lie in the host's memory.
struct Caches {
  Integers lengths;                // (batch), in use; for append without the new ones
  Integers rows, left_pad;         // (batch)
  const int32_t* table = nullptr;  // (batch, pages_per_sequence)
  int64_t table_stride[2] = {};
  int64_t page_size = 0, pages_per_sequence = 0;  // with a table
  int64_t cache_rows = 0;                         // that there are, or pages
  int64_t capacity = 0;                           // positions of a row, or of a table's pages
};

// Of q's dtype f32, bf16 or f16. Of the problem: the sizes, q, k, v, scale, softcap, left and right,
// bias, key_bias, alibi and sink, max_k being the capacity; its lists, dropout and mask are unused.
int64_t decode_scratch(int64_t batch, int64_t heads, int64_t kv_heads, int64_t queries,
                       int64_t capacity, int64_t value_dim, int64_t element_bytes);
void decode(const CudaStream& stream, const Problem& problem, const Caches& caches,
            const Outputs& outputs, void* scratch);

// k_new, v_new (b, h, t, d) behind the lengths in problem.k and problem.v, f32, bf16 or f16. Where
// two sequences write to one place, either's tokens lie there.
void append(const CudaStream& stream, const Problem& problem, const Caches& caches,
            const Operand& k_new, const Operand& v_new, int64_t new_tokens);

}  // namespace pentad::attention::cuda
