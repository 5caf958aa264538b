// Copies by the multiprocessors, over the link as well as within the device. A copy engine may be busy: the driver
// clears freed memory with one before it can be had again.
//
// to, from: aligned to 16. nbytes: a multiple of 16.
constexpr unsigned kThreads = 512;
constexpr unsigned kLoads = 4;  // in flight at once, in each thread

extern "C" __global__ void __launch_bounds__(kThreads)
    rotator_copy(uint4* to, const uint4* from, unsigned long long nbytes) {
  const unsigned long long count = nbytes / sizeof(uint4);
  const unsigned long long step = static_cast<unsigned long long>(gridDim.x) * kThreads;
  unsigned long long at = static_cast<unsigned long long>(blockIdx.x) * kThreads + threadIdx.x;
  for (; at + (kLoads - 1) * step < count; at += kLoads * step) {
    uint4 words[kLoads];
#pragma unroll
    for (unsigned i = 0; i < kLoads; ++i) words[i] = __ldcs(from + at + i * step);
#pragma unroll
    for (unsigned i = 0; i < kLoads; ++i) __stcs(to + at + i * step, words[i]);
  }
  for (; at < count; at += step) __stcs(to + at, __ldcs(from + at));
}
