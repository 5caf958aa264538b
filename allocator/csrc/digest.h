// A position-dependent 128-bit digest of one chunk of memory: swapped words, a flipped bit and a shifted block all
// change it. It decides whether device memory still equals its master, so the GPU's kernel (kernels/digest.cu), the
// simulated driver and the host compute exactly this.
//
// A chunk is read as blocks of two little-endian 64-bit words, the last one padded with zeros. Each block is folded
// from two 64 x 64 -> 128 bit products with keys that depend on its position, and the folds are summed: terms are
// independent, so a GPU may add them in any order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace rotator {

struct Digest {
  uint64_t words[2] = {0, 0};
  bool operator==(const Digest& other) const { return words[0] == other.words[0] && words[1] == other.words[1]; }
  bool operator!=(const Digest& other) const { return !(*this == other); }
};

constexpr std::size_t kDigestBlock = 16;

// Starts and steps of the four key sequences: key(i) = start + i * step. Odd 64-bit constants without structure.
constexpr uint64_t kDigestStart[4] = {0x9e3779b97f4a7c15ULL, 0xd1b54a32d192ed03ULL, 0xaef17502108ef2d9ULL,
                                      0x8bb84b93962eacc9ULL};
constexpr uint64_t kDigestStep[4] = {0xbf58476d1ce4e5b9ULL, 0x94d049bb133111ebULL, 0xda942042e4dd58b5ULL,
                                     0xe7037ed1a0b428dbULL};

inline uint64_t digest_fold(uint64_t a, uint64_t b) {
  __extension__ using Wide = unsigned __int128;
  const Wide product = static_cast<Wide>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

struct DigestKeys {
  uint64_t key[4];
  explicit DigestKeys(uint64_t block) {
    for (int i = 0; i < 4; ++i) key[i] = kDigestStart[i] + block * kDigestStep[i];
  }
  void add(Digest& sum, const unsigned char* block) {
    uint64_t word[2];
    std::memcpy(word, block, kDigestBlock);
    sum.words[0] += digest_fold(word[0] ^ key[0], word[1] ^ key[1]);
    sum.words[1] += digest_fold(word[0] ^ key[2], word[1] ^ key[3]);
    for (int i = 0; i < 4; ++i) key[i] += kDigestStep[i];
  }
};

// What the bytes at `offset` (whole blocks) of a chunk add to its digest: parts may be summed in any order.
inline Digest digest_part(const void* data, std::size_t nbytes, std::size_t offset) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  DigestKeys keys(offset / kDigestBlock);
  Digest sum;
  const std::size_t whole = nbytes - nbytes % kDigestBlock;
  for (std::size_t at = 0; at < whole; at += kDigestBlock) keys.add(sum, bytes + at);
  if (whole == nbytes) return sum;
  unsigned char last[kDigestBlock] = {};
  std::memcpy(last, bytes + whole, nbytes - whole);
  keys.add(sum, last);
  return sum;
}

inline Digest digest_of(const void* data, std::size_t nbytes) { return digest_part(data, nbytes, 0); }

}  // namespace rotator
