// Masters of bf16 weights in fewer bytes, without loss, so that less crosses the link and stays in host memory.
//
// Trained weights use few exponents: about 2.6 bits' worth of the 8 (arXiv 2504.11651, DFloat11). A chunk is read as
// 16-bit values, whatever it holds, and cut into tiles of 4096. In each tile the seven neighbouring exponents that are
// most frequent have codes of 3 bits, counted from the tile's base; the eighth code says that the exponent is among the
// tile's others. Sign and mantissa stay as they are. Codes of one length keep tiles independent and unpacking as fast as
// memory: a tile of normally distributed weights takes 11.2 of 16 bits, where codes of any length would need 10.5.
//
//   heads    8 bytes a tile: where its others are (uint32, in units of 16 bytes from the start), how many (uint16), base
//   bodies   5632 bytes a tile, from a multiple of 128 on: signs and mantissas (4096), codes (48 bits for 16 values)
//   others   exponents, a byte each; a tile's begin at a multiple of 16, tiles in any order
//
// kernels/pack.cu computes the same on a GPU, the simulated driver does it here.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "csrc/ranges.h"

namespace rotator {

constexpr std::size_t kPackValues = 4096;
constexpr std::size_t kPackTile = 2 * kPackValues;
constexpr std::size_t kPackGroup = 16;  // values that share one word of codes
constexpr std::size_t kPackBody = kPackValues + kPackValues * 3 / 8;
constexpr std::size_t kPackAlign = 128;
constexpr std::size_t kPackUnit = 16;
constexpr unsigned kPackSymbols = 7;

struct PackHead {
  uint32_t others_at;
  uint16_t others;
  uint8_t base;
  uint8_t unused;
};
static_assert(sizeof(PackHead) == 8);

inline std::size_t pack_tiles(std::size_t nbytes) { return (nbytes + kPackTile - 1) / kPackTile; }
inline std::size_t pack_bodies_at(std::size_t nbytes) {
  return round_up(pack_tiles(nbytes) * sizeof(PackHead), kPackAlign);
}
// Without the others.
inline std::size_t pack_fixed_bytes(std::size_t nbytes) {
  return pack_bodies_at(nbytes) + pack_tiles(nbytes) * kPackBody;
}
// What packing must stay within to be worth it.
inline std::size_t pack_limit(std::size_t nbytes) { return nbytes - nbytes / 16; }

inline unsigned pack_exponent(uint16_t value) { return value >> 7 & 0xff; }
inline uint8_t pack_rest(uint16_t value) { return static_cast<uint8_t>((value >> 8 & 0x80) | (value & 0x7f)); }
inline uint16_t pack_value(unsigned exponent, uint8_t rest) {
  return static_cast<uint16_t>((rest & 0x80) << 8 | exponent << 7 | (rest & 0x7f));
}

// The lowest base whose seven exponents are the most frequent.
inline unsigned pack_base(const uint16_t* values) {
  unsigned counts[256] = {};
  for (std::size_t i = 0; i < kPackValues; ++i) ++counts[pack_exponent(values[i])];
  unsigned best = 0, most = 0;
  for (unsigned base = 0; base + kPackSymbols <= 256; ++base) {
    unsigned sum = 0;
    for (unsigned i = 0; i < kPackSymbols; ++i) sum += counts[base + i];
    if (sum > most) {
      most = sum;
      best = base;
    }
  }
  return best;
}

// Packs one tile. Returns its others.
inline std::vector<uint8_t> pack_tile(const uint16_t* values, unsigned base, unsigned char* body) {
  std::vector<uint8_t> others;
  for (std::size_t group = 0; group < kPackValues / kPackGroup; ++group) {
    uint64_t codes = 0;
    for (std::size_t i = 0; i < kPackGroup; ++i) {
      const uint16_t value = values[group * kPackGroup + i];
      const unsigned exponent = pack_exponent(value);
      const unsigned code = exponent - base < kPackSymbols ? exponent - base : kPackSymbols;
      if (code == kPackSymbols) others.push_back(static_cast<uint8_t>(exponent));
      codes |= static_cast<uint64_t>(code) << (3 * i);
      body[group * kPackGroup + i] = pack_rest(value);
    }
    std::memcpy(body + kPackValues + 6 * group, &codes, 6);
  }
  return others;
}

inline void unpack_tile(const unsigned char* body, const uint8_t* others, unsigned base, uint16_t* values) {
  for (std::size_t group = 0; group < kPackValues / kPackGroup; ++group) {
    uint64_t codes = 0;
    std::memcpy(&codes, body + kPackValues + 6 * group, 6);
    for (std::size_t i = 0; i < kPackGroup; ++i) {
      const unsigned code = codes >> (3 * i) & 7;
      const unsigned exponent = code == kPackSymbols ? *others++ : base + code;
      values[group * kPackGroup + i] = pack_value(exponent, body[group * kPackGroup + i]);
    }
  }
}

// Packs `nbytes` into at most `limit` bytes at `out`. Returns how many it takes; if that is more than the limit, `out`
// holds nothing of use. pack_fixed_bytes(nbytes) must be within the limit.
inline std::size_t pack(const unsigned char* data, std::size_t nbytes, unsigned char* out, std::size_t limit) {
  std::size_t at = pack_fixed_bytes(nbytes);
  for (std::size_t tile = 0; tile < pack_tiles(nbytes); ++tile) {
    uint16_t values[kPackValues] = {};
    std::memcpy(values, data + tile * kPackTile, std::min(kPackTile, nbytes - tile * kPackTile));
    const unsigned base = pack_base(values);
    const auto others = pack_tile(values, base, out + pack_bodies_at(nbytes) + tile * kPackBody);
    const PackHead head{static_cast<uint32_t>(at / kPackUnit), static_cast<uint16_t>(others.size()),
                        static_cast<uint8_t>(base), 0};
    std::memcpy(out + tile * sizeof head, &head, sizeof head);
    const std::size_t end = at + round_up(others.size(), kPackUnit);
    if (end <= limit && !others.empty()) std::memcpy(out + at, others.data(), others.size());
    at = end;
  }
  return at;
}

// A tile's others, zeros where they are not within what is packed: whatever it holds, nothing beyond it is read.
inline std::vector<uint8_t> pack_others(const unsigned char* packed, std::size_t packed_nbytes, const PackHead& head) {
  std::vector<uint8_t> others(kPackValues);
  const std::size_t at = std::min(std::size_t{head.others_at} * kPackUnit, packed_nbytes);
  const std::size_t count = std::min({std::size_t{head.others}, packed_nbytes - at, kPackValues});
  std::memcpy(others.data(), packed + at, count);
  return others;
}

// Writes the bytes from `begin` to `end` of the chunk of `nbytes` that was packed, where `to` is the chunk's start.
inline void unpack(const unsigned char* packed, std::size_t packed_nbytes, std::size_t nbytes, unsigned char* to,
                   std::size_t begin, std::size_t end) {
  for (std::size_t tile = begin / kPackTile; tile * kPackTile < end; ++tile) {
    PackHead head;
    std::memcpy(&head, packed + tile * sizeof head, sizeof head);
    uint16_t values[kPackValues];
    const auto others = pack_others(packed, packed_nbytes, head);
    unpack_tile(packed + pack_bodies_at(nbytes) + tile * kPackBody, others.data(), head.base, values);
    const std::size_t start = tile * kPackTile;
    const std::size_t from = std::max(begin, start), until = std::min(end, start + kPackTile);
    std::memcpy(to + from, reinterpret_cast<unsigned char*>(values) + (from - start), until - from);
  }
}

}  // namespace rotator
