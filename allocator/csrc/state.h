// All that one allocator knows. Not locked: plugin.cpp holds one mutex around every call.
#pragma once

#include <map>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "csrc/api.h"
#include "csrc/fence.h"
#include "csrc/masters.h"

namespace rotator {

constexpr uint32_t kAllTags = (1u << RA_TAGS) - 1;
constexpr int kStaging = RA_TAGS;  // the pool of scratch memory, beside the tags'
constexpr uint32_t bit(int tag) { return 1u << tag; }

// Mapped memory of one pool, whole slots.
struct Run {
  Pool* pool;
  Range range;
};

class State {
 public:
  State(Driver driver, const ra_config& config);
  ~State();

  CUdeviceptr alloc(std::size_t nbytes, int device, int tag);
  void free(CUdeviceptr address, CUstream stream);
  void pin(CUdeviceptr address);
  void unpin(CUdeviceptr address);
  void write(CUdeviceptr address, std::size_t offset, const void* data, std::size_t nbytes);
  void read(CUdeviceptr address, std::size_t offset, void* data, std::size_t nbytes);

  // bytes_wanted 0: all of it.
  void sleep(uint32_t tags, uint32_t offload, bool strict, uint64_t bytes_wanted, ra_report& report);
  void wake(uint32_t tags, bool strict, ra_report& report);
  void prepare(uint32_t tags, ra_report& report);
  uint64_t release_masters(uint32_t tags);
  // Masters of awake tags, at least `nbytes` of them if there are so many. Returns bytes.
  uint64_t release_spare(uint64_t nbytes, uint32_t tags);
  uint64_t place_masters(bool on_disk);
  uint64_t collect();
  void capture(bool begin);
  bool capturing();

  std::vector<ra_usage> usage() const;
  ra_host_usage host_usage() const;
  void device_memory(int index, uint64_t& free, uint64_t& total);
  uint32_t asleep_tags() const { return asleep_; }

  // For the background: it holds the mutex too whenever it calls these.
  const Driver& driver() const { return driver_; }
  Masters& masters() { return masters_; }
  Segments& segments() { return segments_; }
  Pool& staging(Device& on);
  bool asleep(const Pool& pool) const { return (asleep_ & bit(pool.tag)) != 0; }
  void tell_releasable();

 private:
  Device& device(int index);
  Pool& pool(int tag, int index);
  Pool& open_pool(int tag, Device& on, std::size_t slab_bytes);
  std::vector<Pool*> pools_of(uint32_t tags);
  Segment& find(CUdeviceptr address);
  Segment& find_around(CUdeviceptr address);
  Segment& accessible(CUdeviceptr address, std::size_t offset, std::size_t nbytes);
  bool is_capturing(CUstream stream) const;
  void retire(Segment& segment, bool captured);
  uint64_t release_unused();
  std::size_t take_range(Pool& target, std::size_t size);
  void quiesce(const std::vector<Pool*>& pools);

  // sleep.cpp
  void refuse_pinned(const std::vector<Pool*>& pools) const;
  void add_chunks(const Run& run, std::vector<ChunkRun>& found);
  void take_masters(const std::vector<Run>& runs, uint32_t offload, ra_report& report);
  void unmap_all(const std::vector<Pool*>& pools, const std::vector<Run>& runs);
  void release_all(const std::vector<Pool*>& pools, ra_report& report);
  void drop_discarded(uint32_t tags, ra_report& report);

  // wake.cpp
  void restore(const std::vector<Pool*>& pools, Journal& journal, ra_report& report);

  const Driver driver_;
  const ra_config config_;
  uint32_t asleep_ = 0;
  uint64_t next_id_ = 1;
  unsigned captures_ = 0;                 // brackets told by the caller
  std::set<CUstream> capturing_streams_;  // met in a free
  // Destroyed bottom up: fences and masters need pools, pools need their device.
  std::map<int, std::unique_ptr<Device>> devices_;
  std::map<std::pair<int, int>, std::unique_ptr<Pool>> pools_;  // by tag and device
  Masters masters_;
  Segments segments_;
  FreeQueue freed_;
};

}  // namespace rotator
