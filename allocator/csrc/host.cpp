#include "csrc/host.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <string>
#include <thread>

#include "csrc/error.h"

namespace rotator {

static constexpr std::size_t kPage = 4096;
static constexpr std::size_t kHugePage = 2u << 20;
static constexpr std::size_t kBlockAlign = 64;  // a copy engine's favourite; costs at most 63 bytes a segment

// Preferred, not bound: memory from another node is slower, no memory is worse. An error changes nothing else.
static void prefer_node(void* data, std::size_t nbytes, int node) {
  constexpr int kPreferred = 1;
  if (node < 0 || node >= 64) return;
  const unsigned long mask = 1UL << node;
  syscall(SYS_mbind, data, nbytes, kPreferred, &mask, 65UL, 0UL);
}

static void populate(unsigned char* data, std::size_t nbytes) {
#ifdef MADV_POPULATE_WRITE
  if (madvise(data, nbytes, MADV_POPULATE_WRITE) == 0) return;
#endif
  for (std::size_t at = 0; at < nbytes; at += kPage) const_cast<volatile unsigned char*>(data)[at] = 0;
}

HostExtent::HostExtent(const Device& device, std::size_t nbytes, unsigned prefault_threads)
    : ranges(nbytes), device_(device), nbytes_(nbytes) {
  void* data = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) raise(RA_HOST_MEMORY, "no host memory for " + std::to_string(nbytes) + " bytes of masters");
  data_ = static_cast<unsigned char*>(data);
  prefer_node(data, nbytes, device.numa_node);
  if (nbytes >= kHugePage) madvise(data, nbytes, MADV_HUGEPAGE);
  prefault(prefault_threads);
  const CUresult result = device.driver.MemHostRegister(data, nbytes, CU_MEMHOSTREGISTER_PORTABLE);
  registered_ = result == CUDA_SUCCESS;
  if (registered_) return;
  munmap(data, nbytes);
  raise_driver(device.driver, result, "MemHostRegister");
}

HostExtent::~HostExtent() {
  // What the driver may still reach is leaked rather than unmapped under it.
  if (unregister()) munmap(data_, nbytes_);
}

bool HostExtent::unregister() noexcept {
  QuietContext scope(device_);
  if (registered_ && device_.driver.MemHostUnregister(data_) == CUDA_SUCCESS) registered_ = false;
  return !registered_;
}

void HostExtent::prefault(unsigned threads) {
  const std::size_t share = round_up(nbytes_ / std::max(threads, 1u) + 1, kHugePage);
  std::vector<std::thread> workers;
  for (std::size_t at = share; at < nbytes_; at += share)
    workers.emplace_back(populate, data_ + at, std::min(share, nbytes_ - at));
  populate(data_, std::min(share, nbytes_));
  for (auto& worker : workers) worker.join();
}

HostArena::HostArena(uint64_t budget_bytes, unsigned prefault_threads)
    : budget_bytes_(budget_bytes), prefault_threads_(prefault_threads) {}

void HostArena::reserve(const Device& device, std::size_t nbytes) {
  const std::size_t size = round_up(nbytes, kPage);
  if (budget_bytes_ != 0 && bytes_registered_ + size > budget_bytes_) {
    Error error;
    error.code = RA_HOST_MEMORY;
    error.bytes_wanted = size;
    error.bytes_free = budget_bytes_ - std::min(budget_bytes_, bytes_registered_);
    error.message = "the masters do not fit the host budget";
    throw error;
  }
  extents_.push_back(std::make_unique<HostExtent>(device, size, prefault_threads_));
  bytes_registered_ += size;
}

static bool take_from(HostExtent& extent, std::size_t size, HostBlock& block) {
  const auto offset = extent.ranges.take(size);
  if (!offset) return false;
  block = {&extent, *offset, size};
  return true;
}

std::size_t HostArena::block_bytes(std::size_t nbytes) { return round_up(nbytes, kBlockAlign); }

HostBlock HostArena::take(const Device& device, std::size_t nbytes) {
  const std::size_t size = block_bytes(nbytes);
  HostBlock block;
  for (auto& extent : extents_)
    if (take_from(*extent, size, block)) break;
  if (block.extent == nullptr) {
    reserve(device, size);
    take_from(*extents_.back(), size, block);
  }
  bytes_used_ += size;
  return block;
}

void HostArena::give(const HostBlock& block) {
  block.extent->ranges.give(block.offset, block.nbytes);
  bytes_used_ -= block.nbytes;
}

void HostArena::trim() {
  auto is_free = [this](const std::unique_ptr<HostExtent>& extent) {
    if (!extent->is_free() || !extent->unregister()) return false;
    bytes_registered_ -= extent->nbytes();
    return true;
  };
  extents_.erase(std::remove_if(extents_.begin(), extents_.end(), is_free), extents_.end());
}

}  // namespace rotator
