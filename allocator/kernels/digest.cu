// The digest of csrc/digest.h on a GPU, for many chunks in one launch. `build.sh` beside this makes digest.ptx of it.
//
// data: device address, aligned to 16. nbytes: all of it. chunk_bytes: a multiple of kTile; the last chunk may be
// shorter. out: two 64-bit words a chunk, zero before the launch. One block of threads sums one tile; the grid has
// ceil(nbytes / kTile) of them.
using Word = unsigned long long;

constexpr unsigned kThreads = 256;
constexpr unsigned kBlock = 16;
constexpr unsigned kLoads = 8;    // in flight at once
constexpr unsigned kRounds = 2;
constexpr unsigned kTile = kThreads * kBlock * kLoads * kRounds;  // 64 KiB

struct Sums {
  Word first = 0, second = 0;
};

static __device__ __forceinline__ Word fold(Word a, Word b) { return (a * b) ^ __umul64hi(a, b); }

static __device__ __forceinline__ void add(Sums& sums, ulonglong2 word, Word position) {
  const Word key0 = 0x9e3779b97f4a7c15ULL + position * 0xbf58476d1ce4e5b9ULL;
  const Word key1 = 0xd1b54a32d192ed03ULL + position * 0x94d049bb133111ebULL;
  const Word key2 = 0xaef17502108ef2d9ULL + position * 0xda942042e4dd58b5ULL;
  const Word key3 = 0x8bb84b93962eacc9ULL + position * 0xe7037ed1a0b428dbULL;
  sums.first += fold(word.x ^ key0, word.y ^ key1);
  sums.second += fold(word.x ^ key2, word.y ^ key3);
}

static __device__ __forceinline__ void add_whole_tile(Sums& sums, const unsigned char* tile, Word position) {
  const auto* blocks = reinterpret_cast<const ulonglong2*>(tile) + threadIdx.x;
#pragma unroll
  for (unsigned round = 0; round < kRounds; ++round) {
    ulonglong2 words[kLoads];
#pragma unroll
    for (unsigned i = 0; i < kLoads; ++i) words[i] = __ldcs(blocks + (round * kLoads + i) * kThreads);
#pragma unroll
    for (unsigned i = 0; i < kLoads; ++i)
      add(sums, words[i], position + threadIdx.x + (round * kLoads + i) * kThreads);
  }
}

// The last tile: byte by byte, padded with zeros to whole blocks.
static __device__ __noinline__ void add_partial_tile(Sums& sums, const unsigned char* tile, Word nbytes,
                                                     Word position) {
  for (Word block = threadIdx.x; block * kBlock < nbytes; block += kThreads) {
    Word low = 0, high = 0;
    for (Word i = 0; i < kBlock && block * kBlock + i < nbytes; ++i) {
      const Word byte = tile[block * kBlock + i];
      if (i < 8) low |= byte << (8 * i);
      if (i >= 8) high |= byte << (8 * (i - 8));
    }
    add(sums, {low, high}, position + block);
  }
}

static __device__ __forceinline__ Word warp_sum(Word value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_down_sync(0xffffffffu, value, lanes);
  return value;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    rotator_digest(const unsigned char* data, Word nbytes, Word chunk_bytes, Word* out) {
  const Word at = static_cast<Word>(blockIdx.x) * kTile;
  const Word chunk = at / chunk_bytes;
  const Word position = (at - chunk * chunk_bytes) / kBlock;
  Sums sums;
  if (nbytes - at >= kTile) {
    add_whole_tile(sums, data + at, position);
  } else {
    add_partial_tile(sums, data + at, nbytes - at, position);
  }
  __shared__ Word partial[2][kThreads / 32];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  sums.first = warp_sum(sums.first);
  sums.second = warp_sum(sums.second);
  if (lane == 0) {
    partial[0][warp] = sums.first;
    partial[1][warp] = sums.second;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (unsigned i = 1; i < kThreads / 32; ++i) {
    sums.first += partial[0][i];
    sums.second += partial[1][i];
  }
  atomicAdd(&out[2 * chunk], sums.first);
  atomicAdd(&out[2 * chunk + 1], sums.second);
}
