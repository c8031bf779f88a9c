// SPDX-License-Identifier: Apache-2.0
#include "pq/codes.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/ceil_div.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace pentad::pq {
namespace {

constexpr int64_t kRows = 4096;  // of a piece

// task(first, last) for pieces of the rows.
void for_rows(int64_t rows, const std::function<void(int64_t, int64_t)>& task) {
  if (rows <= kRows) {
    if (rows) task(0, rows);
    return;
  }
  parallel_for(ceil_div(rows, kRows),
               [&](int64_t i) { task(i * kRows, std::min(rows, (i + 1) * kRows)); });
}

uint64_t mix(uint64_t x) {
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

// Any integer modulo 2^64.
template <class T>
void ids_typed(const Codes& ids, int64_t first, int64_t last, uint64_t* out) {
  const T* data = static_cast<const T*>(ids.data);
  for (int64_t i = first; i < last; ++i)
    out[i - first] = static_cast<uint64_t>(static_cast<int64_t>(data[i * ids.row_stride]));
}

void ids_of(const Codes& ids, int64_t first, int64_t last, uint64_t* out) {
  switch (ids.dtype) {
    case DType::u8: return ids_typed<uint8_t>(ids, first, last, out);
    case DType::i8: return ids_typed<int8_t>(ids, first, last, out);
    case DType::u16: return ids_typed<uint16_t>(ids, first, last, out);
    case DType::i16: return ids_typed<int16_t>(ids, first, last, out);
    case DType::u32: return ids_typed<uint32_t>(ids, first, last, out);
    case DType::i32: return ids_typed<int32_t>(ids, first, last, out);
    default: return ids_typed<int64_t>(ids, first, last, out);
  }
}

}  // namespace

void pack_codes(const char* op, const Codes& codes, int nbits, uint8_t* packed) {
  const int64_t columns = codes.columns, bytes = ceil_div(columns * nbits, 8);
  const std::vector<int64_t> sizes(std::max<int64_t>(columns, 1), int64_t{1} << nbits);
  std::atomic<bool> bad{false};
  for_rows(codes.rows, [&](int64_t first, int64_t last) {
    Scratch<int32_t> scratch((last - first) * columns);
    const int32_t* code = scratch.get();
    const char* data =
        static_cast<const char*>(codes.data) + first * codes.row_stride * size_of(codes.dtype);
    if (!lookup_kernels().read_codes({data, codes.dtype, last - first, columns, codes.row_stride,
                                      codes.column_stride, sizes.data(), true, scratch.get()}))
      bad = true;
    uint8_t* out = packed + first * bytes;
    for (int64_t i = first; i < last; ++i) {
      uint32_t bits = 0;
      int held = 0;
      for (int64_t m = 0; m < columns; ++m) {
        bits |= static_cast<uint32_t>(*code++) << held;
        for (held += nbits; held >= 8; held -= 8, bits >>= 8) *out++ = static_cast<uint8_t>(bits);
      }
      if (held) *out++ = static_cast<uint8_t>(bits);
    }
  });
  if (!bad) return;
  refuse_codes(op, codes, sizes.data());
  throw std::invalid_argument("[" + std::string(op) + "] codes changed during the call");
}

void unpack_codes(const uint8_t* packed, int64_t row_stride, int64_t stride, int64_t rows,
                  int64_t columns, int nbits, void* out) {
  const uint32_t mask = (1u << nbits) - 1;
  for_rows(rows, [&](int64_t first, int64_t last) {
    const auto write = [&](auto* to) {
      for (int64_t i = first; i < last; ++i) {
        const uint8_t* from = packed + i * row_stride;
        uint32_t bits = 0;
        int held = 0;
        for (int64_t m = 0; m < columns; ++m, bits >>= nbits, held -= nbits) {
          for (; held < nbits; held += 8, from += stride)
            bits |= static_cast<uint32_t>(*from) << held;
          to[i * columns + m] = bits & mask;
        }
      }
    };
    if (nbits <= 8) write(static_cast<uint8_t*>(out));
    else write(static_cast<int32_t*>(out));
  });
}

void hash_codes(const Codes& ids, const uint64_t* seeds, const int64_t* sizes, int64_t count,
                int64_t* out) {
  std::vector<uint64_t> keys(count);
  for (int64_t h = 0; h < count; ++h) keys[h] = mix(seeds[h] + 0x9e3779b97f4a7c15);
  for_rows(ids.rows, [&](int64_t first, int64_t last) {
    Scratch<uint64_t> id(last - first);
    ids_of(ids, first, last, id.get());
    for (int64_t i = first; i < last; ++i)
      for (int64_t h = 0; h < count; ++h) {
        const uint64_t high = mix(id.get()[i - first] + keys[h]) >> 32;
        out[i * count + h] = static_cast<int64_t>(high * static_cast<uint64_t>(sizes[h]) >> 32);
      }
  });
}

void digits(const char* op, const Codes& ids, const int64_t* sizes, int64_t count, int64_t* out) {
  // Of the sizes, at most 2^63: negative ids lie beyond that.
  uint64_t product = 1;
  for (int64_t h = 0; h < count; ++h) {
    const uint64_t size = static_cast<uint64_t>(sizes[h]);
    product = product > (uint64_t{1} << 63) / size ? uint64_t{1} << 63 : product * size;
  }
  std::atomic<int64_t> bad{-1};
  for_rows(ids.rows, [&](int64_t first, int64_t last) {
    Scratch<uint64_t> id(last - first);
    ids_of(ids, first, last, id.get());
    for (int64_t i = first; i < last; ++i) {
      uint64_t rest = id.get()[i - first];
      if (rest >= product) {
        int64_t known = bad;
        while ((known < 0 || i < known) && !bad.compare_exchange_weak(known, i)) {
        }
      }
      for (int64_t h = 0; h < count; ++h) {
        out[i * count + h] = static_cast<int64_t>(rest % static_cast<uint64_t>(sizes[h]));
        rest /= static_cast<uint64_t>(sizes[h]);
      }
    }
  });
  if (bad < 0) return;
  uint64_t id = 0;
  ids_of(ids, bad, bad + 1, &id);
  const std::string text =
      ids.dtype == DType::u64 ? std::to_string(id) : std::to_string(static_cast<int64_t>(id));
  throw std::invalid_argument("[" + std::string(op) + "] ids hold " + text + " in place " +
                              std::to_string(bad) + ", expected 0 to " +
                              std::to_string(product - 1) + ", the sizes multiplied, less one");
}

}  // namespace pentad::pq
