#include "csrc/host.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <thread>

#include "csrc/error.h"

namespace rotator {

static constexpr std::size_t kPage = 4096;
static constexpr std::size_t kHugePage = 2u << 20;
static constexpr std::size_t kBlockAlign = 64;  // a copy engine's favourite; costs at most 63 bytes a segment
static constexpr std::size_t kPiece = 16u << 20;       // one prefault call, for which the process's mappings are locked
static constexpr std::size_t kCheckBytes = 64u << 20;  // free memory is looked at again after so much
static constexpr std::size_t kProbeMax = 64u << 20;    // a memlock limit above this is met, not probed
static constexpr int kPopulateWrite = 23;              // MADV_POPULATE_WRITE, Linux 5.14
static constexpr int kNice = 19;  // and not SCHED_IDLE: whoever prefaults holds a lock that others wait for

struct Extent {
  const Device* device;
  std::size_t nbytes;
};

// One node's addresses, of which extents are committed. Not locked: the arena is.
class HostRegion {
 public:
  HostRegion(int on_node, std::size_t capacity);
  ~HostRegion();
  HostRegion(const HostRegion&) = delete;
  HostRegion& operator=(const HostRegion&) = delete;

  unsigned char* base() const { return base_; }
  bool holds(const unsigned char* data) const { return data >= base_ && data < base_ + capacity_; }

  const int node;
  Ranges addresses;                       // not committed
  Ranges free;                            // committed and not taken
  std::map<std::size_t, Extent> extents;  // by offset

 private:
  unsigned char* base_ = nullptr;
  std::size_t capacity_ = 0;
};

[[noreturn]] static void refuse(HostLimit limit, uint64_t wanted, uint64_t free, const std::string& advice) {
  Error error;
  error.code = RA_HOST_MEMORY;
  error.bytes_wanted = wanted;
  error.bytes_free = free;
  error.message = std::string("the masters do not fit ") + name_of(limit) + ": " + advice;
  throw error;
}

static const char* advice_for(HostLimit limit) {
  switch (limit) {
    case HostLimit::kBudget: return "raise host_budget_bytes, release masters, or name a spill directory";
    case HostLimit::kSharedBudget: return "raise it, release masters of engines that are awake, or spill";
    case HostLimit::kMemlock: return "raise the limit, or give the process CAP_IPC_LOCK";
    case HostLimit::kCgroup: return "raise the container's memory limit, set a host budget below it, or spill";
    default: return "free some, set a host budget, or name a spill directory";
  }
}

static bool reserve_addresses(unsigned char*& base, std::size_t nbytes) {
  void* data = mmap(nullptr, nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) return false;
  base = static_cast<unsigned char*>(data);
  return true;
}

// `capacity` or, where the address space is limited, what there is of it.
HostRegion::HostRegion(int on_node, std::size_t capacity) : node(on_node) {
  while (!reserve_addresses(base_, capacity + kHugePage)) {
    capacity /= 2;
    if (capacity < kHugePage) refuse(HostLimit::kAddresses, kHugePage, 0, "raise ulimit -v");
  }
  const auto start = reinterpret_cast<std::uintptr_t>(base_);
  const std::size_t skip = round_up(start, kHugePage) - start;
  if (skip != 0) munmap(base_, skip);
  munmap(base_ + skip + capacity, kHugePage - skip);
  base_ += skip;
  capacity_ = capacity;
  addresses.give(0, capacity);
}

// What the driver may still reach is leaked rather than unmapped under it.
HostRegion::~HostRegion() {
  std::size_t from = 0;
  for (const auto& [offset, extent] : extents) {
    if (offset > from) munmap(base_ + from, offset - from);
    from = offset + extent.nbytes;
  }
  if (capacity_ > from) munmap(base_ + from, capacity_ - from);
}

static bool unregister(const Device& device, void* data) noexcept {
  QuietContext scope(device);
  return device.driver.MemHostUnregister(data) == CUDA_SUCCESS;
}

// Gives the pages back and keeps the addresses.
static void unmap(unsigned char* data, std::size_t nbytes) noexcept {
  mmap(data, nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

// Preferred, not bound: memory from another node is slower, no memory is worse. An error changes nothing else.
static void prefer_node(void* data, std::size_t nbytes, int node) {
  constexpr int kPreferred = 1;
  if (node < 0 || node >= 64) return;
  const unsigned long mask = 1UL << node;
  syscall(SYS_mbind, data, nbytes, kPreferred, &mask, 65UL, 0UL);
}

// 0, or why not. A kernel without the call gets every page touched.
static int populate(unsigned char* data, std::size_t nbytes) {
  for (;;) {
    if (madvise(data, nbytes, kPopulateWrite) == 0) return 0;
    if (errno == EINVAL) break;
    if (errno != EAGAIN && errno != EINTR) return errno;
  }
  for (std::size_t at = 0; at < nbytes; at += kPage) const_cast<volatile unsigned char*>(data)[at] = 0;
  return 0;
}

HostArena::HostArena(const HostOptions& options)
    : options_(options), budget_bytes_(options.budget_bytes), pid_(getpid()) {
  if (!options.shared_budget_path.empty()) shared_ = std::make_unique<SharedBudget>(options.shared_budget_path);
}

HostArena::~HostArena() {
  for (auto& [node, region] : regions_) {
    // The driver does not know a forked child, and what it has of this memory is another's.
    if (getpid() != pid_) {
      static_cast<void>(region.release());
      continue;
    }
    for (auto it = region->extents.begin(); it != region->extents.end();)
      it = unregister(*it->second.device, region->base() + it->first) ? region->extents.erase(it) : std::next(it);
  }
}

std::size_t HostArena::block_bytes(std::size_t nbytes) { return round_up(nbytes, kBlockAlign); }

HostRegion* HostArena::find_region(int node) const {
  const auto it = regions_.find(node);
  return it == regions_.end() ? nullptr : it->second.get();
}

// Twice the machine's memory, so that holes between extents never matter.
HostRegion& HostArena::region(int node, std::size_t nbytes) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (HostRegion* found = find_region(node)) return *found;
  }
  const std::size_t memory = static_cast<std::size_t>(host_limits(options_.limits_root).mem_total);
  auto made = std::make_unique<HostRegion>(node, round_up(std::max(memory, nbytes) * 2, kHugePage));
  const std::lock_guard<std::mutex> lock(mutex_);
  return *regions_.emplace(node, std::move(made)).first->second;
}

HostRoom HostArena::room() const {
  HostRoom room = host_limits(options_.limits_root).room();
  const uint64_t registered = bytes_registered();
  const uint64_t budget = budget_bytes_;
  if (budget != 0) room.bound(budget - std::min<uint64_t>(budget, registered), HostLimit::kBudget);
  if (shared_) room.bound(shared_->bytes_free(), HostLimit::kSharedBudget);
  return room;
}

void HostArena::admit(std::size_t nbytes) const {
  const HostRoom left = room();
  if (nbytes > left.bytes) refuse(left.limit, nbytes, left.bytes, advice_for(left.limit));
}

// NVIDIA's driver pins without counting against memlock (seen with 580 on an H200: 128 MiB registered under a limit of
// 64 KiB, 2026-11-21), so a low limit alone is no reason to refuse. Whether this one counts is found out with a little
// more than the limit, before it is met with a lot.
void HostArena::check_memlock(const Device& device, std::size_t nbytes) {
  const HostLimits limits = host_limits(options_.limits_root);
  const uint64_t limit = limits.memlock_soft, registered = bytes_registered();
  if (memlock_free_ || limits.cap_ipc_lock || limit > kProbeMax || registered + nbytes <= limit) return;
  const std::size_t size = round_up(limit, kPage) + kPage;
  void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return;
  ContextScope scope(device);
  const bool pinned = device.driver.MemHostRegister(data, size, CU_MEMHOSTREGISTER_PORTABLE) == CUDA_SUCCESS;
  // What the driver does not let go of is leaked rather than unmapped under it.
  if (!pinned || device.driver.MemHostUnregister(data) == CUDA_SUCCESS) munmap(data, size);
  memlock_free_ = pinned;
  if (pinned) return;
  refuse(HostLimit::kMemlock, nbytes, limit - std::min(limit, registered), advice_for(HostLimit::kMemlock));
}

// Small pieces taken in turn: threads end together, and memory that others take meanwhile is noticed before the kernel
// has to kill for it.
void HostArena::prefault(unsigned char* data, std::size_t nbytes, bool background) const {
  std::atomic<std::size_t> next{0};
  std::atomic<int> failed{0};
  auto work = [&](bool low) {
    if (low) setpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)), kNice);
    for (std::size_t at; failed == 0 && (at = next.fetch_add(kPiece)) < nbytes;) {
      const bool look = at != 0 && at % kCheckBytes == 0;
      if (look && host_limits(options_.limits_root).room().bytes < nbytes - at) failed = ENOMEM;
      else if (const int error = populate(data + at, std::min(kPiece, nbytes - at))) failed = error;
    }
  };
  // The caller's own priority could not be raised again, so in the background another does all the work: one, because
  // more of them contend with the engine for the lock of the process's address space (docs/allocator.md).
  const unsigned threads = std::max(1u, options_.prefault_threads);
  const unsigned wanted = background ? 1 : threads - 1;
  const std::size_t useful = (nbytes + kPiece - 1) / kPiece - (background ? 0 : 1);
  std::vector<std::thread> workers;
  try {
    while (workers.size() < std::min<std::size_t>(wanted, useful)) workers.emplace_back(work, background);
  } catch (const std::system_error&) {
    // Fewer threads: slower, and still whole.
  }
  if (!background || workers.empty()) work(false);
  for (auto& worker : workers) worker.join();
  if (failed != 0) {
    const HostRoom left = host_limits(options_.limits_root).room();
    refuse(left.limit == HostLimit::kNone ? HostLimit::kMemory : left.limit, nbytes, left.bytes,
           std::string("prefaulting ended with ") + std::strerror(failed));
  }
}

void HostArena::pin(const Device& device, unsigned char* data, std::size_t nbytes) const {
  ContextScope scope(device);
  const CUresult result = device.driver.MemHostRegister(data, nbytes, CU_MEMHOSTREGISTER_PORTABLE);
  if (result == CUDA_SUCCESS) return;
  if (result != CUDA_ERROR_OUT_OF_MEMORY) raise_driver(device.driver, result, "MemHostRegister");
  const HostLimits limits = host_limits(options_.limits_root);
  const uint64_t registered = bytes_registered();
  const bool memlock = !limits.cap_ipc_lock && registered + nbytes > limits.memlock_soft;
  Error error;
  error.code = RA_HOST_MEMORY;
  error.call = "MemHostRegister";
  error.driver_code = result;
  error.bytes_wanted = nbytes;
  error.bytes_free = memlock ? limits.memlock_soft - std::min(limits.memlock_soft, registered) : limits.room().bytes;
  error.message = std::string("the driver could not pin the masters' memory: ") +
                  (memlock ? "raise memlock (ulimit -l), or give the process CAP_IPC_LOCK" : "set a lower host budget");
  throw error;
}

void HostArena::back(const Device& device, unsigned char* data, std::size_t nbytes, bool background) const {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
  if (mmap(data, nbytes, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED)
    refuse(HostLimit::kMemory, nbytes, host_limits(options_.limits_root).room().bytes, std::strerror(errno));
  prefer_node(data, nbytes, device.numa_node);
  if (nbytes >= kHugePage) madvise(data, nbytes, MADV_HUGEPAGE);
  // Pinned pages are copied by a fork, all of them; and a core dump need not hold the weights.
  madvise(data, nbytes, MADV_DONTFORK);
  madvise(data, nbytes, MADV_DONTDUMP);
  prefault(data, nbytes, background);
  pin(device, data, nbytes);
}

// One extent, or nothing changed. Under growing_.
void HostArena::commit(const Device& device, std::size_t nbytes, bool background) {
  const std::size_t size = round_up(nbytes, kPage);
  admit(size);
  check_memlock(device, size);
  HostRegion& target = region(device.numa_node, size);
  if (shared_ && !shared_->claim(size))
    refuse(HostLimit::kSharedBudget, size, shared_->bytes_free(), advice_for(HostLimit::kSharedBudget));
  std::optional<std::size_t> offset;
  try {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      offset = target.addresses.take(size);
    }
    if (!offset) refuse(HostLimit::kAddresses, size, 0, "release masters, and raise ulimit -v where it is set");
    back(device, target.base() + *offset, size, background);
  } catch (...) {
    if (offset) {
      unmap(target.base() + *offset, size);
      const std::lock_guard<std::mutex> lock(mutex_);
      target.addresses.give(*offset, size);
    }
    if (shared_) shared_->give(size);
    throw;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  target.extents.emplace(*offset, Extent{&device, size});
  target.free.give(*offset, size);
  bytes_registered_ += size;
}

std::size_t HostArena::missing(const Device& device, std::size_t nbytes) const {
  const std::size_t free = static_cast<std::size_t>(bytes_free(device));
  return nbytes - std::min(nbytes, free);
}

// The right to commit, which a background grow does not even queue for meanwhile.
class HostArena::Foreground {
 public:
  explicit Foreground(HostArena& arena) : reserving_(arena.reserving_) {
    ++reserving_;
    turn_ = std::unique_lock<std::mutex>(arena.growing_);
  }
  ~Foreground() { --reserving_; }
  Foreground(const Foreground&) = delete;
  Foreground& operator=(const Foreground&) = delete;

 private:
  std::atomic<unsigned>& reserving_;
  std::unique_lock<std::mutex> turn_;
};

void HostArena::reserve(const Device& device, std::size_t nbytes) {
  if (missing(device, nbytes) == 0) return;
  const Foreground turn(*this);
  if (const std::size_t more = missing(device, nbytes)) commit(device, more, false);
}

bool HostArena::grow(const Device& device, std::size_t nbytes) {
  if (missing(device, nbytes) == 0) return true;
  if (reserving_ != 0) return false;
  const std::lock_guard<std::mutex> turn(growing_);
  const std::size_t more = missing(device, nbytes);
  if (more != 0) commit(device, std::min(more, std::max(options_.extent_bytes, kPage)), true);
  return missing(device, nbytes) == 0;
}

std::optional<HostBlock> HostArena::take(const Device& device, std::size_t nbytes) {
  const std::size_t size = block_bytes(std::max<std::size_t>(nbytes, 1));
  const std::lock_guard<std::mutex> lock(mutex_);
  HostRegion* from = find_region(device.numa_node);
  const auto offset = from != nullptr ? from->free.take(size) : std::nullopt;
  if (!offset) return std::nullopt;
  bytes_used_ += size;
  return HostBlock{from, from->base() + *offset, size};
}

HostBlock HostArena::take_or_grow(const Device& device, std::size_t nbytes) {
  if (auto block = take(device, nbytes)) return *block;
  const Foreground turn(*this);
  for (;;) {
    // Others may take what was just committed, but each of them then has its block.
    if (auto block = take(device, nbytes)) return *block;
    commit(device, std::max<std::size_t>(nbytes, 1), false);
  }
}

void HostArena::give(const HostBlock& block) {
  const std::lock_guard<std::mutex> lock(mutex_);
  block.region->free.give(static_cast<std::size_t>(block.address - block.region->base()), block.nbytes);
  bytes_used_ -= block.nbytes;
}

std::size_t HostArena::run_bytes(const void* data, std::size_t nbytes) const {
  const auto* start = static_cast<const unsigned char*>(data);
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [node, region] : regions_) {
    if (!region->holds(start)) continue;
    const auto offset = static_cast<std::size_t>(start - region->base());
    const auto next = region->extents.upper_bound(offset);
    if (next == region->extents.begin()) break;
    const auto& [first, extent] = *std::prev(next);
    if (first + extent.nbytes <= offset) break;
    return std::min(nbytes, first + extent.nbytes - offset);
  }
  return nbytes;
}

uint64_t HostArena::trim(std::size_t keep_bytes) {
  struct Victim {
    HostRegion* region;
    std::size_t offset;
    Extent extent;
  };
  std::vector<Victim> victims;
  {
    // Taken, so that nobody else takes them, from the top: what stays is low and close together.
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [node, region] : regions_)
      for (auto it = region->extents.rbegin(); it != region->extents.rend(); ++it)
        if (region->free.bytes_free() >= keep_bytes + it->second.nbytes &&
            region->free.take_at(it->first, it->second.nbytes))
          victims.push_back({region.get(), it->first, it->second});
  }
  uint64_t given = 0;
  for (const auto& [region, offset, extent] : victims) {
    unsigned char* data = region->base() + offset;
    const bool gone = unregister(*extent.device, data);
    if (gone) unmap(data, extent.nbytes);
    if (gone && shared_) shared_->give(extent.nbytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!gone) {
      region->free.give(offset, extent.nbytes);
      continue;
    }
    region->extents.erase(offset);
    region->addresses.give(offset, extent.nbytes);
    bytes_registered_ -= extent.nbytes;
    given += extent.nbytes;
  }
  return given;
}

uint64_t HostArena::bytes_free(const Device& device) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const HostRegion* region = find_region(device.numa_node);
  return region != nullptr ? region->free.bytes_free() : 0;
}

uint64_t HostArena::bytes_registered() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return bytes_registered_;
}

uint64_t HostArena::bytes_used() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return bytes_used_;
}

HostUsage HostArena::usage() const {
  const HostRoom left = room();
  HostUsage usage;
  usage.bytes_budget = budget_bytes_;
  usage.bytes_shared_used = shared_ ? shared_->bytes_used() : 0;
  usage.limit = left.limit;
  const std::lock_guard<std::mutex> lock(mutex_);
  usage.bytes_registered = bytes_registered_;
  usage.bytes_used = bytes_used_;
  usage.bytes_limit = left.bytes == kUnlimited ? kUnlimited : left.bytes + bytes_registered_;
  return usage;
}

}  // namespace rotator
