// The packing kernels on a GPU, beside the description of the format and beside the link.
//
//     nvcc -std=c++17 -O3 -arch=native -Iallocator bench/allocator_packing.cu -o packing && ./packing
//
// Contents of many kinds are packed and unpacked by the kernels and by csrc/packing.h, each what the other made; then
// chunks of normally distributed weights cross the link: unpacked by kernels that read host memory, and brought to
// staging by the copy engine and unpacked there. Exit code 1 when a byte differs.
#include <sys/mman.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "../allocator/kernels/pack.cu"
#include "csrc/packing.h"

#define CHECK(call)                                                                       \
  do {                                                                                    \
    const cudaError_t result = (call);                                                    \
    if (result != cudaSuccess) {                                                          \
      std::printf("%s: %s\n", #call, cudaGetErrorString(result));                         \
      std::exit(2);                                                                       \
    }                                                                                     \
  } while (0)

using Bytes = std::vector<Byte>;
constexpr std::size_t kChunk = 32u << 20;
constexpr std::size_t kChunks = 64;
constexpr double kGib = 1 << 30;

static void put(Bytes& bytes, std::size_t at, float value, unsigned rounding) {
  unsigned word;
  std::memcpy(&word, &value, sizeof word);
  const auto half = static_cast<unsigned short>((word + rounding) >> 16);
  std::memcpy(&bytes[at], &half, sizeof half);
}

static Bytes normal(std::size_t nbytes, float sigma, unsigned seed) {
  Bytes bytes(nbytes);
  std::mt19937 source(seed);
  std::normal_distribution<float> draw(0, sigma);
  for (std::size_t at = 0; at + 1 < nbytes; at += 2) put(bytes, at, draw(source), 0x8000);
  return bytes;
}

static Bytes uniform(std::size_t nbytes, float most, unsigned seed) {
  Bytes bytes(nbytes);
  std::mt19937 source(seed);
  std::uniform_real_distribution<float> draw(-most, most);
  for (std::size_t at = 0; at + 1 < nbytes; at += 2) put(bytes, at, draw(source), 0);
  return bytes;
}

static Bytes noise(std::size_t nbytes, unsigned seed) {
  Bytes bytes(nbytes);
  std::mt19937 source(seed);
  for (Byte& byte : bytes) byte = static_cast<Byte>(source() >> 7);
  return bytes;
}

static Bytes with_noise(Bytes bytes, unsigned seed) {
  std::mt19937 source(seed);
  for (std::size_t tile = 0; tile < bytes.size() / kTile; tile += 3)
    for (int i = 0; i < 500; ++i) bytes[tile * kTile + source() % kTile] = static_cast<Byte>(source());
  return bytes;
}

struct Buffers {
  Byte *data, *packed, *back, *host;
  Word* others;
  cudaEvent_t begin, end;

  Buffers() {
    for (Byte** one : {&data, &packed, &back}) CHECK(cudaMalloc(one, kChunk));
    CHECK(cudaMalloc(&others, sizeof *others));
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    void* pages = mmap(nullptr, kChunks * kChunk, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    madvise(pages, kChunks * kChunk, MADV_HUGEPAGE);
    host = static_cast<Byte*>(pages);
    std::memset(host, 1, kChunks * kChunk);
    CHECK(cudaHostRegister(host, kChunks * kChunk, cudaHostRegisterPortable));
  }

  // The least of four, in milliseconds.
  float time(const std::function<void()>& prepare, const std::function<void()>& launch) const {
    float best = 1e9f;
    for (int round = 0; round < 4; ++round) {
      prepare();
      CHECK(cudaEventRecord(begin));
      launch();
      CHECK(cudaEventRecord(end));
      CHECK(cudaDeviceSynchronize());
      float milliseconds;
      CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
      best = std::min(best, milliseconds);
    }
    return best;
  }
};

static Bytes fetched(const Byte* from, std::size_t nbytes) {
  Bytes bytes(nbytes);
  CHECK(cudaMemcpy(bytes.data(), from, nbytes, cudaMemcpyDeviceToHost));
  return bytes;
}

static bool part_is_right(const Buffers& on, const Bytes& content, std::size_t packed_nbytes) {
  const std::size_t nbytes = content.size(), from = nbytes / 3, until = nbytes - nbytes / 5;
  CHECK(cudaMemset(on.back, 0xdd, kChunk));
  rotator_unpack<<<128, kThreads>>>(on.host, packed_nbytes, nbytes, on.back, from, until);
  CHECK(cudaDeviceSynchronize());
  const Bytes back = fetched(on.back, nbytes);
  for (std::size_t i = 0; i < nbytes; ++i)
    if (back[i] != (i >= from && i < until ? content[i] : 0xdd)) return false;
  return true;
}

// Leaves what it packed in host memory. Returns its bytes, 0 where it does not fit.
static std::size_t compare(const Buffers& on, const std::string& name, const Bytes& content, bool& well) {
  const std::size_t nbytes = content.size(), limit = rotator::pack_limit(nbytes);
  if (rotator::pack_fixed_bytes(nbytes) >= limit) return 0;
  CHECK(cudaMemcpy(on.data, content.data(), nbytes, cudaMemcpyHostToDevice));
  const auto clean = [&] {
    CHECK(cudaMemset(on.others, 0, sizeof *on.others));
    CHECK(cudaMemset(on.packed, 0xee, kChunk));
  };
  const unsigned tiles = static_cast<unsigned>(rotator::pack_tiles(nbytes));
  const float packing =
      on.time(clean, [&] { rotator_pack<<<tiles, kThreads>>>(on.data, nbytes, on.packed, limit, on.others); });
  Word others;
  CHECK(cudaMemcpy(&others, on.others, sizeof others, cudaMemcpyDeviceToHost));
  const std::size_t packed_nbytes = rotator::pack_fixed_bytes(nbytes) + others;
  Bytes described(2 * kChunk);
  bool same = rotator::pack(content.data(), nbytes, described.data(), limit) == packed_nbytes;
  std::printf("%-20s %9zu  %.4f  pack %5.0f GB/s", name.c_str(), nbytes, packed_nbytes / double(nbytes),
              nbytes / packing / 1e6);
  if (packed_nbytes > limit) {
    std::printf("  taken as it is%s\n", same ? "" : "  DIFFERS");
    well = well && same;
    return 0;
  }
  const Bytes packed = fetched(on.packed, packed_nbytes);
  Bytes back(nbytes);
  rotator::unpack(packed.data(), packed_nbytes, nbytes, back.data(), 0, nbytes);
  same = same && back == content;
  const float unpacking = on.time([&] { CHECK(cudaMemset(on.back, 0xdd, kChunk)); },
                                  [&] { rotator_unpack<<<128, kThreads>>>(on.packed, packed_nbytes, nbytes, on.back, 0, nbytes); });
  same = same && fetched(on.back, nbytes) == content;
  std::memcpy(on.host, packed.data(), packed_nbytes);
  same = same && part_is_right(on, content, packed_nbytes);
  std::printf("  unpack %5.0f GB/s  %s\n", nbytes / unpacking / 1e6, same ? "same" : "DIFFERS");
  well = well && same;
  return packed_nbytes;
}

static double seconds(const std::function<void()>& work) {
  const auto begun = std::chrono::steady_clock::now();
  work();
  CHECK(cudaDeviceSynchronize());
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
}

static void over_the_link(const Buffers& on, std::size_t packed_nbytes) {
  for (std::size_t i = 1; i < kChunks; ++i) std::memcpy(on.host + i * kChunk, on.host, packed_nbytes);
  Byte* to;
  CHECK(cudaMalloc(&to, kChunks * kChunk));
  cudaStream_t streams[2];
  for (cudaStream_t& stream : streams) CHECK(cudaStreamCreate(&stream));
  const auto tell = [&](const std::string& name, double link_bytes, const std::function<void()>& work) {
    work();
    const double took = seconds(work);
    std::printf("%-44s %5.1f GiB/s of the link, %5.1f of content\n", name.c_str(), link_bytes / took / kGib,
                kChunks * kChunk / took / kGib);
  };
  tell("copy engine, not packed", kChunks * kChunk,
       [&] { CHECK(cudaMemcpyAsync(to, on.host, kChunks * kChunk, cudaMemcpyHostToDevice, streams[0])); });
  for (int count : {1, 2})
    for (int blocks : {32, 128, 264})
      tell("unpack from host memory, " + std::to_string(count) + " streams, " + std::to_string(blocks) + " blocks",
           kChunks * packed_nbytes, [&] {
             for (std::size_t i = 0; i < kChunks; ++i)
               rotator_unpack<<<blocks, kThreads, 0, streams[i % count]>>>(on.host + i * kChunk, packed_nbytes, kChunk,
                                                                          to + i * kChunk, 0, kChunk);
           });
  constexpr int kStages = 4;
  Byte* stage[kStages];
  cudaEvent_t full[kStages], empty[kStages];
  for (int i = 0; i < kStages; ++i) {
    CHECK(cudaMalloc(&stage[i], kChunk));
    CHECK(cudaEventCreateWithFlags(&full[i], cudaEventDisableTiming));
    CHECK(cudaEventCreateWithFlags(&empty[i], cudaEventDisableTiming));
  }
  tell("copy engine to staging, unpack from there", kChunks * packed_nbytes, [&] {
    for (std::size_t n = 0; n < kChunks; ++n) {
      const int i = n % kStages;
      if (n >= kStages) CHECK(cudaStreamWaitEvent(streams[0], empty[i]));
      CHECK(cudaMemcpyAsync(stage[i], on.host + n * kChunk, packed_nbytes, cudaMemcpyHostToDevice, streams[0]));
      CHECK(cudaEventRecord(full[i], streams[0]));
      CHECK(cudaStreamWaitEvent(streams[1], full[i]));
      rotator_unpack<<<128, kThreads, 0, streams[1]>>>(stage[i], packed_nbytes, kChunk, to + n * kChunk, 0, kChunk);
      CHECK(cudaEventRecord(empty[i], streams[1]));
    }
  });
}

int main() {
  const Buffers on;
  bool well = true;
  compare(on, "uniform", uniform(kChunk, 1e-3f, 3), well);
  compare(on, "zeros", Bytes(kChunk), well);
  compare(on, "ones", Bytes(kChunk, 0xff), well);
  compare(on, "noise", noise(kChunk, 4), well);
  compare(on, "normal with noise", with_noise(normal(kChunk, 0.02f, 9), 5), well);
  for (std::size_t nbytes : {8192u, 20000u, 20482u, 65536u, 786449u, 1000001u})
    compare(on, "normal", normal(nbytes, 1.0f, static_cast<unsigned>(nbytes)), well);
  over_the_link(on, compare(on, "normal", normal(kChunk, 0.02f, 1), well));
  std::printf(well ? "every byte the same\n" : "BYTES DIFFER\n");
  return well ? 0 : 1;
}
