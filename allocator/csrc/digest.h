// A position-dependent 128-bit digest: swapped words, a flipped bit and a shifted block all change it. It decides
// whether device memory still equals its master, so both sides must compute exactly this.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace rotator {

struct Digest {
  uint64_t words[2] = {0, 0};
  bool operator==(const Digest& other) const { return words[0] == other.words[0] && words[1] == other.words[1]; }
};

inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

// Each word is mixed with its own position, then summed: terms are independent, so a GPU may add them in any order.
inline Digest digest_of(const void* data, std::size_t nbytes) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  Digest digest{{nbytes, ~static_cast<uint64_t>(nbytes)}};
  for (std::size_t at = 0; at < nbytes; at += 8) {
    uint64_t word = 0;
    std::memcpy(&word, bytes + at, nbytes - at < 8 ? nbytes - at : 8);
    const uint64_t position = at * 0x9e3779b97f4a7c15ULL;
    digest.words[0] += mix(word ^ mix(position + 1));
    digest.words[1] += mix(word + mix(position ^ 0xd1b54a32d192ed03ULL));
  }
  return digest;
}

}  // namespace rotator
