// Host memory for masters: exact sizes, in extents that are mapped, prefaulted and registered once each, accounted,
// and bounded by our own budget, by one that processes share, and by what the machine allows.
//
// Each NUMA node has one range of addresses. Extents are committed in it side by side, so blocks taken one after the
// other are contiguous, also across extents. But a copy may not cross from one registration into the next: split it
// with run_bytes(). Registered memory cannot be given back in part, so an extent goes when all of it is free.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "csrc/budget.h"
#include "csrc/driver.h"
#include "csrc/limits.h"
#include "csrc/ranges.h"
#include "csrc/vmm.h"

namespace rotator {

struct HostOptions {
  uint64_t budget_bytes = 0;  // bound on registered bytes, 0 for none
  unsigned prefault_threads = 1;
  std::size_t extent_bytes = std::size_t{1} << 30;  // one step of a background grow
  std::string shared_budget_path;                   // empty: no budget is shared
  std::string limits_root;                          // see host_limits(): for tests
};

class HostRegion;

struct HostBlock {
  HostRegion* region = nullptr;
  unsigned char* address = nullptr;
  std::size_t nbytes = 0;
  unsigned char* data() const { return address; }
};

struct HostUsage {
  uint64_t bytes_registered = 0;
  uint64_t bytes_used = 0;         // taken and not given back
  uint64_t bytes_budget = 0;       // our own, 0 for none
  uint64_t bytes_shared_used = 0;  // by all processes of the shared budget, 0 without one
  uint64_t bytes_limit = 0;        // that could be registered in all, as things are now
  HostLimit limit = HostLimit::kNone;  // what sets bytes_limit
};

// Safe to use from several threads. Mapping, prefaulting and registering happen outside the mutex, one extent at a
// time. Devices must outlive it. In a forked child the extents are not there, and the destructor does nothing.
class HostArena {
 public:
  // Throws Error: RA_BUDGET_FILE.
  explicit HostArena(const HostOptions& options);
  ~HostArena();
  HostArena(const HostArena&) = delete;
  HostArena& operator=(const HostArena&) = delete;

  // What a block of `nbytes` takes.
  static std::size_t block_bytes(std::size_t nbytes);

  // Makes `nbytes` free on the device's node; what is missing comes in one extent, one registration.
  // Throws Error: RA_HOST_MEMORY naming the limit, with bytes_wanted (the extent) and bytes_free (the room left by that
  // limit); or the driver's.
  void reserve(const Device& device, std::size_t nbytes);
  // One step of the same in the background: at most extent_bytes, prefaulted at low priority. True when `nbytes` are
  // free, so that there is nothing left to do. Does nothing while a reserve runs. Throws as reserve.
  bool grow(const Device& device, std::size_t nbytes);

  // From free memory alone. Nothing when no free range is large enough.
  std::optional<HostBlock> take(const Device& device, std::size_t nbytes);
  // Throws as reserve.
  HostBlock take_or_grow(const Device& device, std::size_t nbytes);
  void give(const HostBlock& block);

  // Bytes from `data` on, at most `nbytes`, that lie in one registration: what one copy may move.
  std::size_t run_bytes(const void* data, std::size_t nbytes) const;
  // body(offset, nbytes) for each run of `nbytes` from `data`.
  template <typename Body>
  void each_run(const unsigned char* data, std::size_t nbytes, Body body) const {
    for (std::size_t at = 0, run; at < nbytes; at += run) body(at, run = run_bytes(data + at, nbytes - at));
  }

  // Unregisters and unmaps the extents that hold nothing, but keeps `keep_bytes` free on each node. What the driver
  // refuses to unregister stays, free to be taken, and is tried again by the next call. Returns the bytes given back.
  uint64_t trim(std::size_t keep_bytes = 0);

  // Bounds what is registered from now on; extents that there are stay. 0: no bound.
  void set_budget(uint64_t nbytes) { budget_bytes_ = nbytes; }

  uint64_t bytes_free(const Device& device) const;
  uint64_t bytes_registered() const;
  uint64_t bytes_used() const;
  HostUsage usage() const;
  // Null without one.
  SharedBudget* shared_budget() { return shared_.get(); }

 private:
  class Foreground;

  HostRegion* find_region(int node) const;
  HostRegion& region(int node, std::size_t nbytes);
  std::size_t missing(const Device& device, std::size_t nbytes) const;
  void commit(const Device& device, std::size_t nbytes, bool background);
  void admit(std::size_t nbytes) const;
  void check_memlock(const Device& device, std::size_t nbytes);
  void back(const Device& device, unsigned char* data, std::size_t nbytes, bool background) const;
  void prefault(unsigned char* data, std::size_t nbytes, bool background) const;
  void pin(const Device& device, unsigned char* data, std::size_t nbytes) const;
  HostRoom room() const;

  const HostOptions options_;
  std::atomic<uint64_t> budget_bytes_;
  const pid_t pid_;
  std::unique_ptr<SharedBudget> shared_;
  std::mutex growing_;                  // held by whoever commits; taken before mutex_
  bool memlock_free_ = false;           // under growing_: the driver pins beyond memlock, as NVIDIA's does
  std::atomic<unsigned> reserving_{0};  // foreground calls that want or hold growing_
  mutable std::mutex mutex_;            // all below
  uint64_t bytes_registered_ = 0;
  uint64_t bytes_used_ = 0;
  std::map<int, std::unique_ptr<HostRegion>> regions_;  // by node
};

}  // namespace rotator
