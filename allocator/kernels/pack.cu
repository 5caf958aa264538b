// csrc/packing.h on a GPU: the format is described there. One block of threads works on one tile, 16 values a thread.
//
// rotator_pack. data: aligned to 16. out: aligned to 128, room for `limit` bytes, at least what csrc/packing.h calls
// fixed. others_bytes: zero before the launch, what the others take after it. The grid has one block a tile.
//
// rotator_unpack. packed: aligned to 16, in device memory or in registered host memory; beyond its packed_nbytes nothing
// is read, whatever it holds. to: the chunk's start, aligned to 16; only the bytes from `begin` to `end` are written. Any
// grid.
using Word = unsigned long long;
using Byte = unsigned char;

constexpr unsigned kThreads = 256;
constexpr unsigned kWarps = kThreads / 32;
constexpr unsigned kGroup = 16;
constexpr unsigned kValues = kThreads * kGroup;
constexpr unsigned kTile = 2 * kValues;
constexpr unsigned kBody = kValues + kValues * 3 / 8;
constexpr unsigned kBodyLoads = kBody / sizeof(uint4);
constexpr unsigned kSymbols = 7;
constexpr unsigned kRun = 32;  // tiles
constexpr unsigned kAll = 0xffffffffu;
constexpr Word kLowBits = 0x249249249249ull;  // the lowest bit of each of 16 codes

static __device__ __forceinline__ Word tiles_of(Word nbytes) { return (nbytes + kTile - 1) / kTile; }
static __device__ __forceinline__ Word bodies_at(Word tiles) { return (tiles * 8 + 127) / 128 * 128; }

// One of 16 values in eight words.
static __device__ __forceinline__ unsigned value_of(const unsigned* words, unsigned i) {
  return words[i / 2] >> (16 * (i % 2)) & 0xffff;
}

// How many of the lower threads' `count` there are before this one's; `total` gets all. Ends with the block in step.
static __device__ __forceinline__ unsigned count_before(unsigned count, unsigned* sums, unsigned& total) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  unsigned up_to = count;
  for (unsigned step = 1; step < 32; step *= 2) {
    const unsigned below = __shfl_up_sync(kAll, up_to, step);
    if (lane >= step) up_to += below;
  }
  if (lane == 31) sums[warp] = up_to;
  __syncthreads();
  unsigned before = up_to - count;
  total = 0;
  for (unsigned i = 0; i < kWarps; ++i) {
    if (i < warp) before += sums[i];
    total += sums[i];
  }
  return before;
}

// -- packing --

static __device__ __forceinline__ void load_group(const Byte* data, Word at, Word nbytes, unsigned* words) {
  if (at + 2 * kGroup <= nbytes) {
    const auto* from = reinterpret_cast<const uint4*>(data + at);
    *reinterpret_cast<uint4*>(words) = from[0];
    *reinterpret_cast<uint4*>(words + 4) = from[1];
    return;
  }
  for (unsigned i = 0; i < 8; ++i) words[i] = 0;
  for (unsigned i = 0; i < 2 * kGroup && at + i < nbytes; ++i) words[i / 4] |= data[at + i] << (8 * (i % 4));
}

// The lowest base whose seven exponents are the most frequent.
static __device__ __forceinline__ unsigned base_of(const unsigned* words, unsigned* counts, unsigned* best) {
  counts[threadIdx.x] = 0;
  __syncthreads();
  for (unsigned i = 0; i < kGroup; ++i) atomicAdd(&counts[value_of(words, i) >> 7 & 0xff], 1u);
  __syncthreads();
  unsigned key = 0;
  if (threadIdx.x + kSymbols <= 256) {
    for (unsigned i = 0; i < kSymbols; ++i) key += counts[threadIdx.x + i];
    key = key << 8 | (255 - threadIdx.x);
  }
  for (unsigned step = 16; step > 0; step /= 2) key = max(key, __shfl_xor_sync(kAll, key, step));
  if (threadIdx.x % 32 == 0) best[threadIdx.x / 32] = key;
  __syncthreads();
  for (unsigned i = 0; i < kWarps; ++i) key = max(key, best[i]);
  return 255 - (key & 0xff);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    rotator_pack(const Byte* data, Word nbytes, Byte* out, Word limit, Word* others_bytes) {
  __shared__ unsigned counts[256], best[kWarps], sums[kWarps];
  __shared__ Word others_at;
  const Word tile = blockIdx.x, tiles = tiles_of(nbytes);
  alignas(16) unsigned words[8];
  load_group(data, tile * kTile + threadIdx.x * 2 * kGroup, nbytes, words);
  const unsigned base = base_of(words, counts, best);

  Word codes = 0;
  alignas(16) unsigned rests[4] = {0, 0, 0, 0};
  for (unsigned i = 0; i < kGroup; ++i) {
    const unsigned value = value_of(words, i);
    const unsigned code = min((value >> 7 & 0xff) - base, kSymbols);
    codes |= static_cast<Word>(code) << (3 * i);
    rests[i / 4] |= ((value >> 8 & 0x80) | (value & 0x7f)) << (8 * (i % 4));
  }
  const Word other = codes & codes >> 1 & codes >> 2 & kLowBits;
  unsigned total;
  const unsigned before = count_before(__popcll(other), sums, total);

  if (threadIdx.x == 0) {
    const Word taken = (total + 15) / 16 * 16;
    others_at = bodies_at(tiles) + tiles * kBody + atomicAdd(others_bytes, taken);
    reinterpret_cast<Word*>(out)[tile] = others_at / 16 | static_cast<Word>(total) << 32 | static_cast<Word>(base) << 48;
    if (others_at + taken > limit) others_at = 0;  // does not fit, and the caller will see that it does not
  }
  __syncthreads();
  Byte* body = out + bodies_at(tiles) + tile * kBody;
  reinterpret_cast<uint4*>(body)[threadIdx.x] = *reinterpret_cast<const uint4*>(rests);
  auto* triple = reinterpret_cast<unsigned short*>(body + kValues) + 3 * threadIdx.x;
  for (unsigned i = 0; i < 3; ++i) triple[i] = static_cast<unsigned short>(codes >> (16 * i));
  if (others_at == 0) return;
  Byte* to = out + others_at + before;
  for (unsigned i = 0; i < kGroup; ++i)
    if (other >> (3 * i) & 1) *to++ = static_cast<Byte>(value_of(words, i) >> 7);
}

// -- unpacking --

static __device__ __forceinline__ void store_group(const unsigned* words, Byte* to, Word at, Word begin, Word end) {
  if (at >= begin && at + 2 * kGroup <= end) {
    auto* out = reinterpret_cast<uint4*>(to + at);
    __stcs(out, *reinterpret_cast<const uint4*>(words));
    __stcs(out + 1, *reinterpret_cast<const uint4*>(words + 4));
    return;
  }
  for (unsigned i = 0; i < 2 * kGroup; ++i)
    if (at + i >= begin && at + i < end) to[at + i] = static_cast<Byte>(words[i / 4] >> (8 * (i % 4)));
}

struct Loads {
  uint4 first, second, others;
};

// What one thread brings of a tile.
static __device__ __forceinline__ Loads load_tile(const Byte* packed, Word packed_nbytes, const uint4* body,
                                                   Word head) {
  Loads loads{};
  loads.first = __ldcs(body + threadIdx.x);
  if (threadIdx.x + kThreads < kBodyLoads) loads.second = __ldcs(body + kThreads + threadIdx.x);
  const Word other = (head & 0xffffffffu) + threadIdx.x;
  if (threadIdx.x * sizeof(uint4) < (head >> 32 & 0xffff) && (other + 1) * sizeof(uint4) <= packed_nbytes)
    loads.others = __ldcs(reinterpret_cast<const uint4*>(packed) + other);
  return loads;
}

// The 16 values of this thread. `others` are the tile's from this thread's first on.
static __device__ __forceinline__ void unpack_group(Word codes, uint4 rest, unsigned base, const Byte* others,
                                                    unsigned* words) {
  const unsigned rests[4] = {rest.x, rest.y, rest.z, rest.w};
  for (unsigned i = 0; i < 8; ++i) words[i] = 0;
#pragma unroll
  for (unsigned i = 0; i < kGroup; ++i) {
    const unsigned code = codes >> (3 * i) & 7, one = rests[i / 4] >> (8 * (i % 4));
    const unsigned exponent = code == kSymbols ? *others++ : base + code;
    words[i / 2] |= ((one & 0x80) << 8 | exponent << 7 | (one & 0x7f)) << (16 * (i % 2));
  }
}

// A block goes through runs of tiles, whose heads it brings at once. The next tile's loads are under way while one is
// unpacked: over the link each takes microseconds.
extern "C" __global__ void __launch_bounds__(kThreads)
    rotator_unpack(const Byte* packed, Word packed_nbytes, Word nbytes, Byte* to, Word begin, Word end) {
  __shared__ uint4 body[kBodyLoads], others[kThreads];
  __shared__ Word heads[kRun];
  __shared__ unsigned sums[kWarps];
  const auto* bodies = reinterpret_cast<const uint4*>(packed + bodies_at(tiles_of(nbytes)));
  const Word first = begin / kTile, until = tiles_of(end);
  for (Word run = first + blockIdx.x * kRun; run < until; run += gridDim.x * kRun) {
    const unsigned count = static_cast<unsigned>(min(static_cast<Word>(kRun), until - run));
    __syncthreads();
    if (threadIdx.x < count) heads[threadIdx.x] = __ldcs(reinterpret_cast<const Word*>(packed) + run + threadIdx.x);
    __syncthreads();
    Loads loads = load_tile(packed, packed_nbytes, bodies + run * kBodyLoads, heads[0]);
    for (unsigned i = 0; i < count; ++i) {
      const Word tile = run + i, head = heads[i];
      __syncthreads();  // the last tile's shared memory is not read any more
      body[threadIdx.x] = loads.first;
      if (threadIdx.x + kThreads < kBodyLoads) body[kThreads + threadIdx.x] = loads.second;
      others[threadIdx.x] = loads.others;
      if (i + 1 < count) loads = load_tile(packed, packed_nbytes, bodies + (tile + 1) * kBodyLoads, heads[i + 1]);
      __syncthreads();
      const auto* triple = reinterpret_cast<const unsigned short*>(body) + kValues / 2 + 3 * threadIdx.x;
      const Word codes = triple[0] | static_cast<Word>(triple[1]) << 16 | static_cast<Word>(triple[2]) << 32;
      unsigned total;
      const unsigned before = count_before(__popcll(codes & codes >> 1 & codes >> 2 & kLowBits), sums, total);
      alignas(16) unsigned words[8];
      unpack_group(codes, body[threadIdx.x], head >> 48 & 0xff, reinterpret_cast<const Byte*>(others) + before, words);
      store_group(words, to, tile * kTile + threadIdx.x * 2 * kGroup, begin, end);
    }
  }
}
