// What this machine lets a process pin: memlock, the control group, free memory, huge pages. Read before a limit bites,
// because the kernel's own answer to asking for too much host memory is to kill somebody.
#pragma once

#include <cstdint>
#include <string>

#include "csrc/driver.h"

namespace rotator {

constexpr uint64_t kUnlimited = UINT64_MAX;

// Which bound a HostRoom or an error speaks of.
enum class HostLimit { kNone, kBudget, kSharedBudget, kMemlock, kCgroup, kMemory, kAddresses };

struct HostRoom {
  uint64_t bytes = kUnlimited;
  HostLimit limit = HostLimit::kNone;
  // Keeps the smaller of the two.
  void bound(uint64_t bytes_free, HostLimit by);
};

struct HostLimits {
  uint64_t memlock_soft = kUnlimited;
  uint64_t memlock_hard = kUnlimited;
  bool cap_ipc_lock = false;              // then memlock does not count
  int cgroup_version = 0;                 // 0: no memory controller found
  std::string cgroup_path;                // of the group that has the least room
  uint64_t cgroup_limit = kUnlimited;     // of that group: the smaller of memory.max and memory.high
  uint64_t cgroup_current = 0;
  uint64_t cgroup_reclaimable = 0;        // page cache inside cgroup_current, which gives way
  uint64_t mem_total = 0;
  uint64_t mem_available = kUnlimited;
  int huge_pages = -1;                    // transparent ones: 0 never, 1 madvise, 2 always, -1 unknown
  uint64_t huge_page_bytes = 0;           // their size, 0 unknown
  int numa_nodes = 1;                     // with memory

  uint64_t cgroup_room() const;
  // MemAvailable less a reserve (1/64 of the memory, at most 2 GiB) that is left to everybody else.
  uint64_t memory_room() const;
  // What can be touched now: the smaller of both. Memlock is not in it: see HostArena.
  HostRoom room() const;
};

// Never throws: what cannot be read does not bound. `root` is put before /proc and /sys, for tests.
HostLimits host_limits(const std::string& root = "");

const char* name_of(HostLimit limit);

// Device and host are one memory: a copy on the host frees nothing. False when the driver cannot say.
bool is_unified(const Driver& driver, CUdevice device);

}  // namespace rotator
